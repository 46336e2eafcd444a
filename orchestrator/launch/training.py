"""Training of the pending configurations of a study, on a Ray cluster that is joined or started for it.

Points of a search and later stages of a design are added meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.execution.progress import Progress, format_duration
from orchestrator.execution.ray import autoscaler, runtime
from orchestrator.execution.rungs import submission_order
from orchestrator.execution.settings import Session, TrainerSettings
from orchestrator.finetune.resolve.data_preparation import prepare_datasets
from orchestrator.launch.study_context import StudyContext
from orchestrator.launch.work import SettledRecords, StudyWork, choose_lanes
from orchestrator.record.schema import Record
from orchestrator.record.scratch import scratch_folder
from orchestrator.record.study_file import data_warnings
from orchestrator.record.tracker import StudyEnd
from orchestrator.study.configuration import Configuration
from orchestrator.study.options import StudyOptions
from orchestrator.util import timeouts
from orchestrator.util.errors import UsageError
from orchestrator.util.graceful_interrupts import graceful_interrupts

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
        assert design is not None
        reason = design.explain(named, SettledRecords(store, self.context.options.scheduler))
        return f"next stage: {count}{f': {reason}' if reason else ''}"

    def _count_unnamed_steps(self) -> int:
        return sum(c.lr_schedule.steps for c in self.work.unnamed(self.context.templates))


def train_pending(
    context: StudyContext,
    work: StudyWork,
    progress: Progress,
    writers: TrackerWriters,
    on_record: Callable[[Record], None],
    on_configuration: Callable[[Configuration, bool], None],
) -> None:
    """Train the pending configurations of a study, and those that its search or its design adds meanwhile.

    Args:
        context: The run.
        work: The configurations to train.
        progress: Shows the progress of the training.
        writers: Log to MLflow and other trackers. They are closed early if a signal ends the start of Ray.
        on_record: Called with every new record, from another thread.
        on_configuration: Called with every added configuration, and True if the store has its result already.

    Raises:
        KeyboardInterrupt: The run was interrupted; the lanes have saved checkpoints.
        StudyError: The cluster cannot train, or no trainer could be started.
        UsageError: The options do not fit the cluster that was joined.
    """
    num_requested = len(work.requested)  # The search and later stages append to `requested`.
    later = LaterConfigurations(context, work, writers, progress, on_configuration)

    def close_writer() -> None:
        writers.close(StudyEnd("KILLED"), timeouts.INTERRUPT_MLFLOW_FLUSH_SECONDS)

    if work.search is not None:
        work.search.on_point = later.add
    with (
        progress,
        scratch_folder(context.store) as scratch,
        runtime.connect(close_writer) as cluster,
        graceful_interrupts(context.budget.request_stop),
    ):
        session = _make_session(context, work, cluster, scratch, progress, writers, on_record)
        for warning in data_warnings(context.sources()):
            progress.notify(f"! {warning}")
        progress.notify(_describe_trainers(session))
        began = time.monotonic()
        steps = _run_session(context, work, session, later.next_stage)
        used = f", {context.budget.format_usage()}" if context.budget.gpus_per_trainer else ""
        progress.notify(f"{progress.describe_ended(time.monotonic() - began)}{used}")
        if progress.first_lane_at is not None:
            wait = format_duration(progress.first_lane_at - began)
            progress.notify(f"the first lane trained after {wait} of this time")
        named_later = [c for c in work.requested[num_requested:] if c.fingerprint not in later.reused]
        max_steps = sum(c.lr_schedule.steps for c in [*work.pending, *named_later])
        progress.notify(f"{steps} optimizer steps of {max_steps} for all configurations to the end")
    if context.budget.is_interrupted:
        raise KeyboardInterrupt


def _make_session(
    context: StudyContext,
    work: StudyWork,
    cluster: runtime.Cluster,
    scratch: Path,
    progress: Progress,
    writers: TrackerWriters,
    on_record: Callable[[Record], None],
) -> Session:
    """Check the cluster, and determine the number of trainers and their settings."""
    from orchestrator.cluster.check import require_usable_cluster

    store, node_types = context.store, autoscaler.startable_node_types(cluster)
    options = autoscaler.adapt_to_cluster(context.options, cluster, context.templates, node_types)
    require_usable_cluster(cluster, store.root)
    num_trainers, gpus_per_worker = cluster.plan_trainers(
        options.trainers, options.gpus_per_worker, options.workers_per_trainer
    )
    context.budget.set_gpus_per_trainer(gpus_per_worker * options.workers_per_trainer)
    max_lanes, is_measured = choose_lanes(
        options, gpus_per_worker, [*context.templates, *work.pending], work.num_per_trainer(num_trainers)
    )
    shared = StudyOptions(**{each.name: getattr(options, each.name) for each in fields(StudyOptions)})
    settings = TrainerSettings(shared, max_lanes, gpus_per_worker, store.root, scratch, is_measured)
    if options.kernels == "liger" and not settings.uses_gpus:
        raise UsageError("--kernels liger: the trainers of this study have no GPU; take --kernels torch.")
    new_workers = autoscaler.worker_capacity(node_types, gpus_per_worker) or 0
    return Session(
        trainers=settings,
        num_trainers=min(num_trainers, work.num_to_train),
        cluster=cluster,
        store=store,
        progress=progress,
        budget=context.budget,
        autoscaler_capacity=new_workers // options.workers_per_trainer,
        autoscaler_memory=sum(each.max_nodes * each.node.memory for each in node_types if each.node),
        on_record=on_record,
        on_progress=writers.put_progress,
        cached={c.fingerprint for c in work.satisfied},
        tune_per_seed=context.experiment.settings.kind == "replicates",
    )


def _describe_trainers(session: Session) -> str:
    """Return one line that describes the cluster and the trainers."""
    cluster, settings = session.cluster, session.trainers
    where = "Ray started here" if cluster.local else f"joined Ray, {len(cluster.nodes)} nodes"
    gpus = settings.gpus_per_worker * settings.options.workers_per_trainer
    each = f", {gpus:g} GPUs each" if gpus else ""
    lanes = f"{'up to ' if settings.measures_lanes else ''}{settings.max_lanes} lanes"
    return f"{where}: {session.num_trainers} trainers of {lanes}{each}"


def _run_session(
    context: StudyContext,
    work: StudyWork,
    session: Session,
    next_stage: Callable[[], Sequence[Configuration]],
) -> int:
    """Run Ray Tune until all configurations have ended or a limit is reached.

    Args:
        context: The run.
        work: The configurations to train.
        session: The cluster, the trainers and the callbacks.
        next_stage: Returns the configurations of the next stage; an empty list ends the study.

    Returns:
        Number of optimizer steps of all trainers.
    """
    # Imported after `connect`, which sets the environment variables that Tune reads when it is imported.
    from orchestrator.execution.session import train

    scheduler, lanes = session.scheduler, session.trainers.expected_lanes
    searcher = None
    if work.search is not None:
        from orchestrator.execution.search.searcher import PerGroupSearcher

        searcher = PerGroupSearcher(work.search, context.store, scheduler, lanes, session.cached)

    def order(known: Sequence[Configuration], pending: Sequence[Configuration]) -> list[Configuration]:
        return submission_order(scheduler, known, pending, lanes, session.num_trainers)

    return train(session, order(work.satisfied, work.pending), searcher, lambda: order((), next_stage()))
