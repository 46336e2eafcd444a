"""Configurations that are added during training: points of a search and later stages of a design."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from orchestrator.execution.progress import Progress
from orchestrator.finetune.resolve.data_preparation import prepare_datasets
from orchestrator.launch.designs.widening_grid import WideningGrid
from orchestrator.launch.settled_records import SettledRecords
from orchestrator.launch.study_context import StudyContext
from orchestrator.launch.work import StudyWork
from orchestrator.study.configuration import Configuration

if TYPE_CHECKING:
    from orchestrator.record.tracker import TrackerWriters


@dataclass
class LaterConfigurations:
    """Registration of the configurations that are added after the training has started."""

    context: StudyContext
    work: StudyWork
    writers: TrackerWriters
    progress: Progress
    on_configuration: Callable[[Configuration, bool], None]
    """Called with every added configuration, and with True if the store has its result already."""
    reused: set[str] = field(default_factory=set)
    """Fingerprints of the added configurations whose result the store had already."""

    def add(self, configuration: Configuration) -> None:
        """Register an added configuration."""
        is_reused = self.context.has_result(configuration)
        if is_reused:
            self.reused.add(configuration.fingerprint)
            self.writers.mark_reused(configuration.fingerprint)
            self.progress.cached += 1
            if self.work.search is not None:  # a stage of a design is counted when it is complete
                self.progress.max_steps -= configuration.lr_schedule.steps
        self.on_configuration(configuration, is_reused)

    def next_stage(self) -> list[Configuration]:
        """Return the configurations of the design's next stage that have no result.

        A stage whose configurations all have results is registered and skipped. All earlier configurations
        must have ended.

        Returns:
            The configurations to train; an empty list ends the study.
        """
        while not self.context.budget.stop_reason:
            named = self.context.request_next_stage(self.work)
            if not named:
                self.work.expected = 0
                break
            unnamed = self._count_unnamed_steps()
            for configuration in named:
                self.add(configuration)
            self.progress.total = self.work.total
            new = [c for c in named if c.fingerprint not in self.reused]
            named_steps = sum(c.lr_schedule.steps for c in new)
            self.progress.max_steps += named_steps + self._count_unnamed_steps() - unnamed
            if new:
                known = len(named) - len(new)
                self.progress.notify(self._describe_stage(named, known))
                store = self.context.store
                prepare_datasets(new, store.bases, store.data, self.progress.notify)
                return new
        return []

    def _describe_stage(self, named: Sequence[Configuration], num_known: int) -> str:
        """Return a line that says how many configurations a stage has, and why they are trained."""
        count = f"{len(named)} configurations more" + (f", {num_known} of them known" if num_known else "")
        design, store = self.context.design, self.context.store
        if not isinstance(design, WideningGrid):
            return f"next stage: {count}"
        reason = design.explain(named, SettledRecords(store, self.context.options.scheduler))
        rates = ", ".join(f"{rate:g}" for rate in sorted({c.optimizer.learning_rate for c in named}))
        return f"next stage: {reason}: {count} at {rates} (--widen 0 leaves them out)"

    def _count_unnamed_steps(self) -> int:
        return sum(c.lr_schedule.steps for c in self.work.unnamed(self.context.templates))
