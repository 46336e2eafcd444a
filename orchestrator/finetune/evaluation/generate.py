"""Answers of several lanes at once: greedy, or sampled (`sampling.py`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from orchestrator.finetune.data.batches import plan_batches
from orchestrator.finetune.evaluation.token_sampling import (
    InverseTransformLogitsProcessor,
    draw_uniform_table,
)
from orchestrator.finetune.models.loading import BaseModel
from orchestrator.finetune.process_group import ProcessGroup
from orchestrator.finetune.tasks.base import Task

STOP_CHECK_INTERVAL = 8
"""Every so many new tokens the answers are looked through for a stop."""


@torch.no_grad()
def generate_answers(
    base_model: BaseModel,
    task: Task,
    prompts: Sequence[tuple[int, Sequence[int]]],
    max_row_length: int,
    seeds: Sequence[int],
    lane_rows: Callable[[], AbstractContextManager[Any]],
    process_group: ProcessGroup,
) -> list[list[tuple[str, ...]]]:
    """[lane][prompt] -> `task.samples` answers, up to the end token or the task's first stop. `prompts`: item
    numbers, which decide what is drawn, and token ids. `seeds`: one a lane, in the order of `lane_rows`. The
    team share the work, and all get to know everything."""
    tokenizer, lanes = base_model.tokenizer, len(seeds)
    own_answers: dict[tuple[int, int], str] = {}
    # An entry is one sample of one prompt.
    entries = [(number, sample) for number in range(len(prompts)) for sample in range(task.samples)]
    batch_plan = plan_batches(
        [len(prompts[n][1]) for n, _ in entries], max_row_length, max_new_tokens=task.max_new_tokens
    )
    with lane_rows(), _greedy_decoding(base_model.model, tokenizer, task.max_new_tokens):
        for length, batch in batch_plan[process_group.rank :: process_group.world_size]:
            rows = [prompts[entries[e][0]][1] for e in batch]
            # Prompts are padded on the left, so that all answers begin in one column.
            pad_counts = [length - len(row) for row in rows]
            ids = torch.tensor(
                [[*[tokenizer.pad_token_id] * n, *row] for n, row in zip(pad_counts, rows, strict=True)]
            )
            mask = torch.tensor([[*[0] * n, *[1] * (length - n)] for n in pad_counts])
            logits_processors = []
            if task.temperature > 0:
                item_samples = [(prompts[entries[e][0]][0], entries[e][1]) for e in batch]
                uniforms = draw_uniform_table(seeds, item_samples, task.max_new_tokens).to(base_model.device)
                logits_processors.append(
                    InverseTransformLogitsProcessor(uniforms, length, task.temperature, task.top_p)
                )
            generated = base_model.model.generate(
                input_ids=ids.repeat(lanes, 1).to(base_model.device),
                attention_mask=mask.repeat(lanes, 1).to(base_model.device),
                logits_processor=LogitsProcessorList(logits_processors),
                stopping_criteria=StoppingCriteriaList(
                    [_StopStringCriteria(tokenizer, task.stop, length)] if task.stop else []
                ),
            )
            for row, new in enumerate(generated[:, length:].tolist()):
                text = truncate_at_stop(_decode_answer(new, tokenizer), task.stop)
                own_answers[row // len(batch), batch[row % len(batch)]] = text
    all_answers = {
        answer_key: text
        for rank_answers in process_group.all_gather(own_answers)
        for answer_key, text in rank_answers.items()
    }
    return [
        [
            tuple(all_answers[lane, number * task.samples + sample] for sample in range(task.samples))
            for number in range(len(prompts))
        ]
        for lane in range(lanes)
    ]


def truncate_at_stop(text: str, stops: Sequence[str]) -> str:
    """What stands before the first stop."""
    return text[: min((position for stop in stops if (position := text.find(stop)) >= 0), default=len(text))]


def _decode_answer(ids: list[int], tokenizer: Any) -> str:
    end = ids.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids else len(ids)
    return tokenizer.decode(ids[:end], skip_special_tokens=True)


class _StopStringCriteria(StoppingCriteria):
    """Saves the tokens after a stop; what the answer is, `cut` says in any case. A row that has one goes on
    as padding, as after an end token: the others do not notice."""

    def __init__(self, tokenizer: Any, stops: Sequence[str], prompt_length: int) -> None:
        self.tokenizer, self.stops, self.prompt_length = tokenizer, stops, prompt_length
        self.tail = STOP_CHECK_INTERVAL + max(
            len(stop.encode()) for stop in stops
        )  # no token is shorter than a byte

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        done = torch.zeros(len(input_ids), dtype=torch.bool)
        if (input_ids.shape[1] - self.prompt_length) % STOP_CHECK_INTERVAL == 0:
            first = max(self.prompt_length, input_ids.shape[1] - self.tail)
            texts = self.tokenizer.batch_decode(input_ids[:, first:], skip_special_tokens=True)
            done = torch.tensor([any(stop in text for stop in self.stops) for text in texts])
        return done.to(input_ids.device)


@contextmanager
def _greedy_decoding(model: Any, tokenizer: Any, max_new_tokens: int) -> Iterator[None]:
    """Plain greedy decoding: what a model's own settings add (sampling, penalties) is left out meanwhile."""
    original_config = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    try:
        yield
    finally:
        model.generation_config = original_config
