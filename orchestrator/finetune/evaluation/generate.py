"""Generated answers of several lanes at once, by greedy decoding or sampling.

transformers' `generate` computes every row until the last one has ended. Here rows that have ended leave the
batch. Rows are ordered lane by lane, with an equal number of rows for each lane, as the adapters expect.

What is sampled depends only on the lane's seed, the item, the sample number and the position. torch's global
generator would give a lane other tokens in another lane group. Here numpy draws uniform numbers on the CPU in
advance. A token is found by inverse transform sampling: it is the one at which the cumulative distribution of
the model's softmax, in the order of the vocabulary, passes the uniform number.
"""

from __future__ import annotations

import inspect
import logging
from collections import ChainMap
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from orchestrator.finetune.data.batches import bucket_length
from orchestrator.finetune.failures import Fault, classify_error, free_memory
from orchestrator.finetune.models.base_model import BaseModel
from orchestrator.finetune.process_group import ProcessGroup
from orchestrator.finetune.tasks.base import Task
from variants.adapters import Adapters

log = logging.getLogger(__name__)

MIN_ROWS = 8
"""Rows of a lane in a batch, unless the split has fewer. With fewer rows the CPU may select another kernel,
whose results differ in the last bits."""
MAX_TOGETHER_TOKENS = 2**17
"""Tokens of the prompts and answers of all lanes that generate together."""
STOP_CHECK_INTERVAL = 8
"""The number of new tokens after which answers are searched for a stop string."""
COMPACTION_INTERVAL = 32
"""The number of new tokens after which rows that have ended leave the batch."""
SAMPLED_ROWS = 32
"""Rows sampled at once. A row takes 1.2 MB per float64 copy with a vocabulary of 150,000."""

CPU_LIMITS = 64, 2**12, 2**15
"""The largest batch of one lane: rows, tokens of the padded prompts, and tokens of prompts and answers. It
does not depend on the number of lanes."""
GPU_LIMITS = 512, 2**15, 2**17
"""The same on a GPU, where a decode step with few rows takes as long as one with many."""

_fitting_tokens: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
"""Model -> the tokens of prompts and answers that fit into memory at once, known after it has run out."""

Entry = tuple[int, Sequence[int], int]
"""The item number, the token ids of the prompt, and the sample number of a row."""
BatchPlan = list[tuple[int, list[int]]]
"""The padded length of the prompts and the prompt numbers of each batch."""


@dataclass(frozen=True)
class EvaluatedLanes:
    """Lanes that are evaluated together, or the base model without adapters as a single lane."""

    adapters: Adapters
    names: Sequence[str] | None = None
    """The names of the lanes; None for the base model."""
    seeds: Sequence[int] = (0,)
    """The seed of each lane, which decides what is sampled for its answers."""

    def activate(self) -> AbstractContextManager[Any]:
        """Return a context in which the model's rows are those of the lanes, with equal numbers, in order."""
        if self.names is None:
            return self.adapters.disable_adapters()
        return self.adapters.activate_lanes(self.names, None)


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
    lengths, on_gpu = [len(ids) for _, ids, _ in entries], base_model.device.type == "cuda"
    workers = process_group.world_size
    plan = plan_generation_batches(lengths, max_row_length, task.max_new_tokens, on_gpu, workers)
    generator = _Generator(base_model, task, lanes.seeds, on_batch)
    own_answers: dict[int, tuple[str, ...]] = {}  # entry -> the answer of each lane
    with lanes.activate():
        for length, batch in plan[process_group.rank :: workers]:
            by_lane = generator.generate([entries[e] for e in batch], length)
            own_answers.update(zip(batch, zip(*by_lane, strict=True), strict=True))
            on_batch()
    all_answers = dict(ChainMap(*process_group.all_gather(own_answers)))
    return [
        [
            tuple(all_answers[first + sample][lane] for sample in range(task.samples))
            for first in range(0, len(entries), task.samples)
        ]
        for lane in range(len(lanes.seeds))
    ]


def count_lanes_together(
    base_model: BaseModel, task: Task, prompt_lengths: Sequence[int], max_row_length: int
) -> int:
    """Return how many lanes may generate their answers together, at least 1.

    Args:
        base_model: The base model.
        task: The task.
        prompt_lengths: The length of each prompt in tokens.
        max_row_length: The longest padded length, except for prompts that are longer.
    """
    lengths = [length for length in prompt_lengths for _ in range(task.samples)]
    on_gpu = base_model.device.type == "cuda"
    plan = plan_generation_batches(lengths, max_row_length, task.max_new_tokens, on_gpu)
    largest = max(((length + task.max_new_tokens) * len(batch) for length, batch in plan), default=1)
    return max(1, MAX_TOGETHER_TOKENS // largest)


def count_rows(limits: tuple[int, int, int], length: int, max_new_tokens: int) -> int:
    """Return how many prompts of a lane share a batch, at least `MIN_ROWS`.

    Args:
        limits: CPU_LIMITS or GPU_LIMITS.
        length: The padded length of the prompts in tokens.
        max_new_tokens: The longest answer in tokens.
    """
    rows, prompt_tokens, tokens = limits
    return max(MIN_ROWS, min(rows, prompt_tokens // max(1, length), tokens // (length + max_new_tokens)))


def plan_generation_batches(
    lengths: Sequence[int], max_row_length: int, max_new_tokens: int, on_gpu: bool, workers: int = 1
) -> BatchPlan:
    """Group prompts into batches. On a GPU, prompts of several padded lengths share a batch.

    Args:
        lengths: The length of each prompt in tokens; at least one.
        max_row_length: The largest padded length, except for prompts that are longer.
        max_new_tokens: The longest answer in tokens.
        on_gpu: Whether the model is on a GPU.
        workers: The processes that share the batches.
    """
    padded = [bucket_length(length, max_row_length) for length in lengths]
    plan: BatchPlan = []
    if on_gpu:
        waiting = sorted(range(len(padded)), key=lambda prompt: -padded[prompt])
        fair_share = max(MIN_ROWS, -(-len(lengths) // workers))
        while waiting:
            longest = padded[waiting[0]]
            rows = min(fair_share, count_rows(GPU_LIMITS, longest, max_new_tokens))
            plan.append((longest, waiting[:rows]))
            waiting = waiting[rows:]
        return plan
    for length in sorted(set(padded)):
        prompts = [prompt for prompt, bucket in enumerate(padded) if bucket == length]
        # Batches of nearly equal size: a small last batch would have fewer than MIN_ROWS rows.
        batch_count = -(-len(prompts) // count_rows(CPU_LIMITS, length, max_new_tokens))
        plan += [(length, part.tolist()) for part in np.array_split(prompts, batch_count)]
    return plan


@dataclass(frozen=True)
class _Generator:
    """A generator of the answers of all lanes to batches of prompts."""

    base_model: BaseModel
    task: Task
    seeds: Sequence[int]
    """The seed of each lane."""
    on_progress: Callable[[], None]

    def generate(self, entries: Sequence[Entry], length: int) -> list[list[str]]:
        """Generate the answers to a batch, with half as many rows at once each time that memory runs out.

        The number that fits is remembered for later batches.

        Args:
            entries: The rows of each lane.
            length: The length that prompts are padded to.

        Returns:
            The answers by lane and entry.
        """
        by_lane: list[list[str]] = [[] for _ in self.seeds]
        tokens_per_entry = len(self.seeds) * (length + self.task.max_new_tokens)
        done, model = 0, self.base_model.model
        while remaining := len(entries) - done:
            fitting = _fitting_tokens.get(model, remaining * tokens_per_entry)
            rows = min(remaining, max(MIN_ROWS, fitting // tokens_per_entry))
            count = -(-remaining // -(-remaining // rows))  # parts of nearly equal size
            try:
                answers = self._generate_at_once(entries[done : done + count], length)
            except Exception as error:
                # Each of two parts needs MIN_ROWS.
                if classify_error(error) is not Fault.MEMORY or count < 2 * MIN_ROWS:
                    raise
                answers = None
            if answers is None:  # outside of the except block, whose error keeps tensors alive
                free_memory()
                _fitting_tokens[model] = -(-count // 2) * tokens_per_entry
                log.warning("out of memory with %d rows of generated answers, now half as many", count)
                continue
            done += count
            for texts, more in zip(by_lane, answers, strict=True):
                texts += more
        return by_lane

    def _generate_at_once(self, entries: Sequence[Entry], length: int) -> list[list[str]]:
        """Return the answers to a batch by lane and entry, with all rows computed together."""
        tokenizer, task, lanes = self.base_model.tokenizer, self.task, len(self.seeds)
        device = self.base_model.device
        # Prompts are padded on the left, so that all answers begin in one column.
        prompts = [prompt for _, prompt, _ in entries]
        padded = torch.tensor([[*[tokenizer.pad_token_id] * (length - len(p)), *p] for p in prompts])
        mask = torch.tensor([[*[0] * (length - len(p)), *[1] * len(p)] for p in prompts])
        padded, mask = padded.repeat(lanes, 1).to(device), mask.repeat(lanes, 1).to(device)
        uniforms = None
        if task.temperature > 0:
            item_samples = [(item, sample) for item, _, sample in entries]
            uniforms = draw_uniform_table(self.seeds, item_samples, task.max_new_tokens).to(device)
        answers = decode_answers(self.base_model, task, padded, mask, lanes, uniforms, self.on_progress)
        texts = [truncate_at_stop(_decode_answer(ids, tokenizer), task.stop) for ids in answers.tolist()]
        return [texts[first : first + len(entries)] for first in range(0, len(texts), len(entries))]


def truncate_at_stop(text: str, stops: Sequence[str]) -> str:
    """Return the text before the first stop string, all of it if there is none."""
    return text[: min((position for stop in stops if (position := text.find(stop)) >= 0), default=len(text))]


def _decode_answer(ids: list[int], tokenizer: Any) -> str:
    end = ids.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids else len(ids)
    return tokenizer.decode(ids[:end], skip_special_tokens=True)


@torch.no_grad()
def decode_answers(
    base_model: BaseModel,
    task: Task,
    prompts: Tensor,
    prompt_mask: Tensor,
    lanes: int,
    uniforms: Tensor | None = None,
    on_progress: Callable[[], None] = lambda: None,
) -> Tensor:
    """Decode the answers to prompts.

    Args:
        base_model: The base model, inside a context that activates the lanes.
        task: The task, which decides the sampling, the stop strings and the length of answers.
        prompts: Token ids, padded on the left, (lanes * rows, length) on the device.
        prompt_mask: 0 at padding, else 1, of the same shape.
        lanes: The number of lanes, whose rows come one lane after another.
        uniforms: The numbers to sample with, (lanes * rows, max_new_tokens) on the device, if the
            temperature is not 0.
        on_progress: Called every `COMPACTION_INTERVAL` tokens.

    Returns:
        Token ids, (lanes * rows, max_new_tokens) on the device. Padding follows an end token, and the first
        check that finds a stop string.
    """
    tokenizer, row_count = base_model.tokenizer, len(prompts)
    answers = prompts.new_full((row_count, task.max_new_tokens), tokenizer.pad_token_id)
    rows = torch.arange(row_count, device=prompts.device)  # the rows of `answers` that are still computed
    ended = torch.zeros(row_count, dtype=torch.bool, device=prompts.device)
    forward = CachedForward(base_model, prompt_mask)
    logits = forward.append(prompts)
    for count in range(1, task.max_new_tokens + 1):
        tokens = _choose_tokens(logits, task, None if uniforms is None else uniforms[rows, count - 1])
        tokens = tokens.masked_fill(ended, tokenizer.pad_token_id)
        answers[rows, count - 1] = tokens
        ended |= tokens == tokenizer.eos_token_id
        if task.stop and count % STOP_CHECK_INTERVAL == 0:
            ended |= _have_stop_string(answers[rows, :count], tokenizer, task.stop)
        if count == task.max_new_tokens or bool(ended.all()):
            break
        if count % COMPACTION_INTERVAL == 0:
            on_progress()
            if (kept := _select_remaining_rows(ended, lanes)) is not None:
                rows, ended, tokens = rows[kept], ended[kept], tokens[kept]
                forward.select_rows(kept)
        logits = forward.append(tokens[:, None])
    return answers


def _select_remaining_rows(ended: Tensor, lanes: int) -> Tensor | None:
    """Select the rows that stay in the batch after some have ended.

    Every lane keeps as many rows as the lane with the most rows that have not ended, at least `MIN_ROWS`. A
    lane with fewer such rows keeps ended ones, because the adapters need an equal number for each lane.

    Args:
        ended: Whether each row has ended, (lanes * rows,), lane by lane.
        lanes: The number of lanes.

    Returns:
        The indices of the rows to keep, lane by lane; None if all rows stay.
    """
    by_lane = ended.view(lanes, -1)
    rows_per_lane = by_lane.shape[1]
    count = max(MIN_ROWS, int((~by_lane).sum(dim=1).max()))
    if count >= rows_per_lane:
        return None
    # The order is stable, and rows that have not ended come first.
    kept = by_lane.to(torch.uint8).argsort(dim=1, stable=True)[:, :count]
    first_rows = torch.arange(0, len(ended), rows_per_lane, device=ended.device)
    return (kept + first_rows[:, None]).flatten()


def _choose_tokens(logits: Tensor, task: Task, uniforms: Tensor | None) -> Tensor:
    """Return the next token of each row, (rows,), from logits, (rows, vocabulary)."""
    if uniforms is None:
        return logits.argmax(dim=-1)
    parts = zip(logits.split(SAMPLED_ROWS), uniforms.split(SAMPLED_ROWS), strict=True)
    return torch.cat([sample_tokens(part, of, task.temperature, task.top_p) for part, of in parts])


def _have_stop_string(answers: Tensor, tokenizer: Any, stops: Sequence[str]) -> Tensor:
    """Return whether each answer has a stop string that ended since the last check, (rows,)."""
    # A token has at least one byte: so many tokens hold any stop string that ended since the last check.
    tail = STOP_CHECK_INTERVAL + max(len(stop.encode()) for stop in stops)
    texts = tokenizer.batch_decode(answers[:, -tail:], skip_special_tokens=True)
    found = [any(stop in text for stop in stops) for text in texts]
    return torch.tensor(found, device=answers.device)


class CachedForward:
    """The forward passes of one batch with a key-value cache: over the prompts, then over each new token.

    Args:
        base_model: The base model, inside a context that activates the lanes.
        mask: 0 at padding on the left of the prompts, else 1, (rows, length).
    """

    def __init__(self, base_model: BaseModel, mask: Tensor) -> None:
        self._model, self._mask = base_model.model, mask
        self._parameters = inspect.signature(type(self._model).forward).parameters
        self._cache: Any = DynamicCache(config=self._model.config)
        self._positions = (mask.cumsum(dim=-1) - 1).masked_fill(mask == 0, 0)

    def append(self, tokens: Tensor) -> Tensor:
        """Append tokens to each row: the prompts at the first call, then one token at a time.

        Args:
            tokens: Token ids, (rows, tokens).

        Returns:
            The logits of the next token, (rows, vocabulary) float32.
        """
        inputs = {"input_ids": tokens, "attention_mask": self._mask, "use_cache": True}
        # transformers 5.20 calls the parameter `past_key_values`, 5.24 calls it `cache`.
        inputs["cache" if "cache" in self._parameters else "past_key_values"] = self._cache
        if "position_ids" in self._parameters:
            inputs["position_ids"] = self._positions
        if "logits_to_keep" in self._parameters:
            inputs["logits_to_keep"] = 1
        logits: Tensor = self._model(**inputs).logits[:, -1].float()
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], dim=1)
        self._positions = self._positions[:, -1:] + 1
        return logits

    def select_rows(self, rows: Tensor) -> None:
        """Keep these rows, given by their indices, and forget the others."""
        self._cache.reorder_cache(rows)
        self._mask, self._positions = self._mask[rows], self._positions[rows]


def draw_uniforms(seed: int, item: int, sample: int, count: int) -> np.ndarray:
    """Draw uniform numbers from [0, 1).

    Args:
        seed: The lane's seed.
        item: The item number.
        sample: The number of the sample of that item.
        count: The number of positions.

    Returns:
        The numbers, (count,), equal for equal arguments; those of a larger count begin with them.
    """
    # RandomState, because numpy promises that its streams never change.
    return np.random.RandomState([seed % 2**32, seed // 2**32, item, sample]).random_sample(count)


def draw_uniform_table(seeds: Sequence[int], item_samples: Sequence[tuple[int, int]], count: int) -> Tensor:
    """Draw the uniform numbers of several lanes.

    Args:
        seeds: The seed of each lane.
        item_samples: The item and sample number of each row of a lane.
        count: The number of positions.

    Returns:
        The numbers, (lanes * rows, count), lane by lane.
    """
    rows = [draw_uniforms(seed, item, sample, count) for seed in seeds for item, sample in item_samples]
    return torch.from_numpy(np.stack(rows))


def sample_tokens(logits: Tensor, uniforms: Tensor, temperature: float, top_p: float = 1.0) -> Tensor:
    """Sample one token per row.

    The cumulative distribution follows the order of the vocabulary, not of probability: rounding could swap
    two nearly equal probabilities, and another token would be sampled.

    Args:
        logits: The model's logits, (rows, vocabulary).
        uniforms: A number from [0, 1) per row, (rows,).
        temperature: Divides the logits.
        top_p: Below 1, sample only from the nucleus: the most probable tokens, up to the one with which their
            total probability reaches `top_p` (Holtzman et al. 2020, arXiv 1904.09751).

    Returns:
        Token ids, (rows,).
    """
    weights = torch.softmax(logits.double() / temperature, dim=-1)
    if top_p < 1.0:
        ordered, sorted_ids = weights.sort(dim=-1, descending=True, stable=True)
        outside_nucleus = ordered.cumsum(dim=-1) - ordered >= top_p
        weights = weights.masked_fill(
            torch.zeros_like(outside_nucleus).scatter_(1, sorted_ids, outside_nucleus), 0.0
        )
    total = weights.cumsum(dim=-1)
    # right=True skips tokens of weight 0. By rounding the index may pass the last token with a weight.
    found = torch.searchsorted(total, uniforms.double()[:, None] * total[:, -1:], right=True).squeeze(1)
    last = torch.where(weights > 0, torch.arange(weights.shape[1], device=weights.device), 0).amax(dim=-1)
    return torch.minimum(found, last)
