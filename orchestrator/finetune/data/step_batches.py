"""The micro-batches of an optimizer step, made one step ahead in a thread.

The rows of a step are sorted by length before they are cut into micro-batches, so that a micro-batch holds
rows of nearly equal length and little padding. The loss of a step is divided by the targets of all its rows,
so the order of rows changes no sum. What a step holds depends on the lane's seed, the step and the batch
sizes alone, not on the lane group, on the workers, or on what was made before.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

from orchestrator.finetune.data.batches import Batch, Row, bucket_length, pad_rows, shuffled_indices
from orchestrator.finetune.tasks.base import IGNORE_INDEX
from orchestrator.study.configuration import BatchConfig


class StepKey(NamedTuple):
    """What decides the rows of a step. Lanes with equal keys share their batches."""

    seed: int
    step: int
    """The optimizer steps that the lane has taken before."""
    batches: BatchConfig


class Share(NamedTuple):
    """The rows of a micro-batch that a worker computes."""

    micro_batch: int
    """The number of the micro-batch within its step."""
    first_row: int
    last_row: int
    """The row after the share's last one."""


@dataclass(frozen=True)
class StepBatches:
    """A worker's part of the rows of one optimizer step of a lane."""

    batches: tuple[Batch, ...]
    """One batch for each of the worker's shares, padded to the longest row of the whole micro-batch."""
    target_count: int
    """The number of targets of the step on all workers."""


def assign_rows(batches: BatchConfig, rank: int, world_size: int) -> list[Share]:
    """Return the shares of a worker in every step.

    Workers get whole micro-batches: worker r gets r, r + W, .... Only where there are fewer micro-batches
    than workers are the rows of a micro-batch split, because a pass over few rows takes nearly as long as one
    over many.

    Args:
        batches: The number and size of micro-batches.
        rank: The worker.
        world_size: W, the number of workers; at most the number of rows in a step.
    """
    count, rows = batches.accumulation_steps, batches.micro_batch_size
    if count >= world_size:
        return [Share(micro_batch, 0, rows) for micro_batch in range(rank, count, world_size)]
    micro_batch, part = rank % count, rank // count
    parts = len(range(micro_batch, world_size, count))
    return [Share(micro_batch, rows * part // parts, rows * (part + 1) // parts)]


class StepBatchLoader:
    """Makes the batches of steps, and those of the next steps in a thread.

    Args:
        rows: The training rows.
        max_row_length: The largest padded length, as `compute_max_row_length` returns it.
        pad_token_id: The id of the padding token.
        worker: The rank of this worker, and the number of workers.
        ahead: Whether a thread makes the batches of the next steps.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        max_row_length: int,
        pad_token_id: int,
        worker: tuple[int, int] = (0, 1),
        ahead: bool = False,
    ) -> None:
        self._rows, self._max_row_length, self._pad_token_id = rows, max_row_length, pad_token_id
        self._worker = worker
        self._thread = ThreadPoolExecutor(1, "batches") if ahead else None
        self._upcoming: dict[StepKey, Future[StepBatches]] = {}

    def load(self, wanted: Sequence[StepKey], upcoming: Sequence[StepKey] = ()) -> list[StepBatches]:
        """Return the batches of steps. An error of the thread is raised here.

        Args:
            wanted: The steps.
            upcoming: The steps that the next call will probably want. They are only ever made earlier: a
                call gets the same batches whatever the calls before have asked for.
        """
        loaded: dict[StepKey, StepBatches] = {}
        for key in wanted:
            if key not in loaded:
                future = self._upcoming.pop(key, None)
                loaded[key] = self._make(key) if future is None else future.result()
        if self._thread is not None:
            before, self._upcoming = self._upcoming, {}
            for key in upcoming:
                if key not in self._upcoming:
                    self._upcoming[key] = before.get(key) or self._thread.submit(self._make, key)
        return [loaded[key] for key in wanted]

    def _make(self, key: StepKey) -> StepBatches:
        size, count = key.batches.micro_batch_size, key.batches.accumulation_steps
        numbers = shuffled_indices(key.seed, len(self._rows), key.step * size * count, size * count)
        # The longest first: a step that does not fit the memory then fails in its first micro-batch.
        drawn = sorted((self._rows[number] for number in numbers), key=lambda row: -len(row.ids))
        made = []
        for share in assign_rows(key.batches, *self._worker):
            micro_batch = drawn[share.micro_batch * size : (share.micro_batch + 1) * size]
            length = bucket_length(len(micro_batch[0].ids), self._max_row_length)
            made.append(pad_rows(micro_batch[share.first_row : share.last_row], length, self._pad_token_id))
        target_count = sum(len(row.targets) - row.targets.count(IGNORE_INDEX) for row in drawn)
        return StepBatches(tuple(made), target_count)
