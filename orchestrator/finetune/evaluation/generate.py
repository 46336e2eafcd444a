"""Answers of several lanes at once: greedy, or sampled (`sampling.py`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from orchestrator.finetune.data.batches import scoring_plan
from orchestrator.finetune.evaluation.token_sampling import Draw, table
from orchestrator.finetune.models.loading import Bench
from orchestrator.finetune.process_group import Team
from orchestrator.finetune.tasks.base import Task

LOOK = 8
"""Every so many new tokens the answers are looked through for a stop."""


@torch.no_grad()
def answers(
    bench: Bench,
    task: Task,
    prompts: Sequence[tuple[int, Sequence[int]]],
    cap: int,
    seeds: Sequence[int],
    lane_rows: Callable[[], AbstractContextManager[Any]],
    team: Team,
) -> list[list[tuple[str, ...]]]:
    """[lane][prompt] -> `task.samples` answers, up to the end token or the task's first stop. `prompts`: item
    numbers, which decide what is drawn, and token ids. `seeds`: one a lane, in the order of `lane_rows`. The
    team share the work, and all get to know everything."""
    tokenizer, lanes = bench.tokenizer, len(seeds)
    mine: dict[tuple[int, int], str] = {}
    # An entry is one sample of one prompt.
    entries = [(number, sample) for number in range(len(prompts)) for sample in range(task.samples)]
    plan = scoring_plan([len(prompts[n][1]) for n, _ in entries], cap, growth=task.max_new_tokens)
    with lane_rows(), _greedy(bench.model, tokenizer, task.max_new_tokens):
        for length, batch in plan[team.rank :: team.size]:
            rows = [prompts[entries[e][0]][1] for e in batch]
            # Prompts are padded on the left, so that all answers begin in one column.
            short = [length - len(row) for row in rows]
            ids = torch.tensor(
                [[*[tokenizer.pad_token_id] * n, *row] for n, row in zip(short, rows, strict=True)]
            )
            mask = torch.tensor([[*[0] * n, *[1] * (length - n)] for n in short])
            drawing = []
            if task.temperature > 0:
                places = [(prompts[entries[e][0]][0], entries[e][1]) for e in batch]
                numbers = table(seeds, places, task.max_new_tokens).to(bench.device)
                drawing.append(Draw(numbers, length, task.temperature, task.top_p))
            told = bench.model.generate(
                input_ids=ids.repeat(lanes, 1).to(bench.device),
                attention_mask=mask.repeat(lanes, 1).to(bench.device),
                logits_processor=LogitsProcessorList(drawing),
                stopping_criteria=StoppingCriteriaList(
                    [_Stops(tokenizer, task.stop, length)] if task.stop else []
                ),
            )
            for row, new in enumerate(told[:, length:].tolist()):
                text = cut(_text(new, tokenizer), task.stop)
                mine[row // len(batch), batch[row % len(batch)]] = text
    found = {place: text for theirs in team.gather(mine) for place, text in theirs.items()}
    return [
        [
            tuple(found[lane, number * task.samples + sample] for sample in range(task.samples))
            for number in range(len(prompts))
        ]
        for lane in range(lanes)
    ]


def cut(text: str, stops: Sequence[str]) -> str:
    """What stands before the first stop."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


def _text(ids: list[int], tokenizer: Any) -> str:
    end = ids.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids else len(ids)
    return tokenizer.decode(ids[:end], skip_special_tokens=True)


class _Stops(StoppingCriteria):
    """Saves the tokens after a stop; what the answer is, `cut` says in any case. A row that has one goes on
    as padding, as after an end token: the others do not notice."""

    def __init__(self, tokenizer: Any, stops: Sequence[str], start: int) -> None:
        self.tokenizer, self.stops, self.start = tokenizer, stops, start
        self.tail = LOOK + max(len(stop.encode()) for stop in stops)  # no token is shorter than a byte

    def __call__(self, input_ids: Tensor, scores: Tensor, **more: Any) -> Tensor:
        done = torch.zeros(len(input_ids), dtype=torch.bool)
        if (input_ids.shape[1] - self.start) % LOOK == 0:
            first = max(self.start, input_ids.shape[1] - self.tail)
            texts = self.tokenizer.batch_decode(input_ids[:, first:], skip_special_tokens=True)
            done = torch.tensor([any(stop in text for stop in self.stops) for text in texts])
        return done.to(input_ids.device)


@contextmanager
def _greedy(model: Any, tokenizer: Any, max_new_tokens: int) -> Iterator[None]:
    """Plain greedy decoding: what a model's own settings add (sampling, penalties) is left out meanwhile."""
    own = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    try:
        yield
    finally:
        model.generation_config = own
