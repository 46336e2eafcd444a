"""The micro-batches of an optimizer step.

The rows of a step are sorted by length before they are cut into micro-batches, so that a micro-batch holds
rows of nearly equal length and little padding. Micro-batches of long rows have fewer rows than those of short
rows, so that all have about the same number of tokens and take about the same memory and time. The loss of a
step is divided by the number of targets in all its rows, so sorting and unequal row counts do not change the
objective. The micro-batches of a step depend only on the lane's seed, the step, the batch sizes and the
training rows; they do not depend on the lane group, the workers or earlier calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from typing import NamedTuple

from orchestrator.finetune.data.batches import Batch, Row, bucket_length, pad_rows, shuffled_indices
from orchestrator.finetune.tasks.base import IGNORE_INDEX
from orchestrator.study.configuration import BatchConfig

SAMPLED_ROWS = 1024
"""Approximate number of training rows whose lengths decide the sizes of micro-batches."""


class StepKey(NamedTuple):
    """The values that decide the rows of a step. Lanes with equal keys share their batches."""

    seed: int
    step: int
    """Number of optimizer steps that the lane has taken before this one."""
    batches: BatchConfig


class Share(NamedTuple):
    """The rows of a micro-batch that a worker computes."""

    micro_batch: int
    """The number of the micro-batch within its step."""
    first_row: int
    last_row: int
    """The row after the last one of the share."""
    row_count: int
    """The number of rows of the whole micro-batch."""


@dataclass(frozen=True)
class StepBatches:
    """A worker's part of the rows of one optimizer step of a lane."""

    batches: tuple[Batch, ...]
    """One batch for each of the worker's shares, padded to the bucket of the micro-batch's longest row."""
    target_count: int
    """The number of targets of the step on all workers."""


def plan_row_counts(lengths: Sequence[int], batches: BatchConfig) -> tuple[int, ...]:
    """Return the number of rows in each micro-batch of a step, the micro-batch with the longest rows first.

    The numbers are the same for all steps and lanes, so that lanes can be computed together. They minimize
    the tokens of the largest micro-batch, padding included, in a step whose sorted rows have quantiles of
    `lengths` as their lengths.

    Args:
        lengths: Padded lengths of training rows, at least one.
        batches: The number of micro-batches, and their mean number of rows.
    """
    count, total = batches.accumulation, batches.accumulation * batches.batch_size
    descending = sorted((max(1, length) for length in lengths), reverse=True)
    expected = [descending[(2 * i + 1) * len(descending) // (2 * total)] for i in range(total)]
    for limit in sorted({length * rows for length in set(expected) for rows in range(1, total + 1)}):
        counts: list[int] = []
        for left in range(count, 0, -1):  # micro-batches that are still to be filled
            first = sum(counts)
            # Each later micro-batch needs a row.
            counts.append(min(max(1, limit // expected[min(first, total - 1)]), total - first - (left - 1)))
        if sum(counts) == total and max(map(mul, counts, _first_of(expected, counts))) <= limit:
            return tuple(counts)
    raise AssertionError("the largest limit allows all rows of a step in one micro-batch")


def _first_of(values: Sequence[int], counts: Sequence[int]) -> list[int]:
    """Return the first value of each of consecutive groups with these sizes."""
    return [values[sum(counts[:index])] for index in range(len(counts))]


def assign_rows(counts: Sequence[int], rank: int, world_size: int) -> list[Share]:
    """Return the shares of a worker in every step.

    Worker r gets the whole micro-batches r, r + W, .... The rows of a micro-batch are split only if there are
    fewer micro-batches than workers, because a pass over few rows takes nearly as long as one over many. The
    workers' numbers of rows then differ by one at most.

    Args:
        counts: The number of rows of each micro-batch.
        rank: The worker.
        world_size: W, the number of workers; at most the number of rows in a step.
    """
    if len(counts) >= world_size:
        return [
            Share(number, 0, counts[number], counts[number])
            for number in range(rank, len(counts), world_size)
        ]
    total = sum(counts)
    first, last = total * rank // world_size, total * (rank + 1) // world_size
    shares, start = [], 0
    for number, rows in enumerate(counts):
        own = range(max(first, start) - start, min(last, start + rows) - start)
        if own:
            shares.append(Share(number, own.start, own.stop, rows))
        start += rows
    return shares


class StepBatchLoader:
    """A loader of the padded batches of optimizer steps.

    Args:
        rows: The training rows.
        max_row_length: The largest padded length, as `compute_max_row_length` returns it.
        pad_token_id: The id of the padding token.
        worker: The rank of this worker in its trainer, and the number of workers.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        max_row_length: int,
        pad_token_id: int,
        worker: tuple[int, int] = (0, 1),
    ) -> None:
        self._rows, self._max_row_length, self._pad_token_id = rows, max_row_length, pad_token_id
        self._worker = worker
        self._prepared: dict[StepKey, StepBatches] = {}
        self._row_counts: dict[BatchConfig, tuple[int, ...]] = {}

    def row_counts(self, batches: BatchConfig) -> tuple[int, ...]:
        """Return the number of rows in each micro-batch of a step; see `plan_row_counts`."""
        if batches not in self._row_counts:
            stride = -(-len(self._rows) // SAMPLED_ROWS)
            sampled = (self._rows[number] for number in range(0, len(self._rows), stride))
            lengths = [bucket_length(len(row.ids), self._max_row_length) for row in sampled]
            self._row_counts[batches] = plan_row_counts(lengths, batches)
        return self._row_counts[batches]

    def shares(self, batches: BatchConfig) -> list[Share]:
        """Return the shares of this worker in every step."""
        return assign_rows(self.row_counts(batches), *self._worker)

    def load(self, wanted: Sequence[StepKey]) -> list[StepBatches]:
        """Return the batches of steps. They do not depend on what was prepared."""
        loaded: dict[StepKey, StepBatches] = {}
        for key in wanted:
            if key not in loaded:
                loaded[key] = self._prepared.get(key) or self._make(key)
        return [loaded[key] for key in wanted]

    def prepare(self, upcoming: Sequence[StepKey]) -> list[StepBatches]:
        """Return the batches of the steps that will be loaded next, and keep only these."""
        made = self.load(upcoming)
        self._prepared = dict(zip(upcoming, made, strict=True))
        return made

    def _make(self, key: StepKey) -> StepBatches:
        """Build this worker's batches of one step."""
        size, count = key.batches.batch_size, key.batches.accumulation
        numbers = shuffled_indices(key.seed, len(self._rows), key.step * size * count, size * count)
        # The longest first: a step that does not fit the memory then fails in its first micro-batch.
        drawn = sorted((self._rows[number] for number in numbers), key=lambda row: -len(row.ids))
        starts = [0, *accumulate(self.row_counts(key.batches))]
        made = []
        for share in self.shares(key.batches):
            start = starts[share.micro_batch]
            length = bucket_length(len(drawn[start].ids), self._max_row_length)
            own = drawn[start + share.first_row : start + share.last_row]
            made.append(pad_rows(own, length, self._pad_token_id))
        target_count = sum(len(row.targets) - row.targets.count(IGNORE_INDEX) for row in drawn)
        return StepBatches(tuple(made), target_count)
