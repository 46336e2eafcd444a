"""What a study would do: printed, nothing started."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from rich.console import Console

from orchestrator.execution.progress import clock
from orchestrator.execution.ray import runtime
from orchestrator.execution.search.budget import Ledger
from orchestrator.execution.search.search_file import Spent
from orchestrator.execution.tune.rungs import settings
from orchestrator.finetune.models.loading import UNPREPARED
from orchestrator.finetune.resolve import has_shapes
from orchestrator.launch import cost
from orchestrator.launch.estimate import Estimate, estimates
from orchestrator.record.schema import Record
from orchestrator.record.show import narrowed
from orchestrator.record.store import Store
from orchestrator.study.configuration import Configuration
from orchestrator.study.options import StudyOptions
from orchestrator.util.command import typed

LANES = 4  # a seat; more gains nothing on a CPU and is a choice of memory on a GPU
START_SECONDS = 25.0  # Ray, and the first seat
UNKNOWN = "unknown: no lane of this task and model has been trained on such a device yet"

UNCHECKED = "--rank and --targets: the base model is not here yet"


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
    gpus: float | None
    if runtime.address() is None:
        seats, gpus = runtime.this_machine().seats(
            options.seats, options.gpus_per_seat, options.workers_per_seat
        )
        where, device = f"{seats} on this machine", runtime.gpu_name()
    else:
        seats, gpus, device = options.seats or 0, options.gpus_per_seat, ""
        where = f"{seats or 'as many as have room'} on the cluster at {runtime.address()}"
    gpus = 0.0 if options.device == "cpu" else gpus
    lanes = options.lanes_per_seat or LANES
    unasked = [
        replace(first, variant=replace(first.variant, name=variant))
        for variant in (search.space.variants if search else ())
        for _ in range(search.left(variant) if search else 0)
    ]
    found = estimates([*pending, *unasked], store, lanes, options.workers_per_seat)
    found = [each for each in found if _may_be(each.device, gpus, device)]
    workers = f", {options.workers_per_seat} workers a seat" if options.workers_per_seat > 1 else ""
    batch = first.batches.batch_size * first.batches.accumulation
    for what, text in (
        ("Task", f"{first.task.name}, {first.schedule.steps} steps of {batch}"),
        ("Base model", f"{first.model.name} ({content if content == UNPREPARED else content[:12]})"),
        *([] if has_shapes(first.model) else [("Not checked", UNCHECKED)]),
        *(_search(search, first) if search else ()),
        *([] if search else [("Variants", " ".join(dict.fromkeys(c.variant.name for c in wanted)))]),
        *([] if search else [("Learning rates", " ".join(f"{rate:g}" for rate in rates))]),
        *([("Fixed", " ".join(options.set))] if options.set else []),
        ("Seeds", f"{options.seed_count}"),
        ("Configurations", f"{total}, of them {total - left} known"),
        ("Steps", f"at most {left * first.schedule.steps}"),
        ("Early stopping", settings(options.scheduler, first) or "none"),
        ("Seats", f"{where}, {lanes} lanes each{workers}"),
        *(_time(each, seats) for each in found),
        *([] if found else [("Time", UNKNOWN if left else "nothing to train")]),
    ):
        console.print(f"{what:15} {text}", markup=False)
    for what, text in cost.lines(found, gpus, device, options) if left else ():
        console.print(f"{what:15} {text}", markup=False)
    if pending and not found and gpus != 0:
        command = f"To know, train one of them, then plan again:\n  {_one_point(pending)}"
        console.print(command, markup=False, soft_wrap=True)


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


def _may_be(device: str, gpus: float | None, here: str) -> bool:
    """Whether seats may train on such a device. `gpus` of a worker and the GPU's name, as far as known."""
    if gpus is None:
        return True
    return device == (here or device) != "cpu" if gpus else device == "cpu"


def _time(found: Estimate, seats: int) -> tuple[str, str]:
    """`seats` 0: not known."""
    start = START_SECONDS if seats else 0.0
    ends = dict.fromkeys(clock(s / max(1, seats) + start) for s in (found.low, found.high))
    divided = "" if seats else " divided by the seats"
    return "Time", f"about {' to '.join(ends)}{divided}, {found.source}"


def _one_point(pending: Sequence[Configuration]) -> str:
    """The command that trains one of them alone: at the lowest rate, as a diverged lane would not tell."""
    from orchestrator.analyze import formatting

    point = min(pending, key=lambda c: (c.seed, c.optimizer.learning_rate))
    command = narrowed(typed(sys.argv), Record(point.fingerprint, point, "failed", 0))
    # In the plain script and its own study: one of two stages would make its choice of this point.
    command = formatting.narrowed(command, point.variant.name, [point.optimizer.learning_rate], {})
    pairs = pairwise(["", *shlex.split(command)])
    return shlex.join(
        word for before, word in pairs if before != "--study" and not word.startswith(("--study", "--plan"))
    )
