"""What a study would do: printed, nothing started."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console

from orchestrator.finetune.resolve import UNPREPARED
from orchestrator.record.store import Store
from orchestrator.schedule import cluster
from orchestrator.schedule.ledger import Ledger
from orchestrator.schedule.progress import clock
from orchestrator.schedule.rungs import settings
from orchestrator.schedule.search_file import Spent
from orchestrator.study.configuration import Configuration
from orchestrator.study.options import StudyOptions

LANES = 4  # a seat; more gains nothing on a CPU and is a choice of memory on a GPU
START_SECONDS = 25.0  # Ray, and the first seat


def print_plan(
    console: Console,
    first: Configuration,
    wanted: Sequence[Configuration],
    pending: Sequence[Configuration],
    store: Store,
    options: StudyOptions,
    search: Ledger | None,
) -> None:
    """`first`: a configuration that has in common with all others what is printed once."""
    rates = sorted({c.optimizer.learning_rate for c in wanted})
    total = search.total if search else len(wanted)
    left = len(pending) + total - len(wanted)
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
        *(_search(search, first) if search else ()),
        *([] if search else [("Variants", " ".join(dict.fromkeys(c.variant.name for c in wanted)))]),
        *([] if search else [("Learning rates", " ".join(f"{rate:g}" for rate in rates))]),
        *([("Fixed", " ".join(options.set))] if options.set else []),
        ("Seeds", f"{options.seed_count}"),
        ("Configurations", f"{total}, of them {total - left} known"),
        ("Steps", f"at most {left * first.schedule.steps}"),
        ("Early stopping", settings(options.scheduler, first) or "none"),
        ("Seats", f"{where}, {options.lanes_per_seat or LANES} lanes each{workers}"),
        ("Time", _estimate(first, left, store, seats)),
    ):
        console.print(f"{what:15} {text}", markup=False)


def print_short(console: Console, spent: Mapping[str, Spent], points: int) -> None:
    """Which variants had fewer points than the budget, because their space has no more."""
    for variant, each in spent.items():
        if each.points < points:
            console.print(f"{variant}: {each.points} points of {points}: its space has no more", markup=False)


def _search(search: Ledger, first: Configuration) -> list[tuple[str, str]]:
    """The sampler, and the space: on one line where it is the same for all variants."""
    counts = {variant: search.counts[variant] + search.left(variant) for variant in search.space.variants}
    if len(set(counts.values())) == 1:
        budget = f"{next(iter(counts.values()))} points of each variant"
    else:
        budget = f"points: {', '.join(f'{count} of {variant}' for variant, count in counts.items())}"
    lines = [("Search", f"{search.file.sampler}, {budget}")]
    if not any(d.name == "learning_rate" for d in search.space.dimensions):
        lines.append(("Learning rate", f"{first.optimizer.learning_rate:g}"))
    texts = {
        variant: " ".join(f"{d.key}={d.text}" for d in dimensions) or "nothing"
        for variant, dimensions in search.space.variants.items()
    }
    if len(set(texts.values())) == 1:
        return [*lines, ("Variants", " ".join(texts)), ("Space", next(iter(texts.values())))]
    return [*lines, *((f"Space, {variant}", text) for variant, text in texts.items())]


def _estimate(first: Configuration, left: int, store: Store, seats: int) -> str:
    """For all to the end, from what lanes of the same task and model cost before, wherever that was. `seats`
    0: not known."""
    if not left:
        return "nothing to train"
    costs = [
        (r.cost.train_seconds + r.cost.evaluate_seconds) / max(1, r.steps)
        for r in store.records()
        if r.state == "finished"
        and (r.configuration.task.name, r.configuration.model) == (first.task.name, first.model)
    ]
    if not costs:
        return "unknown: no lane of this task and model has been trained yet"
    seconds = sum(costs) / len(costs) * left * first.schedule.steps
    source = f"(from {len(costs)} lanes trained before)"
    if not seats:
        return f"about {clock(seconds)} divided by the seats {source}"
    return f"about {clock(seconds / seats + START_SECONDS)} {source}"
