"""A study from its options to its report: what every experiment script calls."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console

from orchestrator.finetune import resolve
from orchestrator.record.parquet import write_parquet
from orchestrator.record.provenance import commit
from orchestrator.record.schema import Record
from orchestrator.record.store import FAILURES_ALLOWED, Store
from orchestrator.record.study_file import StudyFile
from orchestrator.record.tracking_uri import check_uri, default_uri
from orchestrator.schedule import cluster as ray_cluster
from orchestrator.schedule.progress import Progress, clock
from orchestrator.study.configuration import Configuration
from orchestrator.study.errors import BadInput
from orchestrator.study.grid import grid, order_of_entry
from orchestrator.study.options import StudyOptions

LANES = 4  # a seat; more gains nothing on a CPU and is a choice of memory on a GPU
LOG_SECONDS = 60.0  # what MLflow gets at the end of a study to catch up


@dataclass(frozen=True)
class Experiment:
    """What a script adds to the shared options. `task` and `variants` are for a run without such options."""

    script: str
    question: str
    variants: tuple[str, ...]
    task: str
    dry_run_task: str


def run_study(experiment: Experiment, options: StudyOptions) -> int:
    """Trains what is not known yet, logs, reports. Returns the exit code: 0, 1 when configurations failed.
    Raises BadInput, KeyboardInterrupt."""
    console = Console(file=sys.stdout, highlight=False)
    _needs_hardware(experiment, options)
    options.check_output()
    store = Store(options.store_folder)
    uri = options.tracking_uri or default_uri(store)
    check_uri(uri)
    task = experiment.dry_run_task if options.dry_run else experiment.task
    chosen = resolve.names(options, task, experiment.variants, store.bases)
    content = resolve.base(chosen.model, store.bases, None if options.plan else console.print)
    templates = resolve.templates(options, chosen, content, store.bases)
    wanted = grid(templates, chosen.learning_rates, range(options.seeds))
    known = {c.fingerprint for c in wanted if store.meets(c.fingerprint) or _hopeless(store, c)}
    pending = order_of_entry(
        [c for c in wanted if c.fingerprint not in known], options.lanes_per_seat or LANES
    )
    if options.plan:
        _print_plan(console, wanted, pending, store, options, content)
        return 0

    model = Path(chosen.model).name
    name = options.study or "-".join([experiment.script, Path(chosen.task.name).stem, model]).replace(
        "@", "-"
    )
    folder = options.output / name
    folder.mkdir(parents=True, exist_ok=True)
    with _only_driver(folder, name):
        command = shlex.join(["python", *sys.argv])
        study = StudyFile.read(folder) or StudyFile(name, experiment.question, command)
        study = study.extended([c.fingerprint for c in wanted], known)
        study = replace(study, command=command, tracking_uri=options.tracking_uri or "")
        study.write(folder)
        console.print(
            f"{name}: {len(known)} of {len(wanted)} known" + ("" if pending else ", nothing to train")
        )
        return _run(console, folder, study, store, uri, options, wanted, pending)


def _run(
    console: Console,
    folder: Path,
    study: StudyFile,
    store: Store,
    uri: str,
    options: StudyOptions,
    wanted: Sequence[Configuration],
    pending: Sequence[Configuration],
) -> int:
    from orchestrator.record.mlflow_log import MlflowLog
    from orchestrator.record.writer import Writer

    writer = Writer(MlflowLog(uri), store, study, adapters=options.save_adapters, tags={"commit": commit()})
    waiting = {c.fingerprint for c in pending}
    for configuration in wanted:
        if configuration.fingerprint not in waiting:
            writer.put(configuration.fingerprint)
    progress = Progress(folder, len(wanted), len(wanted) - len(pending), console)
    status = "KILLED"
    try:
        with progress:
            if pending:
                _train(pending, store, options, progress, writer.put)
        status = "FINISHED"
    finally:
        if status == "KILLED":
            console.print(f"Stopped. What is done is kept; to go on: {study.command}", markup=False)
        _report(console, folder, study, store, uri)
        files = [folder / name for name in ("report.html", "curves.png", "spread.png", "summary.json")]
        late = writer.close(LOG_SECONDS if status == "FINISHED" else 5.0, status, files)
        if late:
            console.print(
                f"MLflow: {late} runs delayed ({writer.error}); {_ours('sync', options)} logs them later.",
                markup=False,
            )
    records = [store.get(c.fingerprint) for c in wanted]
    failed = [record for record in records if record is None or record.state == "failed"]
    if failed:
        ids = " ".join(record.fingerprint[:12] for record in failed[:5] if record)
        console.print(f"{len(failed)} failed; {_ours(f'show {ids}', options)} says why.", markup=False)
    return 1 if failed else 0


def _train(
    pending: Sequence[Configuration],
    store: Store,
    options: StudyOptions,
    progress: Progress,
    ended: Callable[[Record], None],
) -> None:
    # Imported here: Tune reads its environment, which `connect` sets, when it is imported.
    with ray_cluster.connect(store.root) as cluster, _scratch(store, cluster.nodes) as scratch:
        from orchestrator.schedule import seats
        from orchestrator.schedule.seat import SeatPlan
        from orchestrator.schedule.train import Room, train

        count, gpus = seats.how_many(cluster, options.seats, options.gpus_per_seat)
        lanes = options.lanes_per_seat or LANES
        plan = SeatPlan(
            lanes=lanes,
            gpus=gpus,
            store=str(store.root.resolve()),
            scratch=str(scratch),
            save_adapters=options.save_adapters,
            start_seconds=options.seat_timeout,
        )
        where = "Ray started here" if cluster.local else f"joined Ray, {cluster.nodes} nodes"
        progress.say(f"{where}: {count} seats of {lanes} lanes, {gpus:g} GPUs each")
        began = time.monotonic()
        train(pending, cluster, Room(min(count, len(pending)), plan), store, scratch, progress, ended)
        progress.say(f"{progress.done} trained in {clock(time.monotonic() - began)}")


def _report(console: Console, folder: Path, study: StudyFile, store: Store, uri: str) -> None:
    """The projections that are files. The table shows the whole study, also what earlier runs of it asked."""
    from orchestrator.analyze.report import how_to_open, write_report
    from orchestrator.analyze.table import render

    found = [record for f in study.configurations if (record := store.get(f)) is not None]
    write_parquet(store)
    summary = write_report(
        found,
        folder,
        name=study.name,
        question=study.question,
        command=study.command,
        tracking_uri=uri,
        pending=len(study.configurations) - len(found),
    )
    console.print(render(summary))
    console.print(
        f"Report: {folder / 'report.html'}   Picture: {folder / 'curves.png'}", markup=False, soft_wrap=True
    )
    console.print(f"MLflow: {how_to_open(uri)}", markup=False, soft_wrap=True)


def _needs_hardware(experiment: Experiment, options: StudyOptions) -> None:
    """The full study wants GPUs: without options it does not start on a laptop."""
    if options.dry_run or options.plan or options.task or options.model:
        return
    if ray_cluster.address() is None and not Path("/dev/nvidiactl").exists():
        raise BadInput(
            f"the full study ({experiment.task}) needs a GPU or a Ray cluster (ray up cluster.yaml, or "
            "RAY_ADDRESS) and there is none here; rehearse it with --dry-run, or name a --task for this CPU."
        )


def _ours(words: str, options: StudyOptions) -> str:
    """A command of ours that finds what this study left."""
    places = [] if options.output == Path("results") else ["--output", str(options.output)]
    places += ["--store", str(options.store)] if options.store else []
    return " ".join(["python -m orchestrator", words, shlex.join(places)]).strip()


def _hopeless(store: Store, configuration: Configuration) -> bool:
    return store.failures(configuration.fingerprint) >= FAILURES_ALLOWED


@contextmanager
def _only_driver(folder: Path, name: str) -> Iterator[None]:
    """One driver a study: the lock goes with the process, however that ends."""
    try:
        with FileLock(folder / ".lock", timeout=2):
            yield
    except Timeout:
        raise BadInput(
            f"study {name!r} is running already in {folder}; wait for it, or take another --study."
        ) from None


@contextmanager
def _scratch(store: Store, nodes: int) -> Iterator[Path]:
    """A folder for what Ray Tune and Train write for themselves: nothing of it outlives the study."""
    parent = store.root if nodes > 1 else None
    folder = Path(tempfile.mkdtemp(prefix="ray-scratch-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _print_plan(
    console: Console,
    wanted: Sequence[Configuration],
    pending: Sequence[Configuration],
    store: Store,
    options: StudyOptions,
    content: str,
) -> None:
    first = wanted[0]
    rates = sorted({c.optimizer.learning_rate for c in wanted})
    variants = list(dict.fromkeys(c.variant.name for c in wanted))
    seats = options.seats or ("one a GPU of the cluster" if ray_cluster.address() else os.cpu_count() or 1)
    base = content if content == resolve.UNPREPARED else content[:12]
    console.print(
        f"Task            {first.task.name}, {first.schedule.steps} steps of {first.batches.batch_size}"
    )
    console.print(f"Base model      {first.model.name} ({base}), {first.model.dtype}")
    console.print(f"Variants        {' '.join(variants)}")
    console.print(f"Learning rates  {' '.join(f'{rate:g}' for rate in rates)}")
    console.print(f"Seeds           {options.seeds}")
    console.print(f"Configurations  {len(wanted)}, of them {len(wanted) - len(pending)} known")
    console.print(f"Seats           {seats}, {options.lanes_per_seat or LANES} lanes each")
    console.print(f"Time            {_estimate(pending, store, seats if isinstance(seats, int) else 1)}")


def _estimate(pending: Sequence[Configuration], store: Store, seats: int) -> str:
    """From what lanes of the same task and model cost before, wherever that was."""
    if not pending:
        return "nothing to train"
    first = pending[0]
    costs = [
        (r.cost.train_seconds + r.cost.evaluate_seconds) / max(1, r.steps)
        for r in store.records()
        if r.state == "finished"
        and (r.configuration.task.name, r.configuration.model) == (first.task.name, first.model)
    ]
    if not costs:
        return "unknown until a first lane of this task and model has been trained"
    seconds = sum(costs) / len(costs) * sum(c.schedule.steps for c in pending) / seats
    return f"about {clock(seconds + 20)} (from {len(costs)} lanes trained before; 20 s of start)"
