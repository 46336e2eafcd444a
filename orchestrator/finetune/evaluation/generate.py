"""Generated answers of several lanes at once, by greedy decoding or sampling (`token_sampling`)."""

from __future__ import annotations

from collections import ChainMap
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
from orchestrator.finetune.models.base_model import BaseModel
from orchestrator.finetune.process_group import ProcessGroup
from orchestrator.finetune.tasks.base import Task

STOP_CHECK_INTERVAL = 8
"""The number of new tokens after which answers are searched for a stop string."""


@torch.no_grad()
def generate_answers(  # noqa: PLR0913 (one parameter more than the rule allows, to show progress)
    base_model: BaseModel,
    task: Task,
    prompts: Sequence[tuple[int, Sequence[int]]],
    max_row_length: int,
    seeds: Sequence[int],
    lane_rows: Callable[[], AbstractContextManager[Any]],
    process_group: ProcessGroup,
    on_batch: Callable[[], None] = lambda: None,
) -> list[list[tuple[str, ...]]]:
    """Generate `task.samples` answers of each lane to each prompt. The processes of the group share the work.

    Args:
        base_model: The base model that carries the lanes' adapters.
        task: The task, which decides the sampling, the stop strings and the length of answers.
        prompts: An item number, which decides what is sampled, and token ids of each prompt.
        max_row_length: The longest padded length, except for prompts that are longer.
        seeds: The seed of each lane, in the order of `lane_rows`.
        lane_rows: Makes a context in which the model treats its rows as those of the lanes, one after
            another, with an equal number of rows for each.
        process_group: The processes that generate for the same lanes.
        on_batch: Called after every batch, to show progress.

    Returns:
        The samples by lane and prompt, equal in all processes. A sample ends before the end token or the
        first stop string.
    """
    own_answers: dict[tuple[int, int], str] = {}  # by lane and entry
    entries = [(item, ids, sample) for item, ids in prompts for sample in range(task.samples)]
    batch_plan = plan_batches([len(ids) for _, ids, _ in entries], max_row_length, task.max_new_tokens)
    with lane_rows(), _greedy_decoding(base_model.model, base_model.tokenizer, task.max_new_tokens):
        for length, batch in batch_plan[process_group.rank :: process_group.world_size]:
            texts = _generate_batch(base_model, task, [entries[e] for e in batch], length, seeds)
            for row, text in enumerate(texts):
                own_answers[row // len(batch), batch[row % len(batch)]] = text
            on_batch()
    all_answers = dict(ChainMap(*process_group.all_gather(own_answers)))
    return [
        [
            tuple(all_answers[lane, first + sample] for sample in range(task.samples))
            for first in range(0, len(entries), task.samples)
        ]
        for lane in range(len(seeds))
    ]


def _generate_batch(
    base_model: BaseModel,
    task: Task,
    entries: Sequence[tuple[int, Sequence[int], int]],
    length: int,
    seeds: Sequence[int],
) -> list[str]:
    """Generate the answers of all lanes to one batch.

    Args:
        base_model: The base model, inside the contexts of lanes and of greedy decoding.
        task: The task.
        entries: The item number, the token ids of the prompt, and the sample number of each row.
        length: The length that prompts are padded to.
        seeds: The seed of each lane.

    Returns:
        The answers, (lanes * entries), lane by lane.
    """
    tokenizer, lanes, device = base_model.tokenizer, len(seeds), base_model.device
    # Prompts are padded on the left, so that all answers begin in one column.
    prompts = [prompt for _, prompt, _ in entries]
    ids = torch.tensor([[*[tokenizer.pad_token_id] * (length - len(p)), *p] for p in prompts])
    mask = torch.tensor([[*[0] * (length - len(p)), *[1] * len(p)] for p in prompts])
    logits_processors = []
    if task.temperature > 0:
        item_samples = [(item, sample) for item, _, sample in entries]
        uniforms = draw_uniform_table(seeds, item_samples, task.max_new_tokens).to(device)
        sampler = InverseTransformLogitsProcessor(uniforms, length, task.temperature, task.top_p)
        logits_processors.append(sampler)
    stopping = [_StopStringCriteria(tokenizer, task.stop, length)] if task.stop else []
    generated = base_model.model.generate(
        input_ids=ids.repeat(lanes, 1).to(device),
        attention_mask=mask.repeat(lanes, 1).to(device),
        logits_processor=LogitsProcessorList(logits_processors),
        stopping_criteria=StoppingCriteriaList(stopping),
    )
    answers = generated[:, length:].tolist()
    return [truncate_at_stop(_decode_answer(answer, tokenizer), task.stop) for answer in answers]


def truncate_at_stop(text: str, stops: Sequence[str]) -> str:
    """Return the text before the first stop string, all of it if there is none."""
    return text[: min((position for stop in stops if (position := text.find(stop)) >= 0), default=len(text))]


def _decode_answer(ids: list[int], tokenizer: Any) -> str:
    end = ids.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids else len(ids)
    return tokenizer.decode(ids[:end], skip_special_tokens=True)


class _StopStringCriteria(StoppingCriteria):
    """Ends a row once its answer has a stop string, which saves the tokens after it.

    An ended row is filled with padding, as after an end token, so other rows are not affected. The answer is
    cut by `truncate_at_stop` in any case.

    Args:
        tokenizer: Decodes the answers.
        stops: The stop strings.
        prompt_length: The length of the padded prompts.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str], prompt_length: int) -> None:
        self.tokenizer, self.stops, self.prompt_length = tokenizer, stops, prompt_length
        # A token has at least one byte: so many tokens hold any stop string that ended since the last check.
        self.tail = STOP_CHECK_INTERVAL + max(len(stop.encode()) for stop in stops)

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        done = torch.zeros(len(input_ids), dtype=torch.bool)
        if (input_ids.shape[1] - self.prompt_length) % STOP_CHECK_INTERVAL == 0:
            first = max(self.prompt_length, input_ids.shape[1] - self.tail)
            texts = self.tokenizer.batch_decode(input_ids[:, first:], skip_special_tokens=True)
            done = torch.tensor([any(stop in text for stop in self.stops) for text in texts])
        return done.to(input_ids.device)


@contextmanager
def _greedy_decoding(model: Any, tokenizer: Any, max_new_tokens: int) -> Iterator[None]:
    """Replace the model's generation settings by plain greedy decoding, without sampling or penalties."""
    original_config, eos, pad = model.generation_config, tokenizer.eos_token_id, tokenizer.pad_token_id
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=eos, pad_token_id=pad
    )
    try:
        yield
    finally:
        model.generation_config = original_config
