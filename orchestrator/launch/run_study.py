"""Run of a study from its options to its report: the function that every experiment script calls.

The four steps are `study_context.resolve_study` (options and design), `plan.print_plan` (--plan),
`training.train_pending` (Ray) and `reporting` (report, MLflow, exit code).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial

from orchestrator.execution.progress import Progress
from orchestrator.execution.ray import runtime
from orchestrator.finetune.models import catalogue as model_catalogue
from orchestrator.finetune.resolve.data_preparation import prepare_datasets, report_data, write_own_files
from orchestrator.launch import cost, reporting, training
from orchestrator.launch.adapter_keeper import AdapterKeeper
from orchestrator.launch.designs import MakeDesign
from orchestrator.launch.experiment import Experiment
from orchestrator.launch.plan import print_plan, print_point_shortfall, print_preset
from orchestrator.launch.study_context import StudyContext, resolve_study
from orchestrator.launch.study_settings import drop_replaced, fix_settings, refuse_other_runs
from orchestrator.launch.work import StudyWork
from orchestrator.record import scratch
from orchestrator.record.adapters import lanes_of_others
from orchestrator.record.mlflow import MlflowTracker
from orchestrator.record.provenance import current_commit
from orchestrator.record.schema import Record
from orchestrator.record.store import Store
from orchestrator.record.study_file import LOCK_FILE, AnalysisSettings, StudyFile
from orchestrator.record.tracker import TrackerWriter, TrackerWriters
from orchestrator.record.tracking_uri import configured_uri
from orchestrator.study.config_file import given_values, write_config
from orchestrator.study.configuration import Configuration
from orchestrator.study.options import StudyOptions
from orchestrator.util import atomic_files
from orchestrator.util.errors import UsageError, describe_disk_error
from orchestrator.util.redaction import redact_secrets
from variants import catalogue


def run_study(
    experiment: Experiment,
    options: StudyOptions,
    *,
    make_design: MakeDesign | None = None,
    replicates: int = 1,
) -> int:
    """Train the configurations that have no result yet, log them to MLflow and write the report.

    Args:
        experiment: Question and defaults of the script.
        options: Options of the command line.
        make_design: Function that makes the design; None for the grid of learning rates, or for a search.
        replicates: Number of replicates of a study that tunes each variant several times.

    Returns:
        The exit code: 0 if all configurations have a result, or after --plan; EXIT_LIMIT_REACHED if a limit
        ended the run before; else 1.

    Raises:
        UsageError: The value of an option is wrong. Nothing was trained.
        StudyError: Something outside the command failed, for example the cluster.
        KeyboardInterrupt: The run was interrupted. Unfinished lanes keep their checkpoints.
        OSError: A file could not be written.
    """
    if options.plan_gpu is not None:
        cost.require_card(options.plan_gpu)  # before any data is read
    if options.plan and options.preset:
        print_preset(options)  # first, because `resolve_study` fails if the data of a task are missing
    after = None if options.plan else UsageError
    with atomic_files.remove_created_folders(options.output, options.store_folder, after=after):
        context = resolve_study(experiment, options, make_design, replicates)
    if context.options.plan:
        plan = print_plan(
            context.console,
            context.templates,
            context.collect_work(),
            context.store,
            context.options,
        )
        experiment.request.on_plan(plan)
        return 0
    _make_folder(context)
    refusal = (
        f"study {context.name!r} is running already in {context.folder}; "
        "wait for it, or take another --study."
    )
    with (
        runtime.exclusive_lock(context.folder / LOCK_FILE, refusal),
        atomic_files.report_unwritable_folders(context.folder, context.store.root),
    ):
        run = _begin_run(context)
        experiment.request.on_study(context.name, context.folder)
        return run.execute()


def _make_folder(context: StudyContext) -> None:
    try:
        context.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if describe_disk_error(error):
            raise
        raise UsageError(
            f"--study {context.name!r}: {context.folder} cannot be made ({error.strerror}); "
            "take another --study."
        ) from None


def _begin_run(context: StudyContext) -> StudyRun:
    """Determine the work of this run, prepare its datasets and write `study.json`."""
    experiment, store = context.experiment, context.store
    command = experiment.command
    new = StudyFile(
        context.name, experiment.question, command, experiment=experiment.name, folder=context.folder
    )
    study = StudyFile.read(context.folder) or new
    sources = context.sources()
    study = drop_replaced(study, sources, store, context.console.print)
    scratch.remove_stale_folders(store)
    work = context.collect_work()
    variants = dict.fromkeys(template.variant.name for template in context.templates)
    settings = replace(experiment.settings, select=context.options.select)
    settings = fix_settings(settings, study, work.search is not None, context.replicates, variants)
    if settings.kind == "replicates":
        refuse_other_runs(study, work.requested, context.templates, context.replicates, store)
    write_own_files(context.templates, store.data)  # also for `export`, if nothing is trained
    if work.num_to_train:
        to_prepare = [*context.templates, *work.pending]
        prepare_datasets(to_prepare, store.bases, store.data, context.console.print)
        may_truncate = context.options.max_length is not None
        report_data(to_prepare, store.bases, context.console.print, may_truncate)
    if work.search is not None:
        work.search.save()
    study = drop_abandoned(study, settings, (c.fingerprint for c in work.requested), store)
    cached = {*work.retries_exhausted, *(c.fingerprint for c in work.satisfied)}
    study = replace(
        study.with_configurations([c.fingerprint for c in work.requested], cached),
        command=command,
        tracking_uri=redact_secrets(configured_uri(context.options.tracking_uri)),
        settings=settings,
    ).with_sources(sources)
    study.write(context.folder)
    given = given_values(experiment.request.options or context.options, catalogue.names())
    write_config(context.folder, study.again(), given, model_catalogue.built_in_names())
    nothing = "" if work.num_to_train else ", nothing to train"
    context.console.print(f"{context.name}: {len(cached)} of {work.total} known{nothing}")
    if work.retries_exhausted:
        context.console.print(
            f"{len(work.retries_exhausted)} of them failed three times; --retry-failed tries them again"
        )
    return StudyRun(context, work, study)


def drop_abandoned(
    study: StudyFile, settings: AnalysisSettings, requested: Iterable[str], store: Store
) -> StudyFile:
    """Return the study without configurations that have no record and that this command does not request.

    An earlier command with other options requested them. A comparison of tuned variants and a study of
    factors have no final answer while one of their configurations has not ended, and the abandoned ones would
    never end.
    """
    if settings.kind not in ("replicates", "factors"):
        return study
    return study.keep({*requested, *store.states()})


@dataclass
class StudyRun:
    """One run of a study, from the training to the report."""

    context: StudyContext
    work: StudyWork
    """Configurations of the study; a search or a later stage adds some during the training."""
    study: StudyFile
    """Content of `study.json`; replaced and written again when configurations are added."""
    logged: set[str] = field(default_factory=set)
    """Fingerprints of the records that this run has sent to MLflow and the other trackers."""

    def execute(self) -> int:
        """Train, write the report and return the exit code, see `run_study`."""
        context, work = self.context, self.work
        if work.num_to_train or not reporting.print_known_end(context, self.study):
            self._train_and_report()
        if work.search is not None:
            usage = work.search.update_usage(context.store)
            print_point_shortfall(context.console, usage, work.search.file.points)
        return reporting.print_missing_results(context, work, self.study.command)

    def _train_and_report(self) -> None:
        context, work = self.context, self.work
        others = lanes_of_others(context.options.output, self.study)
        keeper = AdapterKeeper(context.store, self.study.settings, others)
        progress = Progress(context.folder, work.total, work.total - work.num_to_train, context.console)
        progress.max_steps = work.max_steps(context.templates)
        writers = _start_writers(context, self.study, progress.notify)

        def log_record(record: Record) -> None:
            if not self.logged:
                threading.Thread(target=reporting.import_report_libraries, daemon=True).start()
            self.logged.add(record.fingerprint)
            writers.put(record.fingerprint)
            if context.options.save_adapters == "best":
                keeper.add([record])

        status, should_report = "KILLED", False
        try:
            if work.num_to_train:
                training.train_pending(context, work, progress, writers, log_record, self.add_configuration)
            status, should_report = "KILLED" if context.budget.stop_reason else "FINISHED", True
        except UsageError:
            raise  # Nothing was trained, so there is nothing to report.
        except BaseException as error:
            should_report = True
            if isinstance(error, KeyboardInterrupt):
                self._handle_interrupt()
            raise
        finally:
            # Log the records of earlier runs, and records whose end was not reported, because the broker was
            # restarted or the study was stopped.
            for configuration in work.requested:
                if configuration.fingerprint not in self.logged:
                    writers.put(configuration.fingerprint)
            reporting.report_and_close(context, self.study, writers, keeper, status, should_report)

    def add_configuration(self, configuration: Configuration, is_reused: bool) -> None:
        """Add a configuration of a search or of a later stage to the work and to `study.json`.

        Args:
            configuration: The configuration.
            is_reused: True if the store has its result already.
        """
        fingerprint = configuration.fingerprint
        self.work.requested.append(configuration)
        self.study = self.study.with_configurations([fingerprint], [fingerprint] if is_reused else [])
        self.study.write(self.context.folder)

    def _handle_interrupt(self) -> None:
        if not self.context.budget.is_interrupted:
            self.context.budget.request_stop()
        progress = self.context.describe_progress(self.work)
        self.context.console.print(f"Stopped: {progress}, what is half done is kept", markup=False)


def _start_writers(context: StudyContext, study: StudyFile, notify: Callable[[str], None]) -> TrackerWriters:
    """Start the writers to MLflow and to the trackers that --tracker names.

    The first error of such a tracker is printed at once; the end of the study says what MLflow lacks.
    """

    def report_error(name: str, error: str) -> None:
        notify(f"--tracker {name}: {error}; the study goes on, and its end says what is missing there")

    store, tags = context.store, {"commit": current_commit()}
    writers = {"mlflow": TrackerWriter(partial(MlflowTracker, context.tracking_uri), store, study, tags)}
    for name, tracker in context.trackers.items():
        make = partial(tracker, context.folder)
        writers[name] = TrackerWriter(make, store, study, tags, partial(report_error, name))
    return TrackerWriters(writers)
