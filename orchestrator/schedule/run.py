"""A study from its options to its report: what every experiment script calls."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
from rich.console import Console

from orchestrator.finetune import resolve
from orchestrator.record.parquet import write_parquet
from orchestrator.record.provenance import commit
from orchestrator.record.schema import FAILURES_ALLOWED, Record
from orchestrator.record.store import Store
from orchestrator.record.study_file import StudyFile
from orchestrator.record.tracking_uri import check_uri, default_uri
from orchestrator.schedule import cluster as ray_cluster
from orchestrator.schedule.plan import LANES, print_plan
from orchestrator.schedule.progress import Progress, clock
from orchestrator.schedule.rungs import entry, settings
from orchestrator.study.configuration import Configuration
from orchestrator.study.errors import BadInput
from orchestrator.study.grid import grid, order_of_entry
from orchestrator.study.options import StudyOptions

LOG_SECONDS = 60.0  # what MLflow gets at the end of a study to catch up
HASTE_SECONDS = 5.0  # the same after Ctrl-C
Log = Callable[[Record], None]
REPORT = ("report.html", "curves.png", "spread.png", "summary.json")


@dataclass(frozen=True)
class Experiment:
    """What a script adds to the shared options. `task` and `variants` are for a run without such options."""

    script: str
    question: str
    variants: tuple[str, ...]
    task: str
    dry_run_task: str


def run_study(
    experiment: Experiment,
    options: StudyOptions,
    check: Callable[[Sequence[Configuration]], None] = lambda wanted: None,
) -> int:
    """Trains what is not known yet, logs, reports. Returns the exit code: 0, 1 when configurations have no
    result. `check` may refuse, with BadInput, what is asked for. Raises BadInput, Trouble,
    KeyboardInterrupt."""
    console = Console(file=sys.stdout, highlight=False)
    _needs_hardware(experiment, options)
    options.check_output()
    store = Store(options.store_folder)
    uri = options.tracking_uri or default_uri(store)
    check_uri(uri)
    task = experiment.dry_run_task if options.dry_run else experiment.task
    chosen = resolve.names(options, task, experiment.variants, store.bases)
    if ray_cluster.address() is None:  # more than this machine has is refused before anything is made
        ray_cluster.this_machine().seats(options.seats, options.gpus_per_seat, options.workers_per_seat)
    content = resolve.base(chosen.model, store.bases, None if options.plan else console.print)
    templates = resolve.templates(options, chosen, content, store.bases)
    wanted = grid(templates, chosen.learning_rates, range(options.seeds))
    if options.retry_failed and not options.plan:
        for configuration in wanted:
            store.forget_failures(configuration.fingerprint)
    hopeless = {c.fingerprint for c in wanted if store.failures(c.fingerprint) >= FAILURES_ALLOWED}
    met = [c for c in wanted if store.meets(c.fingerprint, settings(options.scheduler, c))]
    known = hopeless | {c.fingerprint for c in met}
    new = [c for c in wanted if c.fingerprint not in known]
    pending = order_of_entry(new, options.lanes_per_seat or LANES)
    if options.plan:
        print_plan(console, wanted, pending, store, options)
        return 0

    check(wanted)
    parts = [experiment.script, Path(chosen.task.name).stem, Path(chosen.model).name]
    name = options.study or "-".join(parts).replace("@", "-")
    folder = options.output / name
    folder.mkdir(parents=True, exist_ok=True)
    refusal = f"study {name!r} is running already in {folder}; wait for it, or take another --study."
    with ray_cluster.exclusively(folder / ".lock", refusal):
        command = shlex.join(["python", *sys.argv])
        study = StudyFile.read(folder) or StudyFile(name, experiment.question, command)
        study = study.extended([c.fingerprint for c in wanted], known)
        study = replace(study, command=command, tracking_uri=options.tracking_uri or "")
        study.write(folder)
        console.print(f"{name}: {len(known)} of {len(wanted)} known{'' if pending else ', nothing to train'}")
        if hopeless:
            console.print(f"{len(hopeless)} of them failed three times; --retry-failed tries them again")
        return _Run(console, folder, study, store, uri, options).all(wanted, met, pending)


@dataclass(frozen=True)
class _Run:
    console: Console
    folder: Path
    study: StudyFile
    store: Store
    uri: str
    options: StudyOptions

    def all(
        self, wanted: Sequence[Configuration], met: Sequence[Configuration], pending: Sequence[Configuration]
    ) -> int:
        """`wanted` is what the study asks for: `met` by records, `pending`, or given up."""
        from orchestrator.record.mlflow_log import MlflowLog
        from orchestrator.record.writer import Writer

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
            if pending:
                self._train(len(wanted), met, pending, log)
            status, report = "FINISHED", True
        except BadInput:
            raise  # nothing was trained: there is nothing to report
        except BaseException as error:
            report = True
            if isinstance(error, KeyboardInterrupt):
                again = f"Stopped. What is done is kept; to go on: {self.study.command}"
                self.console.print(again, markup=False)
            raise
        finally:
            # Known ones, and those whose end nobody was told (the broker restarted, the study was stopped).
            for configuration in wanted:
                if configuration.fingerprint not in logged:
                    writer.put(configuration.fingerprint)
            if report:
                self._report()
            files = [self.folder / name for name in REPORT] if report else []
            late = writer.close(LOG_SECONDS if status == "FINISHED" else HASTE_SECONDS, status, files)
            if late:
                later = f"{self._ours('sync')} logs them later."
                self.console.print(f"MLflow: {late} runs delayed ({writer.error}); {later}", markup=False)
        return self._check(wanted)

    def _train(
        self, wanted: int, met: Sequence[Configuration], pending: Sequence[Configuration], log: Log
    ) -> None:
        options, store = self.options, self.store
        progress = Progress(self.folder, wanted, wanted - len(pending), self.console)
        with progress, _scratch(store) as scratch, ray_cluster.connect(store.root) as cluster:
            # Imported here: Tune reads its environment, which `connect` sets, when it is imported.
            from orchestrator.schedule.seat import SeatPlan
            from orchestrator.schedule.train import Room, train

            count, gpus = cluster.seats(options.seats, options.gpus_per_seat, options.workers_per_seat)
            plan = SeatPlan(
                lanes=options.lanes_per_seat or LANES,
                gpus=gpus,
                store=str(store.root),
                scratch=str(scratch),
                save_adapters=options.save_adapters,
                start_seconds=options.seat_timeout,
                workers=options.workers_per_seat,
                gradient_checkpointing=options.gradient_checkpointing,
            )
            where = "Ray started here" if cluster.local else f"joined Ray, {len(cluster.nodes)} nodes"
            share = f", {gpus * plan.workers:g} GPUs each" if gpus else ""
            progress.say(f"{where}: {count} seats of {plan.lanes} lanes{share}")
            began = time.monotonic()
            steps = train(
                entry(options.scheduler, met, pending, plan.lanes),
                {c.fingerprint for c in met},
                options.scheduler,
                cluster,
                Room(min(count, len(pending)), plan),
                store,
                scratch,
                progress,
                log,
            )
            early = f", {progress.stopped} of them stopped early" if progress.stopped else ""
            progress.say(f"{progress.done} trained in {clock(time.monotonic() - began)}{early}")
            horizons = sum(c.schedule.steps for c in pending)
            progress.say(f"{steps} optimizer steps of {horizons} for all configurations to the end")

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
            tracking_uri=self.uri,
            pending=len(study.configurations) - len(found),
        )
        self.console.print(render(summary))
        for what, where in (
            ("Report", folder / "report.html"),
            ("Picture", folder / "curves.png"),
            ("MLflow", how_to_open(self.uri) or "runs are on the tracking server"),
        ):
            self.console.print(f"{what:8} {where}", markup=False, soft_wrap=True)

    def _check(self, wanted: Sequence[Configuration]) -> int:
        """Says what has no result. Returns the exit code."""
        scheduler = self.options.scheduler
        lacking = [
            c.fingerprint for c in wanted if self.store.meets(c.fingerprint, settings(scheduler, c)) is None
        ]
        if not lacking:
            return 0
        failed = [f[:12] for f in lacking if self.store.failures(f)]
        why = (
            f"; {self._ours('show ' + ' '.join(failed[:3]))} says why"
            if failed
            else "; see the messages above"
        )
        self.console.print(f"{len(lacking)} configurations failed{why}", markup=False)
        return 1

    def _ours(self, words: str) -> str:
        """A command of ours that finds what this study left."""
        places = [] if self.options.output == Path("results") else ["--output", str(self.options.output)]
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


@contextmanager
def _scratch(store: Store) -> Iterator[Path]:
    """A folder, on the storage that all nodes see, for what Ray Tune and Train write for themselves. Nothing
    of it outlives the study; what a killed one left goes with the next."""
    here = os.uname().nodename
    parent = store.root / "scratch"
    for old in parent.glob(f"{here}-*"):
        if not psutil.pid_exists(int(old.name.rpartition("-")[2])):
            shutil.rmtree(old, ignore_errors=True)
    folder = parent / f"{here}-{os.getpid()}"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
