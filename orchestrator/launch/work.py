"""What a study asks for, and how much of it is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from orchestrator.execution.search.budget import SearchBudget
from orchestrator.execution.search.samplers import BuildConfiguration
from orchestrator.execution.tune.rungs import scheduler_settings
from orchestrator.finetune import resolve
from orchestrator.launch.plan import DEFAULT_LANES_PER_TRAINER
from orchestrator.record.schema import MAX_FAILURES
from orchestrator.record.store import Store
from orchestrator.study.configuration import Configuration
from orchestrator.study.grid import training_order
from orchestrator.study.options import StudyOptions
from orchestrator.study.space import Value, apply_values


@dataclass(frozen=True)
class StudyWork:
    """What the study asks for: `wanted`, of which some are `met` by records, `hopeless` (their fingerprints)
    or `pending`; and what its `search` will ask for besides."""

    requested: list[Configuration]
    satisfied: list[Configuration]
    retries_exhausted: list[str]
    pending: list[Configuration]
    search: SearchBudget | None

    @classmethod
    def from_store(
        cls,
        requested: Sequence[Configuration],
        search: SearchBudget | None,
        store: Store,
        options: StudyOptions,
    ) -> StudyWork:
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
            training_order(new, options.lanes_per_trainer or DEFAULT_LANES_PER_TRAINER),
            search,
        )

    @property
    def total(self) -> int:
        return self.search.total if self.search else len(self.requested)

    @property
    def num_to_train(self) -> int:
        """How many are to be trained, as far as can be said now."""
        return len(self.pending) + self.total - len(self.requested)


def point_builder(templates: Sequence[Configuration]) -> BuildConfiguration:
    """A search's points: trained once, with the first seed."""
    by_name = {template.variant.name: template for template in templates}

    def build(variant: str, values: Mapping[str, Value]) -> Configuration | None:
        configuration = replace(apply_values(by_name[variant], values), seed=0)
        return None if resolve.find_settings_error(configuration) else configuration

    return build
