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

from orchestrator.execution.progress import Progress, clock
from orchestrator.execution.ray import autoscaler, control_store
from orchestrator.execution.ray import runtime as ray_cluster
from orchestrator.execution.run_budget import Limits
from orchestrator.execution.search.budget import opened
from orchestrator.execution.tune.rungs import entry, settings
from orchestrator.finetune import resolve
from orchestrator.launch.plan import LANES, print_plan, print_short
from orchestrator.launch.work import Asked, builder
from orchestrator.record import scratch as scratch_folders
from orchestrator.record.mlflow.tracking_uri import checked, named, shown
from orchestrator.record.parquet import write_parquet
from orchestrator.record.provenance import commit
from orchestrator.record.schema import FAILURES_ALLOWED, Record
from orchestrator.record.store import Store
from orchestrator.record.study_file import PICTURES, REPORT, StudyFile
from orchestrator.study.configuration import Configuration
from orchestrator.study.grid import grid
from orchestrator.study.options import SEAT_TIMEOUT, StudyOptions, default_output
from orchestrator.util import atomic_files
from orchestrator.util.command import LIMIT, gently, typed
from orchestrator.util.errors import BadInput, refused_by_disk

if TYPE_CHECKING:
    from orchestrator.record.mlflow.writer import Writer

LOG_SECONDS = 60.0  # what MLflow gets at the end of a study to catch up
HASTE_SECONDS = 5.0  # the same when a study has ended in trouble, and at most after Ctrl-C
REPORT_SECONDS, REPORT_ROWS = 4.0, 500  # what a report needs of the time that Ctrl-C leaves, and its size
Log = Callable[[Record], None]


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
    wanted: Sequence[Configuration] | None = None,
    check: Callable[[Sequence[Configuration]], None] = lambda wanted: None,
) -> int:
    """Trains what is not known yet, logs, reports. Returns the exit code: 0, 1 when configurations have no
    result, LIMIT when that is for a limit. `wanted`: exactly these, in place of the options' grid or search.
    `check` may refuse, with BadInput, what is asked for. Raises BadInput, Trouble, KeyboardInterrupt, and the
    OSError of a disk that refuses."""
    console = Console(file=sys.stdout, highlight=False, markup=False)
    _needs_hardware(experiment, options)
    options = autoscaler.suited(options)
    options.check_output()
    store = Store(options.store_folder)
    uri = checked(options.tracking_uri, store)
    limits = Limits(options.max_hours, options.max_gpu_hours)
    task = experiment.dry_run_task if options.dry_run else experiment.task
    chosen = resolve.names(options, task, experiment.variants, store.bases)
    if ray_cluster.address() is None:  # more than this machine has is refused before anything is made
        _, gpus = ray_cluster.this_machine().seats(
            options.seats, options.gpus_per_seat, options.workers_per_seat
        )
        limits.hold(gpus * options.workers_per_seat)
    content = resolve.base(chosen.model, store.bases, None if options.plan else console.print)
    templates = resolve.templates(options, chosen, content, store.bases)
    searches = wanted is None and chosen.space is not None
    parts = [experiment.script, Path(chosen.task.name).stem, Path(chosen.model).name]
    parts += [options.method] if searches else []
    name = options.study or "-".join(parts).replace("@", "-")
    folder = options.study_folder(name)

    def ask() -> Asked:
        if wanted is not None:
            return Asked.found(wanted, None, store, options)
        if chosen.space is None:
            all_points = grid(templates, chosen.learning_rates, range(options.seed_count))
            return Asked.found(all_points, None, store, options)
        build, steps = builder(templates), templates[0].schedule.steps
        search = opened(folder, options.method, options.point_count, chosen.space, build, steps)
        return Asked.found(list(search.asked.values()), search, store, options)

    if options.plan:
        asked = ask()
        print_plan(console, templates[0], asked.wanted, asked.pending, store, options, asked.search)
        return 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if refused_by_disk(error):
            raise
        raise BadInput(
            f"--study {name!r}: {folder} cannot be made ({error.strerror}); take another --study."
        ) from None
    refusal = f"study {name!r} is running already in {folder}; wait for it, or take another --study."
    with ray_cluster.exclusively(folder / ".lock", refusal), atomic_files.blamed(folder, store.root):
        command = typed(sys.argv)
        study = StudyFile.read(folder) or StudyFile(name, experiment.question, command)
        scratch_folders.clear(store)
        asked = ask()
        check(asked.wanted)
        if asked.new:
            resolve.data([*templates, *asked.pending], store.bases, store.data, console.print)
        if asked.search is not None:
            asked.search.keep()
        known = {*asked.hopeless, *(c.fingerprint for c in asked.met)}
        study = study.extended([c.fingerprint for c in asked.wanted], known)
        study = replace(study, command=command, tracking_uri=shown(named(options.tracking_uri)))
        study = replace(study, searched=study.searched or asked.search is not None)
        study = replace(
            study, baseline=experiment.baseline, margin=experiment.margin, tuning=experiment.tuning
        )
        study.write(folder)
        console.print(
            f"{name}: {len(known)} of {asked.total} known{'' if asked.new else ', nothing to train'}"
        )
        if asked.hopeless:
            console.print(
                f"{len(asked.hopeless)} of them failed three times; --retry-failed tries them again"
            )
        return _Run(console, folder, study, store, uri, options, limits).all(asked)


@dataclass
class _Run:
    console: Console
    folder: Path
    study: StudyFile
    store: Store
    uri: str
    options: StudyOptions
    limits: Limits

    def all(self, asked: Asked) -> int:
        wanted = asked.wanted  # grows with a search
        from orchestrator.record.mlflow.log import MlflowLog
        from orchestrator.record.mlflow.writer import Writer

        tags = {"commit": commit()}
        writer = Writer(
            MlflowLog(self.uri), self.store, self.study, adapters=self.options.save_adapters, tags=tags
        )
        logged: set[str] = set()

        def log(record: Record) -> None:
            logged.add(record.fingerprint)
            writer.put(record)

        status, report = "KILLED", False
        try:
            if asked.new:
                self._train(asked, writer, log)
            status, report = "KILLED" if self.limits.reached else "FINISHED", True
        except BadInput:
            raise  # nothing was trained: there is nothing to report
        except BaseException as error:
            report = True
            if isinstance(error, KeyboardInterrupt):
                self._stopped(asked)
            raise
        finally:
            # Known ones, and those whose end nobody was told (the broker restarted, the study was stopped).
            for configuration in wanted:
                if configuration.fingerprint not in logged:
                    writer.put(configuration.fingerprint)
            self._tell(writer, status, report)
        if asked.search is not None:
            spent = asked.search.spent(self.store)  # the report's table says it, too
            print_short(self.console, spent, asked.search.file.points)
        return self._check(asked)

    def _tell(self, writer: Writer, status: str, report: bool) -> None:
        """Writes the report, and gives MLflow its time to catch up. Ctrl-C lets the report come to its end
        and cuts the rest short: an exception anywhere in the report may strike Python in the middle of an
        import, whose lock it then holds for good."""
        hasty = self.limits.hasty
        if report and self.limits.hasty and not self._in_time():
            report = False
            name = shlex.quote(self.study.name)
            again = f"{self._ours(f'report {name}')} writes it."
            self.console.print(f"Without a report: {again}", markup=False, soft_wrap=True)
        parts = [self.folder / name for name in REPORT] if report else []
        try:
            if report:
                with gently(self.limits.ask):
                    self._report()
        finally:
            stopped = self.limits.hasty and not hasty
            status = "KILLED" if stopped else status
            seconds = LOG_SECONDS if status == "FINISHED" or self.limits.reached else HASTE_SECONDS
            if self.limits.hasty:
                seconds = min(HASTE_SECONDS, max(0.5, self.limits.seconds_left() - 1))
            late = writer.close(seconds, status, [file for file in parts if file.exists()])
            if late or not writer.ended:
                what = f"{late} runs" if late else "the study's own run"
                later = f"{self._ours('sync --rebuild' if writer.damaged else 'sync')} logs them later."
                why = writer.error or "it is slow"
                self.console.print(f"MLflow: {what} delayed ({why}); {later}", markup=False, soft_wrap=True)
        if stopped:
            raise KeyboardInterrupt

    def _in_time(self) -> bool:
        """Whether a report can be had before the time is up that Ctrl-C was promised."""
        return self.limits.seconds_left() > REPORT_SECONDS and len(self.study.configurations) <= REPORT_ROWS

    def _stopped(self, asked: Asked) -> None:
        if not self.limits.hasty:
            self.limits.ask()
        self.console.print(f"Stopped: {self._done(asked)}, what is half done is kept", markup=False)

    def _done(self, asked: Asked) -> str:
        """How many of how many, and what that has cost."""
        states = self.store.states()  # without reading them all
        kept = [c for c in asked.wanted if states.get(c.fingerprint) not in (None, "failed")]
        done = sum(states[c.fingerprint] != "stopped" or self._met(c) for c in kept)
        spent = self.limits.spent()
        return f"{done} of {asked.total} configurations are done{f', {spent} used' if spent else ''}"

    def _met(self, configuration: Configuration) -> bool:
        asked = settings(self.options.scheduler, configuration)
        return self.store.meets(configuration.fingerprint, asked) is not None

    def _train(self, asked: Asked, writer: Writer, log: Log) -> None:
        options, store, search, before = self.options, self.store, asked.search, len(asked.wanted)
        progress = Progress(self.folder, asked.total, asked.total - asked.new, self.console)
        known = {c.fingerprint for c in asked.met}

        def last() -> None:
            writer.close(HASTE_SECONDS, "KILLED")

        with (
            progress,
            scratch_folders.scratch(store) as scratch,
            ray_cluster.connect(last) as cluster,
            gently(self.limits.ask),
            control_store.watched(cluster, progress.say, last),
        ):
            # Imported here: Tune reads its environment, which `connect` sets, when it is imported.
            from orchestrator.cluster.preflight.nodes import refuse_unfit
            from orchestrator.execution.search.searcher import PerGroupSearch
            from orchestrator.execution.session import Room, train
            from orchestrator.execution.trainers.trainer import SeatPlan

            refuse_unfit(cluster, store.root, store.bases, asked.pending or asked.wanted)
            count, gpus = cluster.seats(options.seats, options.gpus_per_seat, options.workers_per_seat)
            plan = SeatPlan(
                lanes=options.lanes_per_seat or LANES,
                gpus=gpus,
                store=str(store.root),
                scratch=str(scratch),
                save_adapters=options.save_adapters,
                start_seconds=options.seat_timeout or SEAT_TIMEOUT,
                workers=options.workers_per_seat,
                gradient_checkpointing=options.gradient_checkpointing,
                device=options.device,
            )
            self.limits.hold(gpus * plan.workers)
            reused: set[str] = set()

            def told(configuration: Configuration) -> None:
                """The search has asked for one more."""
                fingerprint = configuration.fingerprint
                if self._met(configuration):
                    reused.add(fingerprint)
                    writer.reuse(fingerprint)
                    progress.known += 1
                asked.wanted.append(configuration)
                self.study = self.study.extended([fingerprint], reused)
                self.study.write(self.folder)

            if search is not None:
                search.told = told
            where = "Ray started here" if cluster.local else f"joined Ray, {len(cluster.nodes)} nodes"
            grown = 0 if cluster.local else autoscaler.room(autoscaler.promised() or (), gpus) or 0
            share = f", {gpus * plan.workers:g} GPUs each" if gpus else ""
            progress.say(f"{where}: {count} seats of {plan.lanes} lanes{share}")
            began = time.monotonic()
            steps = train(
                entry(options.scheduler, asked.met, asked.pending, plan.lanes),
                known,
                options.scheduler,
                cluster,
                Room(min(count, asked.new), plan, options.seats is None, grown // plan.workers),
                store,
                scratch,
                progress,
                log,
                self.limits,
                None
                if search is None
                else PerGroupSearch(search, store, options.scheduler, plan.lanes, known),
            )
            early = f", {progress.stopped} of them stopped early" if progress.stopped else ""
            spent = f", {self.limits.spent()}" if self.limits.gpus else ""
            progress.say(f"{progress.done} trained in {clock(time.monotonic() - began)}{early}{spent}")
            trained = [*asked.pending, *(c for c in asked.wanted[before:] if c.fingerprint not in reused)]
            horizons = sum(c.schedule.steps for c in trained)
            progress.say(f"{steps} optimizer steps of {horizons} for all configurations to the end")
        if self.limits.hasty:
            raise KeyboardInterrupt

    def _report(self) -> None:
        """The projections that are files. The table shows the whole study, also what earlier runs asked."""
        from orchestrator.analyze.report import how_to_open, write_report
        from orchestrator.analyze.table import render

        study, folder = self.study, self.folder
        found = [record for f in study.configurations if (record := self.store.get(f)) is not None]
        write_parquet(self.store)
        summary = write_report(
            found,
            folder,
            name=study.name,
            question=study.question,
            command=study.command,
            tracking_uri=shown(self.uri),
            pending=len(study.configurations) - len(found),
            baseline=study.baseline,
            margin=study.margin,
            tuning=folder.parent / study.tuning if study.tuning else None,
            searched=study.searched,
            looks=study.looks,
        )
        picture = next(p for name in PICTURES if (p := folder / name).exists())
        self.console.print(render(summary))
        for what, where in (
            ("Report", folder / "report.html"),
            ("Picture", picture),
            ("MLflow", how_to_open(shown(self.uri)) or "runs are on the tracking server"),
        ):
            self.console.print(f"{what:8} {where}", markup=False, soft_wrap=True)

    def _check(self, asked: Asked) -> int:
        """Says what has no result. Returns the exit code."""
        lacking = [c.fingerprint for c in asked.wanted if not self._met(c)]
        unasked = asked.total - len(asked.wanted)
        if not lacking and not unasked:
            return 0
        if self.limits.reached and (
            unasked or any(self.store.failures(f) < FAILURES_ALLOWED for f in lacking)
        ):
            again = f"{self._done(asked)}; to go on: {self.study.command}"
            self.console.print(f"Ended by {self.limits.reached}: {again}", markup=False, soft_wrap=True)
            return LIMIT
        failed = [f[:12] for f in lacking if self.store.failures(f)]
        why = (
            f"; {self._ours('show ' + ' '.join(failed[:3]))} says why"
            if failed
            else "; see the messages above"
        )
        more = f", {unasked} were not asked for" if unasked else ""
        self.console.print(f"{len(lacking)} configurations failed{more}{why}", markup=False)
        return 1

    def _ours(self, words: str) -> str:
        """A command of ours that finds what this study left."""
        places = [] if self.options.output == default_output() else ["--output", str(self.options.output)]
        places += ["--store", str(self.options.store)] if self.options.store else []
        return " ".join(["python -m orchestrator", words, shlex.join(places)]).strip()


def _needs_hardware(experiment: Experiment, options: StudyOptions) -> None:
    """The full study wants GPUs: without options it does not start on a laptop."""
    if options.dry_run or options.plan or options.task or options.model:
        return
    if ray_cluster.address() is None and not any(n.gpus for n in ray_cluster.this_machine().nodes):
        raise BadInput(
            f"the full study ({experiment.task}) needs a GPU or a Ray cluster (ray up cluster.yaml, or "
            "RAY_ADDRESS) and there is none here; rehearse it with --dry-run, or name a --task for this CPU."
        )
