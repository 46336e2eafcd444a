"""What a study would do: printed, nothing started."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from orchestrator.finetune.resolve import UNPREPARED
from orchestrator.record.store import Store
from orchestrator.schedule import cluster
from orchestrator.schedule.progress import clock
from orchestrator.schedule.rungs import settings
from orchestrator.study.configuration import Configuration
from orchestrator.study.options import StudyOptions

LANES = 4  # a seat; more gains nothing on a CPU and is a choice of memory on a GPU
START_SECONDS = 25.0  # Ray, and the first seat


def print_plan(
    console: Console,
    wanted: Sequence[Configuration],
    pending: Sequence[Configuration],
    store: Store,
    options: StudyOptions,
) -> None:
    first = wanted[0]
    rates = sorted({c.optimizer.learning_rate for c in wanted})
    content = first.model.content
    if cluster.address() is None:
        seats, _ = cluster.this_machine().seats(
            options.seats, options.gpus_per_seat, options.workers_per_seat
        )
        where = f"{seats} on this machine"
    else:
        seats = options.seats or 0
        where = f"{seats or 'as many as have room'} on the cluster at {cluster.address()}"
    workers = f", {options.workers_per_seat} workers a seat" if options.workers_per_seat > 1 else ""
    batch = first.batches.batch_size * first.batches.accumulation
    for what, text in (
        ("Task", f"{first.task.name}, {first.schedule.steps} steps of {batch}"),
        ("Base model", f"{first.model.name} ({content if content == UNPREPARED else content[:12]})"),
        ("Variants", " ".join(dict.fromkeys(c.variant.name for c in wanted))),
        ("Learning rates", " ".join(f"{rate:g}" for rate in rates)),
        ("Seeds", f"{options.seeds}"),
        ("Configurations", f"{len(wanted)}, of them {len(wanted) - len(pending)} known"),
        ("Early stopping", settings(options.scheduler, first) or "none"),
        ("Seats", f"{where}, {options.lanes_per_seat or LANES} lanes each{workers}"),
        ("Time", _estimate(pending, store, seats)),
    ):
        console.print(f"{what:15} {text}", markup=False)


def _estimate(pending: Sequence[Configuration], store: Store, seats: int) -> str:
    """For all to the end, from what lanes of the same task and model cost before, wherever that was. `seats`
    0: not known."""
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
        return "unknown: no lane of this task and model has been trained yet"
    seconds = sum(costs) / len(costs) * sum(c.schedule.steps for c in pending)
    source = f"(from {len(costs)} lanes trained before)"
    if not seats:
        return f"about {clock(seconds)} divided by the seats {source}"
    return f"about {clock(seconds / seats + START_SECONDS)} {source}"
