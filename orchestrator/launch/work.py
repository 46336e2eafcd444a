"""What a study asks for, and how much of it is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from orchestrator.execution.search.budget import Ledger
from orchestrator.execution.search.samplers import Build
from orchestrator.execution.tune.rungs import settings
from orchestrator.finetune import resolve
from orchestrator.launch.plan import LANES
from orchestrator.record.schema import FAILURES_ALLOWED
from orchestrator.record.store import Store
from orchestrator.study.configuration import Configuration
from orchestrator.study.grid import order_of_entry
from orchestrator.study.options import StudyOptions
from orchestrator.study.space import Value, applied


@dataclass(frozen=True)
class Asked:
    """What the study asks for: `wanted`, of which some are `met` by records, `hopeless` (their fingerprints)
    or `pending`; and what its `search` will ask for besides."""

    wanted: list[Configuration]
    met: list[Configuration]
    hopeless: list[str]
    pending: list[Configuration]
    search: Ledger | None

    @classmethod
    def found(
        cls, wanted: Sequence[Configuration], search: Ledger | None, store: Store, options: StudyOptions
    ) -> Asked:
        if options.retry_failed and not options.plan:
            for configuration in wanted:
                store.forget_failures(configuration.fingerprint)
        hopeless = [c.fingerprint for c in wanted if store.failures(c.fingerprint) >= FAILURES_ALLOWED]
        met = [c for c in wanted if store.meets(c.fingerprint, settings(options.scheduler, c))]
        known = {*hopeless, *(c.fingerprint for c in met)}
        new = [c for c in wanted if c.fingerprint not in known]
        return cls(list(wanted), met, hopeless, order_of_entry(new, options.lanes_per_seat or LANES), search)

    @property
    def total(self) -> int:
        return self.search.total if self.search else len(self.wanted)

    @property
    def new(self) -> int:
        """How many are to be trained, as far as can be said now."""
        return len(self.pending) + self.total - len(self.wanted)


def builder(templates: Sequence[Configuration]) -> Build:
    """A search's points: trained once, with the first seed."""
    by_name = {template.variant.name: template for template in templates}

    def build(variant: str, values: Mapping[str, Value]) -> Configuration | None:
        configuration = replace(applied(by_name[variant], values), seed=0)
        return None if resolve.refusal(configuration) else configuration

    return build
