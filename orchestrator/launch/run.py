"""A run of a study, from its options to its report: the function that every experiment calls.

`study.resolve_study` checks the options and finds what is to do, `plan.print_plan` prints it (--plan), `Run`
trains it on Ray, and `reporting` writes the report.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.execution import ray_cluster
from orchestrator.execution.progress import Progress, format_duration
from orchestrator.execution.settings import Session, TrainerSettings, shared_options
from orchestrator.finetune.models import catalogue as model_catalogue
from orchestrator.finetune.resolve.data import prepare_datasets, report_data, write_own_files
from orchestrator.launch import reporting
from orchestrator.launch.earlier_runs import (
    drop_abandoned,
    drop_replaced,
    find_sources,
    fix_settings,
    keep_only,
    refuse_other_runs,
)
from orchestrator.launch.experiment import Experiment
from orchestrator.launch.plan import Plan, print_plan
from orchestrator.launch.study import Study, resolve_study
from orchestrator.record.mlflow import MlflowTracker, configured_uri
from orchestrator.record.schema import Record, current_commit
from orchestrator.record.study_file import LOCK_FILE, StudyFile, data_warnings, lanes_of_others
from orchestrator.record.tracker import TrackerWriter, TrackerWriters
from orchestrator.study.config import write_config
from orchestrator.study.configuration import Configuration
from orchestrator.study.options import (
    DEFAULT_LANES_PER_TRAINER,
    MAX_AUTOMATIC_LANES,
    SHORT_LANES_PER_TRAINER,
    StudyOptions,
)
from orchestrator.util import atomic_files
from orchestrator.util.command import graceful_interrupts
from orchestrator.util.errors import UsageError
from orchestrator.util.redaction import redact_secrets

if TYPE_CHECKING:
    from orchestrator.analyze.results import Results

SHORT_LANE_TOKENS = 256
"""Largest number of tokens in a micro-batch of one lane for which a trainer on a CPU has 8 lanes. `letters`,
with 208 tokens, trains faster with 8 lanes than with 4; lanes of more tokens were not measured."""


@dataclass(frozen=True)
class StudyResult:
    """How a run has ended."""

    exit_code: int
    """0 if all configurations have a result, and after --plan; 3 if a limit ended the run before; else 1."""
    folder: Path
    """The folder of the study, with report.html."""
    options: StudyOptions
    """The options of the run, with all defaults filled in."""
    plan: Plan | None = None
    """What was printed by --plan."""

    def load(self) -> Results:
        """Load the results as pandas frames.

        Raises:
            UsageError: The study has no results.
        """
        from orchestrator.analyze import analysis

        options = self.options
        return analysis.load(self.folder.name, output=options.output, store=options.store_folder)


def run_study(experiment: Experiment, options: StudyOptions, command: str = "") -> StudyResult:
    """Train the configurations that have no result yet, log them to MLflow and write the report.

    Args:
        experiment: The experiment.
        options: The options as they were given.
        command: The shell command that runs this again; empty for one that names study.yaml.

    Raises:
        UsageError: The value of an option is wrong. Nothing was trained.
        StudyError: Something outside the command failed, for example the cluster.
        KeyboardInterrupt: The run was interrupted. Unfinished lanes keep their checkpoints.
        OSError: A file could not be written.
    """
    after = None if options.plan else UsageError
    with atomic_files.remove_created_folders(options.output, options.store_folder, after=after):
        study = resolve_study(experiment, options, command)
        study.look_up()
        if options.only:
            keep_only(study)
        if study.num_to_train and not options.plan:
            ray_cluster.check_start()
    if options.plan:
        drop_replaced(study)  # prints what would leave the study; the result is not used
        return StudyResult(0, study.folder, study.options, print_plan(study))
    atomic_files.make_folder(f"--study {study.name!r}", study.folder)
    refusal = f"study {study.name!r} is running already in {study.folder}; wait, or take another --study."
    with (
        ray_cluster.exclusive_lock(study.folder / LOCK_FILE, refusal),
        atomic_files.report_unwritable_folders(study.folder, study.store.root),
    ):
        _begin(study)
        if study.num_to_train or not reporting.print_known_end(study):
            Run(study).execute()
        if study.search is not None:
            for name, group in study.search.groups.items():
                if (points := group.num_asked + group.num_remaining) < group.points:
                    study.console.print(f"{name}: {points} points, its space has no more")
        return StudyResult(reporting.print_missing_results(study), study.folder, study.options)


def _begin(study: Study) -> None:
    """Look up what this run trains, prepare its datasets and write `study.json` and study.yaml."""
    options, store = study.options, study.store
    earlier = StudyFile.read(study.folder)  # again, because another command may have run the study until now
    study.file = earlier or study.file
    study.file = drop_replaced(study)
    store.remove_stale_scratch()
    if options.retry_failed:
        for configuration in study.requested:
            store.reset_failures(configuration.fingerprint)
    study.look_up()
    study.file = replace(study.file, settings=fix_settings(study))
    if study.file.settings.kind == "replicates" and not options.only:
        refuse_other_runs(study)
    write_own_files(study.templates, store.data)  # also for `export`, if nothing is trained
    if study.num_to_train:
        to_prepare = [*study.templates, *study.pending]
        prepare_datasets(to_prepare, store.bases, store.data, study.console.print)
        report_data(to_prepare, store.bases, study.console.print, options.max_length is not None)
    if study.search is not None:
        study.search.begin(study.settled)
    if not options.only:
        study.file = drop_abandoned(study)
    requested, known = [c.fingerprint for c in study.requested], study.known_fingerprints()
    continues = bool(options.only) and earlier is not None  # the study's own command stays
    study.file = replace(
        study.file.with_configurations(requested, known),
        command=study.file.command if continues else study.command,
        tracking_uri=redact_secrets(configured_uri(options.tracking_uri)),
    )
    study.file.write(study.folder)
    if not continues:
        comment = f"The options of this study. To go on: {study.file.again()}"
        names = model_catalogue.built_in_names()
        write_config(study.folder, study.experiment.name, study.options, comment, names)
    nothing = "" if study.num_to_train else ", nothing to train"
    study.console.print(f"{study.name}: {len(known)} of {study.total} known{nothing}")
    if study.retries_exhausted:
        study.console.print(
            f"{len(study.retries_exhausted)} of them failed three times; --retry-failed tries them again"
        )


class Run:
    """The driver of a study that this process has locked: it trains what is pending and writes the report.

    Args:
        study: The study, after `look_up`.
    """

    def __init__(self, study: Study) -> None:
        self.study = study
        self.progress = Progress(study.folder, study.total, len(study.known_fingerprints()), study.console)
        self.progress.max_steps = study.max_steps()
        others = lanes_of_others(study.options.output, study.file)
        self.keeper = reporting.AdapterKeeper(study.store, study.file.settings, others)
        self.writers = start_writers(study, self.progress.notify)
        self.logged: set[str] = set()
        """Fingerprints of the records that this run has sent to MLflow and the other trackers."""

    def execute(self) -> None:
        """Train what is pending, and write the report.

        Raises:
            UsageError: The options do not fit the cluster that was joined. Nothing was trained.
            StudyError: The cluster cannot train, or no trainer could be started.
            KeyboardInterrupt: The run was interrupted; the lanes have saved checkpoints.
        """
        study, budget = self.study, self.study.budget
        status, should_report = "KILLED", False
        try:
            if study.num_to_train:
                self._train()
            status, should_report = "KILLED" if budget.stop_reason else "FINISHED", True
        except UsageError:
            raise  # Nothing was trained, so there is nothing to report.
        except BaseException as error:
            should_report = True
            if isinstance(error, KeyboardInterrupt):
                if not budget.is_interrupted:
                    budget.request_stop()
                study.console.print(f"Stopped: {study.describe_progress()}, what is half done is kept")
            raise
        finally:
            # Log the records of earlier runs, and those whose end was not reported before the study stopped.
            for configuration in study.requested:
                if configuration.fingerprint not in self.logged:
                    self.writers.put(configuration.fingerprint)
            reporting.report_and_close(study, self.writers, self.keeper, status, should_report)

    def _train(self) -> None:
        """Train the pending configurations, and those that the search or the design adds meanwhile."""
        study, progress, budget = self.study, self.progress, self.study.budget
        if study.search is not None:
            study.search.on_point = self._add
        with (
            progress,
            study.store.scratch_folder() as scratch_folder,
            ray_cluster.connect() as cluster,
            graceful_interrupts(budget.request_stop),
        ):
            # Imported after `connect`, which sets environment variables that Tune reads at its import.
            from orchestrator.execution.session import train

            session = self._make_session(cluster, scratch_folder)
            for warning in data_warnings(find_sources(study.templates)):
                progress.notify(f"! {warning}")
            progress.notify(_describe_trainers(session))
            began = time.monotonic()
            steps = train(session, study.satisfied, study.pending, study.search, self._next_stage)
            used = f", {budget.format_usage()}" if budget.gpus_per_trainer else ""
            progress.notify(f"{progress.describe_ended(time.monotonic() - began)}{used}")
            if (first := progress.first_lane_at) is not None:
                progress.notify(f"the first lane trained after {format_duration(first - began)} of this time")
            most = sum(c.lr_schedule.steps for c in study.pending)
            progress.notify(f"{steps} optimizer steps of {most} for all configurations to the end")
        if budget.is_interrupted:
            raise KeyboardInterrupt

    def _make_session(self, cluster: ray_cluster.Cluster, scratch_folder: Path) -> Session:
        """Check the cluster, and determine the number of trainers and their settings."""
        from orchestrator.cluster.check import require_usable_cluster

        study = self.study
        store = study.store
        options = ray_cluster.adapt_to_cluster(study.options, cluster, study.templates)
        require_usable_cluster(cluster, store.root)
        num_trainers, gpus_per_worker = cluster.plan_trainers(
            options.trainers, options.gpus_per_worker, options.workers_per_trainer
        )
        study.budget.set_gpus_per_trainer(gpus_per_worker * options.workers_per_trainer)
        settings = TrainerSettings(shared_options(options), 0, gpus_per_worker, store.root, scratch_folder)
        if options.kernels == "liger" and not settings.uses_gpus:
            raise UsageError("--kernels liger: the trainers of this study have no GPU; take --kernels torch.")
        max_lanes = choose_lanes(study, num_trainers, settings.uses_gpus)
        return Session(
            settings=replace(settings, max_lanes=max_lanes),
            num_trainers=min(num_trainers, study.num_to_train),
            cluster=cluster,
            store=store,
            progress=self.progress,
            budget=study.budget,
            on_record=self._log_record,
            on_progress=self.writers.put_progress,
            cached={c.fingerprint for c in study.satisfied},
            tune_per_seed=study.experiment.kind == "replicates",
        )

    def _log_record(self, record: Record) -> None:
        """Send a new record to the trackers; called from another thread."""
        self.logged.add(record.fingerprint)
        self.writers.put(record.fingerprint)
        if self.study.options.save_adapters == "best":
            self.keeper.keep_best([record], reporting.MAX_RUNNING_BYTES)

    def _add(self, *configurations: Configuration) -> list[Configuration]:
        """Add configurations to the study and to the progress, and return those that are to be trained."""
        new = self.study.add(configurations)
        self.progress.cached += len(configurations) - len(new)
        self.progress.total, self.progress.max_steps = self.study.total, self.study.max_steps()
        return new

    def _next_stage(self) -> list[Configuration]:
        """Return the configurations of the design's next stage that are to be trained.

        A stage without such configurations is added and skipped. All earlier configurations must have ended.

        Returns:
            The configurations to train; an empty list ends the study.
        """
        store = self.study.store
        while not self.study.budget.stop_reason and (named := self.study.name_next_stage()):
            if new := self._add(*named):
                rates = " ".join(f"{rate:g}" for rate in sorted({c.optimizer.learning_rate for c in named}))
                known = len(named) - len(new)
                count = f"{len(named)} configurations more{f', {known} of them known' if known else ''}"
                reason = f": {design.reason}" if (design := self.study.design) and design.reason else ""
                self.progress.notify(f"next stage: {count}, at learning rates {rates}{reason}")
                prepare_datasets(new, store.bases, store.data, self.progress.notify)
                return new
        return []


def start_writers(study: Study, notify: Callable[[str], None]) -> TrackerWriters:
    """Start the writers to MLflow and to the trackers that --tracker names.

    The first error of such a tracker is printed at once; the end of the study says what MLflow lacks.
    """

    def report_error(name: str, error: str) -> None:
        notify(f"--tracker {name}: {error}; the study goes on, and its end says what is missing there")

    store, tags = study.store, {"commit": current_commit()}
    make_mlflow = partial(MlflowTracker, study.tracking_uri)
    writers = TrackerWriters(mlflow=TrackerWriter(make_mlflow, store, study.file, tags))
    for name, tracker in study.trackers.items():
        make = partial(tracker, study.folder)
        writers[name] = TrackerWriter(make, store, study.file, tags, partial(report_error, name))
    return writers


def choose_lanes(study: Study, num_trainers: int, uses_gpus: bool) -> int:
    """Return the largest number of lanes of a trainer.

    Args:
        study: The study.
        num_trainers: Number of trainers; 0 counts as one.
        uses_gpus: True if the trainers compute on GPUs. Each of them then chooses its number of lanes.
    """
    options = study.options
    if options.lanes_per_trainer is not None:
        return options.lanes_per_trainer
    if uses_gpus:
        return MAX_AUTOMATIC_LANES
    # A search and early stopping decide by the results of other lanes, so fewer should train at once.
    is_plain_grid = options.search == "grid" and options.scheduler == "none"
    batches = [c.batches for c in (*study.templates, *study.pending)]  # `max_length` is 0 for images
    if is_plain_grid and all(0 < b.batch_size * b.max_length <= SHORT_LANE_TOKENS for b in batches):
        # With more lanes than its share, a trainer would train the lanes of others.
        share = -(-study.num_to_train // max(1, num_trainers))
        return max(DEFAULT_LANES_PER_TRAINER, min(SHORT_LANES_PER_TRAINER, share))
    return DEFAULT_LANES_PER_TRAINER


def _describe_trainers(session: Session) -> str:
    """Return one line that describes the cluster and the trainers."""
    cluster, settings = session.cluster, session.settings
    where = "Ray started here" if cluster.local else f"joined Ray, {len(cluster.nodes)} nodes"
    gpus = settings.gpus_per_worker * settings.options.workers_per_trainer
    each = f", {gpus:g} GPUs each" if gpus else ""
    lanes = f"{'up to ' if settings.automatic_lanes else ''}{settings.max_lanes} lanes"
    return f"{where}: {session.num_trainers} trainers of {lanes}{each}"
