"""The configurations of a study, divided into those with a result in the store and those to train.

A design reads the results of those that have ended in `SettledRecords`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from typing import TYPE_CHECKING

from orchestrator.execution.rungs import scheduler_settings
from orchestrator.record.schema import MAX_FAILURES, Record
from orchestrator.record.store import Store
from orchestrator.study.configuration import Configuration
from orchestrator.study.options import (
    DEFAULT_LANES_PER_TRAINER,
    MAX_MEASURED_LANES,
    SHORT_LANES_PER_TRAINER,
    StudyOptions,
)

if TYPE_CHECKING:
    from orchestrator.execution.search.budget import SearchBudget

SHORT_LANE_TOKENS = 256
"""Largest number of tokens in a micro-batch of one lane for which a trainer on a CPU has 8 lanes. `letters`,
with 208 tokens, trains faster with 8 lanes than with 4; lanes of more tokens were not measured."""


@dataclass
class StudyWork:
    """The configurations of a study: those with a result, and those to train.

    `requested` and `expected` change when a search or a design adds configurations during the training.
    """

    requested: list[Configuration]
    """All configurations of the study so far."""
    satisfied: list[Configuration]
    """Configurations whose result was in the store at the start of this run."""
    retries_exhausted: list[str]
    """Fingerprints of the configurations that failed too often to be tried again."""
    pending: list[Configuration]
    """Configurations to train."""
    search: SearchBudget | None
    """The search that samples further configurations; None for a design."""
    expected: int = 0
    """Expected number of configurations of all stages of the design; 0 after the last stage."""

    @classmethod
    def from_store(
        cls,
        requested: Sequence[Configuration],
        search: SearchBudget | None,
        store: Store,
        options: StudyOptions,
        expected: int = 0,
    ) -> StudyWork:
        """Divide `requested` by the records in `store`: usable, failed too often, or to be trained.

        Args:
            requested: Configurations of the study so far.
            search: The search that samples further configurations; None for a design.
            store: The records. With --retry-failed and without --plan their counts of failures are reset for
                `requested`.
            options: Options of the study.
            expected: Expected number of configurations of all stages of the design.

        Returns:
            The work of this run.
        """
        if options.retry_failed and not options.plan:
            for configuration in requested:
                store.reset_failures(configuration.fingerprint)
        retries_exhausted = [
            c.fingerprint for c in requested if store.count_failures(c.fingerprint) >= MAX_FAILURES
        ]
        satisfied = [
            c
            for c in requested
            if store.get_reusable(c.fingerprint, scheduler_settings(options.scheduler, c))
        ]
        cached = {*retries_exhausted, *(c.fingerprint for c in satisfied)}
        new = [c for c in requested if c.fingerprint not in cached]
        return cls(
            list(requested),
            satisfied,
            retries_exhausted,
            new,
            search,
            expected if new else 0,
        )

    @property
    def total(self) -> int:
        """Number of configurations, including those that are not sampled or requested yet."""
        return self.search.total if self.search else max(len(self.requested), self.expected)

    @property
    def num_to_train(self) -> int:
        """Number of configurations to train, including those that are not sampled or requested yet."""
        return len(self.pending) + self.total - len(self.requested)

    def unnamed(self, templates: Sequence[Configuration]) -> list[Configuration]:
        """Return one template for each configuration that the search or the design has not named yet.

        Args:
            templates: One configuration per task and variant.
        """
        if self.search is None:
            return [
                template for template, _ in zip(cycle(templates), range(self.total - len(self.requested)))
            ]
        return [
            group.template
            for name, group in self.search.groups.items()
            for _ in range(self.search.num_remaining(name))
        ]

    def max_steps(self, templates: Sequence[Configuration]) -> int:
        """Return the optimizer steps of `pending` and `unnamed`, if no lane ends early."""
        return sum(c.lr_schedule.steps for c in [*self.pending, *self.unnamed(templates)])

    def num_per_trainer(self, num_trainers: int) -> int:
        """Return `num_to_train` divided by the number of trainers, rounded up; 0 trainers count as one."""
        return -(-self.num_to_train // max(1, num_trainers))


def choose_lanes(
    options: StudyOptions,
    gpus_per_worker: float,
    configurations: Sequence[Configuration],
    num_per_trainer: int,
) -> tuple[int, bool]:
    """Return the largest number of lanes of a trainer, and whether trainers choose the number by measurement.

    Args:
        options: Options of the study.
        gpus_per_worker: GPUs of each worker.
        configurations: The configurations of the study, whose micro-batches may differ in size.
        num_per_trainer: Number of configurations to train for each trainer, rounded up. With more lanes than
            this, one trainer would train the lanes of others.
    """
    if options.lanes_per_trainer is not None:
        return options.lanes_per_trainer, False
    if gpus_per_worker > 0 and options.device != "cpu":
        return MAX_MEASURED_LANES, True
    # A search and early stopping decide by the results of other lanes, so fewer should train at once.
    is_plain_grid = options.search == "grid" and options.scheduler == "none"
    lanes = DEFAULT_LANES_PER_TRAINER
    if is_plain_grid and all(map(_is_short, configurations)):
        lanes = max(lanes, min(SHORT_LANES_PER_TRAINER, num_per_trainer))
    return lanes, False


def _is_short(configuration: Configuration) -> bool:
    tokens = configuration.batches.batch_size * configuration.batches.max_length
    return 0 < tokens <= SHORT_LANE_TOKENS  # `max_length` is 0 for images


class SettledRecords(Mapping[str, Record]):
    """Fingerprint -> record of a configuration that the study does not train any further.

    Such a configuration has finished, diverged, been stopped by the study's own early stopping, or failed too
    often to be tried again. Each record is read at its first use. It is kept without its curve and its
    results per item, which take most of the memory and which no design uses. Iteration and length cover all
    records of the store, also those that are not settled; no design uses them.

    Args:
        store: The records.
        scheduler: Early stopping of the study, or "none".
    """

    def __init__(self, store: Store, scheduler: str) -> None:
        self._store, self._scheduler = store, scheduler
        self._settled: dict[str, Record] = {}

    def __getitem__(self, fingerprint: str) -> Record:
        if fingerprint not in self._settled:
            self._settled[fingerprint] = replace(self._read(fingerprint), curve=(), items={})
        return self._settled[fingerprint]

    def _read(self, fingerprint: str) -> Record:
        record = self._store.get(fingerprint)
        if record is None:
            raise KeyError(fingerprint)
        if record.state == "failed":
            if self._store.count_failures(fingerprint) < MAX_FAILURES:
                raise KeyError(fingerprint)
            return record
        settings = scheduler_settings(self._scheduler, record.configuration)
        usable = self._store.get_reusable(fingerprint, settings)
        if usable is None:
            raise KeyError(fingerprint)
        return usable

    def __iter__(self) -> Iterator[str]:
        return iter(self._store.states())

    def __len__(self) -> int:
        return len(self._store.states())
