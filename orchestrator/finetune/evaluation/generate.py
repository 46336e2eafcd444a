"""Generated answers of several lanes at once, by greedy decoding or sampling (`token_sampling`)."""

from __future__ import annotations

import logging
from collections import ChainMap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from orchestrator.finetune.evaluation.decoding import DecodingRules, decode_answers
from orchestrator.finetune.evaluation.evaluated_lanes import EvaluatedLanes
from orchestrator.finetune.evaluation.generation_plan import (
    MIN_ROWS,
    GenerationLimits,
    plan_generation_batches,
)
from orchestrator.finetune.evaluation.token_sampling import draw_uniform_table
from orchestrator.finetune.failures import Fault, classify_error, free_memory
from orchestrator.finetune.models.base_model import BaseModel
from orchestrator.finetune.process_group import ProcessGroup
from orchestrator.finetune.tasks.base import Task

log = logging.getLogger(__name__)

Entry = tuple[int, Sequence[int], int]
"""The item number, the token ids of the prompt, and the sample number of a row."""


@torch.no_grad()
def generate_answers(
    base_model: BaseModel,
    task: Task,
    prompts: Sequence[tuple[int, Sequence[int]]],
    max_row_length: int,
    lanes: EvaluatedLanes,
    process_group: ProcessGroup,
    on_batch: Callable[[], None] = lambda: None,
) -> list[list[tuple[str, ...]]]:
    """Generate `task.samples` answers of each lane to each prompt. The processes of the group share the work.

    Args:
        base_model: The base model that carries the lanes' adapters.
        task: The task, which decides the sampling, the stop strings and the length of answers.
        prompts: The item number, which decides what is sampled, and the token ids of each prompt.
        max_row_length: The longest padded length, except for prompts that are longer.
        lanes: The lanes.
        process_group: The processes that generate for the same lanes.
        on_batch: Called after every batch and within long ones, to show progress.

    Returns:
        The samples by lane and prompt, equal in all processes. A sample ends before the end token or the
        first stop string.
    """
    entries = [(item, ids, sample) for item, ids in prompts for sample in range(task.samples)]
    limits = GenerationLimits.measure(base_model, process_group)
    plan = plan_generation_batches(
        [len(ids) for _, ids, _ in entries],
        max_row_length,
        task.max_new_tokens,
        limits,
        process_group.world_size,
    )
    generator = _Generator(base_model, task, lanes.seeds, on_batch)
    own_answers: dict[tuple[int, int], str] = {}  # by lane and entry
    with lanes.activate():
        for length, batch in plan[process_group.rank :: process_group.world_size]:
            for lane, texts in enumerate(generator.generate([entries[e] for e in batch], length)):
                own_answers.update({(lane, entry): text for entry, text in zip(batch, texts, strict=True)})
            on_batch()
    all_answers = dict(ChainMap(*process_group.all_gather(own_answers)))
    return [
        [
            tuple(all_answers[lane, first + sample] for sample in range(task.samples))
            for first in range(0, len(entries), task.samples)
        ]
        for lane in range(len(lanes.seeds))
    ]


def count_lanes_together(
    base_model: BaseModel,
    task: Task,
    prompt_lengths: Sequence[int],
    max_row_length: int,
    process_group: ProcessGroup,
) -> int:
    """Return how many lanes fit into memory when they generate their answers together.

    Args:
        base_model: The base model.
        task: The task.
        prompt_lengths: The length of each prompt in tokens.
        max_row_length: The longest padded length, except for prompts that are longer.
        process_group: The processes that generate for the same lanes.

    Returns:
        The number of lanes, at least 1, equal in all processes.
    """
    limits = GenerationLimits.measure(base_model, process_group)
    lengths = [length for length in prompt_lengths for _ in range(task.samples)]
    plan = plan_generation_batches(
        lengths, max_row_length, task.max_new_tokens, limits, process_group.world_size
    )
    return limits.lanes(plan, task.max_new_tokens)


@dataclass(frozen=True)
class _Generator:
    """A generator of the answers of all lanes to batches of prompts."""

    base_model: BaseModel
    task: Task
    seeds: Sequence[int]
    """The seed of each lane."""
    on_progress: Callable[[], None]

    def generate(self, entries: Sequence[Entry], length: int) -> list[list[str]]:
        """Generate the answers to a batch, with fewer rows at once if memory runs out.

        Later calls of `generate_answers` then plan for half of the memory, in all processes of the group.

        Args:
            entries: The rows of each lane.
            length: The length that prompts are padded to.

        Returns:
            The answers by lane and entry.
        """
        by_lane: list[list[str]] = [[] for _ in self.seeds]
        done, rows = 0, len(entries)
        while done < len(entries):
            remaining = len(entries) - done
            count = -(-remaining // -(-remaining // rows))  # parts of nearly equal size
            answers = self._generate_if_memory_suffices(entries[done : done + count], length)
            if answers is None:
                free_memory()
                rows = -(-rows // 2)
                self.base_model.generation.memory_share /= 2
                log.warning("out of memory with %d rows of generated answers, now %d at once", count, rows)
                continue
            done += count
            for texts, more in zip(by_lane, answers, strict=True):
                texts += more
        return by_lane

    def _generate_if_memory_suffices(self, entries: Sequence[Entry], length: int) -> list[list[str]] | None:
        """Return the answers, or None if memory has run out and there are enough rows for two parts."""
        try:
            return self._generate_at_once(entries, length)
        except Exception as error:
            if classify_error(error) is not Fault.MEMORY or len(entries) < 2 * MIN_ROWS:
                raise
            return None  # the error, whose traceback keeps the tensors of the batch alive, ends here

    def _generate_at_once(self, entries: Sequence[Entry], length: int) -> list[list[str]]:
        """Return the answers to a batch by lane and entry, with all rows computed together."""
        tokenizer, task, lanes = self.base_model.tokenizer, self.task, len(self.seeds)
        device = self.base_model.device
        # Prompts are padded on the left, so that all answers begin in one column.
        prompts = [prompt for _, prompt, _ in entries]
        ids = torch.tensor([[*[tokenizer.pad_token_id] * (length - len(p)), *p] for p in prompts])
        mask = torch.tensor([[*[0] * (length - len(p)), *[1] * len(p)] for p in prompts])
        uniforms = None
        if task.temperature > 0:
            item_samples = [(item, sample) for item, _, sample in entries]
            uniforms = draw_uniform_table(self.seeds, item_samples, task.max_new_tokens).to(device)
        answers = decode_answers(
            self.base_model,
            DecodingRules(task.max_new_tokens, task.stop, task.temperature, task.top_p),
            ids.repeat(lanes, 1).to(device),
            mask.repeat(lanes, 1).to(device),
            lanes,
            uniforms,
            self.on_progress,
        )
        texts = [truncate_at_stop(_decode_answer(ids, tokenizer), task.stop) for ids in answers.tolist()]
        return [texts[first : first + len(entries)] for first in range(0, len(texts), len(entries))]


def truncate_at_stop(text: str, stops: Sequence[str]) -> str:
    """Return the text before the first stop string, all of it if there is none."""
    return text[: min((position for stop in stops if (position := text.find(stop)) >= 0), default=len(text))]


def _decode_answer(ids: list[int], tokenizer: Any) -> str:
    end = ids.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids else len(ids)
    return tokenizer.decode(ids[:end], skip_special_tokens=True)
