"""A study from its options to its report: the function that every experiment script calls.

The four parts are `study_context.resolve_study` (options to configurations), `plan.print_plan` (--plan),
`training.train_pending` (Ray) and `reporting` (report, MLflow, exit code).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from orchestrator.execution.ray import runtime
from orchestrator.finetune.resolve.data_preparation import prepare_datasets
from orchestrator.launch import reporting, training
from orchestrator.launch.design import MakeDesign
from orchestrator.launch.experiment import Experiment
from orchestrator.launch.plan import print_plan, print_point_shortfall
from orchestrator.launch.preset_plan import print_preset
from orchestrator.launch.study_context import StudyContext, resolve_study
from orchestrator.launch.study_settings import fix_settings
from orchestrator.launch.work import StudyWork
from orchestrator.record import scratch
from orchestrator.record.mlflow.tracking_uri import configured_uri
from orchestrator.record.provenance import current_commit
from orchestrator.record.schema import Record
from orchestrator.record.store import Store
from orchestrator.record.study_file import AnalysisSettings, StudyFile
from orchestrator.study.configuration import Configuration
from orchestrator.study.options import StudyOptions
from orchestrator.util import atomic_files
from orchestrator.util.errors import UsageError, describe_disk_error
from orchestrator.util.graceful_interrupts import format_command
from orchestrator.util.redaction import redact_secrets

CheckStudy = Callable[[StudyContext, StudyFile, Sequence[Configuration]], None]
"""Called with the study as it was before this run, and with the configurations of this run."""


def run_study(
    experiment: Experiment,
    options: StudyOptions,
    *,
    make_design: MakeDesign | None = None,
    check: CheckStudy = lambda context, study, requested: None,
    replicates: int = 1,
) -> int:
    """Train the configurations that have no result yet, log them to MLflow and write the report.

    Args:
        experiment: The script's question and defaults.
        options: The options of the command line.
        make_design: Makes the design of the study; None: the grid of learning rates, or a search.
        check: Called before anything is trained; raises UsageError to refuse the study.
        replicates: Number of replicates of a study that tunes each variant several times.

    Returns:
        The exit code: 0, 1 when configurations have no result, or EXIT_LIMIT_REACHED when a limit ended the
        run before they had one.

    Raises:
        UsageError: An option has a value that cannot work. Nothing was trained.
        StudyError: Something outside the command failed, for example the cluster.
        KeyboardInterrupt: The run was interrupted. Unfinished lanes keep their checkpoints.
        OSError: The disk refused a write.
    """
    if options.plan and options.preset:
        # First, so that it is seen even where the data or the base model are not here yet.
        print_preset(options)
    context = resolve_study(experiment, options, make_design, replicates)
    if context.options.plan:
        print_plan(context.console, context.templates, context.collect_work(), context.store, context.options)
        return 0
    _make_folder(context)
    refusal = (
        f"study {context.name!r} is running already in {context.folder}; "
        "wait for it, or take another --study."
    )
    with (
        runtime.exclusive_lock(context.folder / ".lock", refusal),
        atomic_files.report_unwritable_folders(context.folder, context.store.root),
    ):
        return _begin_run(context, check).execute()


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


def _begin_run(context: StudyContext, check: CheckStudy) -> StudyRun:
    """Collect the work of this run, prepare its datasets and write `study.json`."""
    experiment, store = context.experiment, context.store
    command = format_command(sys.argv)
    study = StudyFile.read(context.folder) or StudyFile(context.name, experiment.question, command)
    scratch.remove_stale_folders(store)
    work = context.collect_work()
    variants = dict.fromkeys(template.variant.name for template in context.templates)
    settings = replace(experiment.settings, select=context.options.select)
    settings = fix_settings(settings, study, work.search is not None, context.replicates, variants)
    check(context, study, work.requested)
    if work.num_to_train:
        to_prepare = [*context.templates, *work.pending]
        prepare_datasets(to_prepare, store.bases, store.data, context.console.print)
    if work.search is not None:
        work.search.save()
    study = drop_abandoned(study, settings, (c.fingerprint for c in work.requested), store)
    cached = {*work.retries_exhausted, *(c.fingerprint for c in work.satisfied)}
    study = replace(
        study.with_configurations([c.fingerprint for c in work.requested], cached),
        command=command,
        tracking_uri=redact_secrets(configured_uri(context.options.tracking_uri)),
        settings=settings,
    )
    study.write(context.folder)
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

    An earlier command with other options asked for them. A comparison of tuned variants and a study of
    factors have no final answer while a configuration of theirs has not ended, and these would never end.
    """
    if settings.kind not in ("replicates", "factors"):
        return study
    return study.keep({*requested, *store.states()})


@dataclass
class StudyRun:
    """One run of a study, from its first trainer to the report."""

    context: StudyContext
    work: StudyWork
    """Grows while a search or a further stage adds configurations."""
    study: StudyFile
    """Replaced, and written again, when the work grows."""
    logged: set[str] = field(default_factory=set)
    """Fingerprints of the records of this run that MLflow has been given."""

    def execute(self) -> int:
        """Train, report and return the exit code, see `run_study`."""
        # MLflow takes seconds to import, and is not needed for a plan or a refused option.
        from orchestrator.record.mlflow.log import MlflowLogger
        from orchestrator.record.mlflow.writer import MlflowWriter

        context, work = self.context, self.work
        writer = MlflowWriter(
            MlflowLogger(context.tracking_uri),
            context.store,
            self.study,
            log_adapters=context.options.save_adapters,
            tags={"commit": current_commit()},
        )

        def log_record(record: Record) -> None:
            self.logged.add(record.fingerprint)
            writer.put(record)

        status, should_report = "KILLED", False
        try:
            if work.num_to_train:
                training.train_pending(context, work, writer, log_record, self.add_configuration)
            status, should_report = "KILLED" if context.budget.stop_reason else "FINISHED", True
        except UsageError:
            raise  # nothing was trained: there is nothing to report
        except BaseException as error:
            should_report = True
            if isinstance(error, KeyboardInterrupt):
                self._handle_interrupt()
            raise
        finally:
            # Records of earlier runs, and those whose end was not reported: the broker restarted, or the
            # study was stopped.
            for configuration in work.requested:
                if configuration.fingerprint not in self.logged:
                    writer.put(configuration.fingerprint)
            reporting.report_and_close(context, self.study, writer, status, should_report)
        if work.search is not None:
            usage = work.search.update_usage(context.store)  # the report's table shows it as well
            print_point_shortfall(context.console, usage, work.search.file.points)
        return reporting.print_missing_results(context, work, self.study.command)

    def add_configuration(self, configuration: Configuration, is_reused: bool) -> None:
        """Add a configuration of a search or of a further stage to the work and to `study.json`."""
        fingerprint = configuration.fingerprint
        self.work.requested.append(configuration)
        self.study = self.study.with_configurations([fingerprint], [fingerprint] if is_reused else [])
        self.study.write(self.context.folder)

    def _handle_interrupt(self) -> None:
        if not self.context.budget.is_interrupted:
            self.context.budget.request_stop()
        progress = self.context.describe_progress(self.work)
        self.context.console.print(f"Stopped: {progress}, what is half done is kept", markup=False)
