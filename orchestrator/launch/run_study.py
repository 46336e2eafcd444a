"""A study from its options to its report: what every experiment script calls."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from orchestrator.execution.progress import Progress, format_duration
from orchestrator.execution.ray import autoscaler, control_store
from orchestrator.execution.ray import runtime as ray_cluster
from orchestrator.execution.run_budget import RunBudget
from orchestrator.execution.search.budget import open_search
from orchestrator.execution.tune.rungs import scheduler_settings, submission_order
from orchestrator.finetune import resolve
from orchestrator.launch.plan import DEFAULT_LANES_PER_TRAINER, print_plan, print_point_shortfall
from orchestrator.launch.work import StudyWork, point_builder
from orchestrator.record import scratch as scratch_folders
from orchestrator.record.mlflow.tracking_uri import configured_uri, redact_uri, resolve_uri
from orchestrator.record.parquet import write_parquet
from orchestrator.record.provenance import current_commit
from orchestrator.record.schema import MAX_FAILURES, Record
from orchestrator.record.store import Store
from orchestrator.record.study_file import PLOT_FILES, REPORT_FILES, StudyFile
from orchestrator.study.configuration import Configuration
from orchestrator.study.grid import build_grid
from orchestrator.study.options import DEFAULT_TRAINER_TIMEOUT, StudyOptions, default_output
from orchestrator.util import atomic_files
from orchestrator.util.command import EXIT_LIMIT_REACHED, format_command, graceful_interrupts
from orchestrator.util.errors import UsageError, describe_disk_error

if TYPE_CHECKING:
    from orchestrator.record.mlflow.writer import MlflowWriter

MLFLOW_FLUSH_SECONDS = 60.0  # what MLflow gets at the end of a study to catch up
MLFLOW_INTERRUPTED_FLUSH_SECONDS = 5.0  # the same when a study has ended in trouble, and at most after Ctrl-C
MIN_REPORT_SECONDS, MAX_INTERRUPTED_REPORT_ROWS = (
    4.0,
    500,
)  # what a report needs of the time that Ctrl-C leaves, and its size
RecordCallback = Callable[[Record], None]


@dataclass(frozen=True)
class Experiment:
    """What a script adds to the shared options. `task` and `variants` are for a run without such options.
    `baseline`, `margin`, `tuning`: of a study that compares with fresh seeds, see StudyFile."""

    script: str
    question: str
    variants: tuple[str, ...]
    task: str
    dry_run_task: str
    baseline: str = ""
    margin: float = 0.01
    tuning: str = ""


def run_study(
    experiment: Experiment,
    options: StudyOptions,
    *,
    requested: Sequence[Configuration] | None = None,
    check: Callable[[Sequence[Configuration]], None] = lambda wanted: None,
) -> int:
    """Trains what is not known yet, logs, reports. Returns the exit code: 0, 1 when configurations have no
    result, LIMIT when that is for a limit. `wanted`: exactly these, in place of the options' grid or search.
    `check` may refuse, with BadInput, what is asked for. Raises BadInput, Trouble, KeyboardInterrupt, and the
    OSError of a disk that refuses."""
    console = Console(file=sys.stdout, highlight=False, markup=False)
    _require_hardware(experiment, options)
    options = autoscaler.adapt_options(options)
    options.check_output()
    store = Store(options.store_folder)
    tracking_uri = resolve_uri(options.tracking_uri, store)
    budget = RunBudget(options.max_hours, options.max_gpu_hours)
    task = experiment.dry_run_task if options.dry_run else experiment.task
    resolved = resolve.resolve_options(options, task, experiment.variants, store.bases)
    if (
        ray_cluster.running_cluster_address() is None
    ):  # more than this machine has is refused before anything is made
        _, gpus = ray_cluster.estimate_local_cluster().plan_trainers(
            options.trainers, options.gpus_per_worker, options.workers_per_trainer
        )
        budget.set_gpus_per_trainer(gpus * options.workers_per_trainer)
    content = resolve.resolve_base_model(resolved.model, store.bases, None if options.plan else console.print)
    templates = resolve.build_configuration_templates(options, resolved, content, store.bases)
    is_search = requested is None and resolved.space is not None
    parts = [experiment.script, Path(resolved.task.name).stem, Path(resolved.model).name]
    parts += [options.search_method] if is_search else []
    name = options.study or "-".join(parts).replace("@", "-")
    folder = options.study_folder(name)

    def collect_work() -> StudyWork:
        if requested is not None:
            return StudyWork.from_store(requested, None, store, options)
        if resolved.space is None:
            all_points = build_grid(templates, resolved.learning_rates, range(options.seed_count))
            return StudyWork.from_store(all_points, None, store, options)
        build, steps = point_builder(templates), templates[0].schedule.steps
        search = open_search(folder, options.search_method, options.point_count, resolved.space, build, steps)
        return StudyWork.from_store(list(search.configurations.values()), search, store, options)

    if options.plan:
        work = collect_work()
        print_plan(console, templates[0], work.requested, work.pending, store, options, work.search)
        return 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if describe_disk_error(error):
            raise
        raise UsageError(
            f"--study {name!r}: {folder} cannot be made ({error.strerror}); take another --study."
        ) from None
    refusal = f"study {name!r} is running already in {folder}; wait for it, or take another --study."
    with (
        ray_cluster.exclusive_lock(folder / ".lock", refusal),
        atomic_files.report_unwritable_folders(folder, store.root),
    ):
        command = format_command(sys.argv)
        study = StudyFile.read(folder) or StudyFile(name, experiment.question, command)
        scratch_folders.remove_stale_folders(store)
        work = collect_work()
        check(work.requested)
        if work.num_to_train:
            resolve.prepare_datasets([*templates, *work.pending], store.bases, store.data, console.print)
        if work.search is not None:
            work.search.save()
        cached = {*work.retries_exhausted, *(c.fingerprint for c in work.satisfied)}
        study = study.with_configurations([c.fingerprint for c in work.requested], cached)
        study = replace(study, command=command, tracking_uri=redact_uri(configured_uri(options.tracking_uri)))
        study = replace(study, searched=study.searched or work.search is not None)
        study = replace(
            study, baseline=experiment.baseline, margin=experiment.margin, tuning=experiment.tuning
        )
        study.write(folder)
        console.print(
            f"{name}: {len(cached)} of {work.total} known{'' if work.num_to_train else ', nothing to train'}"
        )
        if work.retries_exhausted:
            console.print(
                f"{len(work.retries_exhausted)} of them failed three times; --retry-failed tries them again"
            )
        return _StudyRun(console, folder, study, store, tracking_uri, options, budget).execute(work)


@dataclass
class _StudyRun:
    console: Console
    folder: Path
    study: StudyFile
    store: Store
    tracking_uri: str
    options: StudyOptions
    budget: RunBudget

    def execute(self, work: StudyWork) -> int:
        requested = work.requested  # grows with a search
        from orchestrator.record.mlflow.log import MlflowLogger
        from orchestrator.record.mlflow.writer import MlflowWriter

        tags = {"commit": current_commit()}
        writer = MlflowWriter(
            MlflowLogger(self.tracking_uri),
            self.store,
            self.study,
            log_adapters=self.options.save_adapters,
            tags=tags,
        )
        logged: set[str] = set()

        def log(record: Record) -> None:
            logged.add(record.fingerprint)
            writer.put(record)

        status, should_report = "KILLED", False
        try:
            if work.num_to_train:
                self._train(work, writer, log)
            status, should_report = "KILLED" if self.budget.stop_reason else "FINISHED", True
        except UsageError:
            raise  # nothing was trained: there is nothing to report
        except BaseException as error:
            should_report = True
            if isinstance(error, KeyboardInterrupt):
                self._handle_interrupt(work)
            raise
        finally:
            # Known ones, and those whose end nobody was told (the broker restarted, the study was stopped).
            for configuration in requested:
                if configuration.fingerprint not in logged:
                    writer.put(configuration.fingerprint)
            self._report_and_close(writer, status, should_report)
        if work.search is not None:
            spent = work.search.update_usage(self.store)  # the report's table says it, too
            print_point_shortfall(self.console, spent, work.search.file.points)
        return self._exit_code(work)

    def _report_and_close(self, writer: MlflowWriter, status: str, should_report: bool) -> None:
        """Writes the report, and gives MLflow its time to catch up. Ctrl-C lets the report come to its end
        and cuts the rest short: an exception anywhere in the report may strike Python in the middle of an
        import, whose lock it then holds for good."""
        was_interrupted = self.budget.is_interrupted
        if should_report and self.budget.is_interrupted and not self._has_time_to_report():
            should_report = False
            name = shlex.quote(self.study.name)
            again = f"{self._orchestrator_command(f'report {name}')} writes it."
            self.console.print(f"Without a report: {again}", markup=False, soft_wrap=True)
        report_files = [self.folder / name for name in REPORT_FILES] if should_report else []
        try:
            if should_report:
                with graceful_interrupts(self.budget.request_stop):
                    self._write_report()
        finally:
            interrupted = self.budget.is_interrupted and not was_interrupted
            status = "KILLED" if interrupted else status
            seconds = (
                MLFLOW_FLUSH_SECONDS
                if status == "FINISHED" or self.budget.stop_reason
                else MLFLOW_INTERRUPTED_FLUSH_SECONDS
            )
            if self.budget.is_interrupted:
                seconds = min(
                    MLFLOW_INTERRUPTED_FLUSH_SECONDS, max(0.5, self.budget.interrupt_seconds_left() - 1)
                )
            num_delayed = writer.close(seconds, status, [file for file in report_files if file.exists()])
            if num_delayed or not writer.is_finished:
                what = f"{num_delayed} runs" if num_delayed else "the study's own run"
                later = f"{self._orchestrator_command('sync --rebuild' if writer.is_damaged else 'sync')} logs them later."
                why = writer.error or "it is slow"
                self.console.print(f"MLflow: {what} delayed ({why}); {later}", markup=False, soft_wrap=True)
        if interrupted:
            raise KeyboardInterrupt

    def _has_time_to_report(self) -> bool:
        """Whether a report can be had before the time is up that Ctrl-C was promised."""
        return (
            self.budget.interrupt_seconds_left() > MIN_REPORT_SECONDS
            and len(self.study.configurations) <= MAX_INTERRUPTED_REPORT_ROWS
        )

    def _handle_interrupt(self, work: StudyWork) -> None:
        if not self.budget.is_interrupted:
            self.budget.request_stop()
        self.console.print(f"Stopped: {self._progress_text(work)}, what is half done is kept", markup=False)

    def _progress_text(self, work: StudyWork) -> str:
        """How many of how many, and what that has cost."""
        states = self.store.states()  # without reading them all
        recorded = [c for c in work.requested if states.get(c.fingerprint) not in (None, "failed")]
        done = sum(states[c.fingerprint] != "stopped" or self._is_satisfied(c) for c in recorded)
        spent = self.budget.format_usage()
        return f"{done} of {work.total} configurations are done{f', {spent} used' if spent else ''}"

    def _is_satisfied(self, configuration: Configuration) -> bool:
        stopping_settings = scheduler_settings(self.options.scheduler, configuration)
        return self.store.get_reusable(configuration.fingerprint, stopping_settings) is not None

    def _train(self, work: StudyWork, writer: MlflowWriter, on_record: RecordCallback) -> None:
        options, store, search, before = self.options, self.store, work.search, len(work.requested)
        progress = Progress(self.folder, work.total, work.total - work.num_to_train, self.console)
        cached = {c.fingerprint for c in work.satisfied}

        def close_writer() -> None:
            writer.close(MLFLOW_INTERRUPTED_FLUSH_SECONDS, "KILLED")

        with (
            progress,
            scratch_folders.scratch_folder(store) as scratch,
            ray_cluster.connect(close_writer) as cluster,
            graceful_interrupts(self.budget.request_stop),
            control_store.watch_control_store(cluster, progress.notify, close_writer),
        ):
            # Imported here: Tune reads its environment, which `connect` sets, when it is imported.
            from orchestrator.cluster.preflight.nodes import require_usable_cluster
            from orchestrator.execution.search.searcher import PerVariantSearcher
            from orchestrator.execution.session import PoolConfig, train
            from orchestrator.execution.trainers.trainer import TrainerSpec

            require_usable_cluster(cluster, store.root, store.bases, work.pending or work.requested)
            count, gpus_per_worker = cluster.plan_trainers(
                options.trainers, options.gpus_per_worker, options.workers_per_trainer
            )
            trainer_spec = TrainerSpec(
                lanes_per_trainer=options.lanes_per_trainer or DEFAULT_LANES_PER_TRAINER,
                gpus_per_worker=gpus_per_worker,
                store=str(store.root),
                scratch=str(scratch),
                save_adapters=options.save_adapters,
                start_timeout=options.trainer_timeout or DEFAULT_TRAINER_TIMEOUT,
                workers_per_trainer=options.workers_per_trainer,
                gradient_checkpointing=options.gradient_checkpointing,
                device=options.device,
            )
            self.budget.set_gpus_per_trainer(gpus_per_worker * trainer_spec.workers_per_trainer)
            reused: set[str] = set()

            def add_search_point(configuration: Configuration) -> None:
                """The search has asked for one more."""
                fingerprint = configuration.fingerprint
                if self._is_satisfied(configuration):
                    reused.add(fingerprint)
                    writer.mark_reused(fingerprint)
                    progress.cached += 1
                work.requested.append(configuration)
                self.study = self.study.with_configurations([fingerprint], reused)
                self.study.write(self.folder)

            if search is not None:
                search.on_point = add_search_point
            where = "Ray started here" if cluster.local else f"joined Ray, {len(cluster.nodes)} nodes"
            autoscaler_capacity = (
                0
                if cluster.local
                else autoscaler.worker_capacity(autoscaler.load_node_types() or (), gpus_per_worker) or 0
            )
            share = (
                f", {gpus_per_worker * trainer_spec.workers_per_trainer:g} GPUs each"
                if gpus_per_worker
                else ""
            )
            progress.notify(f"{where}: {count} seats of {trainer_spec.lanes_per_trainer} lanes{share}")
            began = time.monotonic()
            steps = train(
                submission_order(
                    options.scheduler, work.satisfied, work.pending, trainer_spec.lanes_per_trainer
                ),
                cached,
                options.scheduler,
                cluster,
                PoolConfig(
                    min(count, work.num_to_train),
                    trainer_spec,
                    options.trainers is None,
                    autoscaler_capacity // trainer_spec.workers_per_trainer,
                ),
                store,
                scratch,
                progress,
                on_record,
                self.budget,
                None
                if search is None
                else PerVariantSearcher(
                    search, store, options.scheduler, trainer_spec.lanes_per_trainer, cached
                ),
            )
            early = f", {progress.stopped} of them stopped early" if progress.stopped else ""
            spent = f", {self.budget.format_usage()}" if self.budget.gpus_per_trainer else ""
            progress.notify(
                f"{progress.num_ended} trained in {format_duration(time.monotonic() - began)}{early}{spent}"
            )
            trained = [*work.pending, *(c for c in work.requested[before:] if c.fingerprint not in reused)]
            max_steps = sum(c.schedule.steps for c in trained)
            progress.notify(f"{steps} optimizer steps of {max_steps} for all configurations to the end")
        if self.budget.is_interrupted:
            raise KeyboardInterrupt

    def _write_report(self) -> None:
        """The projections that are files. The table shows the whole study, also what earlier runs asked."""
        from orchestrator.analyze.report import mlflow_ui_command, write_report
        from orchestrator.analyze.table import render_summary

        study, folder = self.study, self.folder
        found = [record for f in study.configurations if (record := self.store.get(f)) is not None]
        write_parquet(self.store)
        summary = write_report(
            found,
            folder,
            name=study.name,
            question=study.question,
            command=study.command,
            tracking_uri=redact_uri(self.tracking_uri),
            pending=len(study.configurations) - len(found),
            baseline=study.baseline,
            margin=study.margin,
            tuning_folder=folder.parent / study.tuning if study.tuning else None,
            is_search=study.searched,
            looks=study.looks,
        )
        picture = next(p for name in PLOT_FILES if (p := folder / name).exists())
        self.console.print(render_summary(summary))
        for what, where in (
            ("Report", folder / "report.html"),
            ("Picture", picture),
            ("MLflow", mlflow_ui_command(redact_uri(self.tracking_uri)) or "runs are on the tracking server"),
        ):
            self.console.print(f"{what:8} {where}", markup=False, soft_wrap=True)

    def _exit_code(self, work: StudyWork) -> int:
        """Says what has no result. Returns the exit code."""
        unsatisfied = [c.fingerprint for c in work.requested if not self._is_satisfied(c)]
        num_unsampled = work.total - len(work.requested)
        if not unsatisfied and not num_unsampled:
            return 0
        if self.budget.stop_reason and (
            num_unsampled or any(self.store.count_failures(f) < MAX_FAILURES for f in unsatisfied)
        ):
            again = f"{self._progress_text(work)}; to go on: {self.study.command}"
            self.console.print(f"Ended by {self.budget.stop_reason}: {again}", markup=False, soft_wrap=True)
            return EXIT_LIMIT_REACHED
        failed = [f[:12] for f in unsatisfied if self.store.count_failures(f)]
        why = (
            f"; {self._orchestrator_command('show ' + ' '.join(failed[:3]))} says why"
            if failed
            else "; see the messages above"
        )
        more = f", {num_unsampled} were not asked for" if num_unsampled else ""
        self.console.print(f"{len(unsatisfied)} configurations failed{more}{why}", markup=False)
        return 1

    def _orchestrator_command(self, arguments: str) -> str:
        """A command of ours that finds what this study left."""
        folder_options = (
            [] if self.options.output == default_output() else ["--output", str(self.options.output)]
        )
        folder_options += ["--store", str(self.options.store)] if self.options.store else []
        return " ".join(["python -m orchestrator", arguments, shlex.join(folder_options)]).strip()


def _require_hardware(experiment: Experiment, options: StudyOptions) -> None:
    """The full study wants GPUs: without options it does not start on a laptop."""
    if options.dry_run or options.plan or options.task or options.model:
        return
    if ray_cluster.running_cluster_address() is None and not any(
        n.gpus for n in ray_cluster.estimate_local_cluster().nodes
    ):
        raise UsageError(
            f"the full study ({experiment.task}) needs a GPU or a Ray cluster (ray up cluster.yaml, or "
            "RAY_ADDRESS) and there is none here; rehearse it with --dry-run, or name a --task for this CPU."
        )
