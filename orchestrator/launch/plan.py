"""What a study would do: printed, nothing started."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from rich.console import Console

from orchestrator.execution.progress import format_duration
from orchestrator.execution.ray import runtime
from orchestrator.execution.search.budget import SearchBudget
from orchestrator.execution.search.search_file import VariantUsage
from orchestrator.execution.tune.rungs import scheduler_settings
from orchestrator.finetune.models.loading import UNPREPARED
from orchestrator.finetune.resolve import has_layer_shapes
from orchestrator.launch import cost
from orchestrator.launch.estimate import TimeEstimate, estimate_times
from orchestrator.record.schema import Record
from orchestrator.record.show import narrow_command
from orchestrator.record.store import Store
from orchestrator.study.configuration import Configuration
from orchestrator.study.options import StudyOptions
from orchestrator.util.command import format_command

DEFAULT_LANES_PER_TRAINER = 4  # a seat; more gains nothing on a CPU and is a choice of memory on a GPU
STARTUP_SECONDS = 25.0  # Ray, and the first seat
UNKNOWN_TIME = "unknown: no lane of this task and model has been trained on such a device yet"

UNCHECKED_OPTIONS = "--rank and --targets: the base model is not here yet"


def print_plan(
    console: Console,
    template: Configuration,
    requested: Sequence[Configuration],
    pending: Sequence[Configuration],
    store: Store,
    options: StudyOptions,
    search: SearchBudget | None,
) -> None:
    """`first`: a configuration that has in common with all others what is printed once."""
    rates = sorted({c.optimizer.learning_rate for c in requested})
    total = search.total if search else len(requested)
    num_to_train = len(pending) + total - len(requested)
    content = template.model.content
    gpus_per_worker: float | None
    if runtime.running_cluster_address() is None:
        num_trainers, gpus_per_worker = runtime.estimate_local_cluster().plan_trainers(
            options.trainers, options.gpus_per_worker, options.workers_per_trainer
        )
        where, device = f"{num_trainers} on this machine", runtime.gpu_name()
    else:
        num_trainers, gpus_per_worker, device = options.trainers or 0, options.gpus_per_worker, ""
        where = (
            f"{num_trainers or 'as many as have room'} on the cluster at {runtime.running_cluster_address()}"
        )
    gpus_per_worker = 0.0 if options.device == "cpu" else gpus_per_worker
    lanes_per_trainer = options.lanes_per_trainer or DEFAULT_LANES_PER_TRAINER
    unsampled = [
        replace(template, variant=replace(template.variant, name=variant))
        for variant in (search.space.variants if search else ())
        for _ in range(search.num_remaining(variant) if search else 0)
    ]
    time_estimates = estimate_times(
        [*pending, *unsampled], store, lanes_per_trainer, options.workers_per_trainer
    )
    time_estimates = [each for each in time_estimates if _can_train_on(each.device, gpus_per_worker, device)]
    workers = f", {options.workers_per_trainer} workers a seat" if options.workers_per_trainer > 1 else ""
    batch = template.batches.batch_size * template.batches.accumulation
    for what, text in (
        ("Task", f"{template.task.name}, {template.schedule.steps} steps of {batch}"),
        ("Base model", f"{template.model.name} ({content if content == UNPREPARED else content[:12]})"),
        *([] if has_layer_shapes(template.model) else [("Not checked", UNCHECKED_OPTIONS)]),
        *(_search_lines(search, template) if search else ()),
        *([] if search else [("Variants", " ".join(dict.fromkeys(c.variant.name for c in requested)))]),
        *([] if search else [("Learning rates", " ".join(f"{rate:g}" for rate in rates))]),
        *([("Fixed", " ".join(options.set))] if options.set else []),
        ("Seeds", f"{options.seed_count}"),
        ("Configurations", f"{total}, of them {total - num_to_train} known"),
        ("Steps", f"at most {num_to_train * template.schedule.steps}"),
        ("Early stopping", scheduler_settings(options.scheduler, template) or "none"),
        ("Seats", f"{where}, {lanes_per_trainer} lanes each{workers}"),
        *(_time_line(each, num_trainers) for each in time_estimates),
        *([] if time_estimates else [("Time", UNKNOWN_TIME if num_to_train else "nothing to train")]),
    ):
        console.print(f"{what:15} {text}", markup=False)
    for what, text in (
        cost.cost_lines(time_estimates, gpus_per_worker, device, options) if num_to_train else ()
    ):
        console.print(f"{what:15} {text}", markup=False)
    if pending and not time_estimates and gpus_per_worker != 0:
        command = f"To know, train one of them, then plan again:\n  {_single_point_command(pending)}"
        console.print(command, markup=False, soft_wrap=True)


def print_point_shortfall(console: Console, spent: Mapping[str, VariantUsage], points: int) -> None:
    """Which variants had fewer points than the budget, because their space has no more."""
    for variant, each in spent.items():
        if each.points < points:
            console.print(f"{variant}: {each.points} points of {points}: its space has no more", markup=False)


def _search_lines(search: SearchBudget, template: Configuration) -> list[tuple[str, str]]:
    """The sampler, and the space: on one line where it is the same for all variants."""
    counts = {
        variant: search.num_asked[variant] + search.num_remaining(variant)
        for variant in search.space.variants
    }
    if len(set(counts.values())) == 1:
        budget = f"{next(iter(counts.values()))} points of each variant"
    else:
        budget = f"points: {', '.join(f'{count} of {variant}' for variant, count in counts.items())}"
    lines = [("Search", f"{search.file.sampler}, {budget}")]
    if not any(d.name == "learning_rate" for d in search.space.dimensions):
        lines.append(("Learning rate", f"{template.optimizer.learning_rate:g}"))
    texts = {
        variant: " ".join(f"{d.key}={d.spec_text}" for d in dimensions) or "nothing"
        for variant, dimensions in search.space.variants.items()
    }
    if len(set(texts.values())) == 1:
        return [*lines, ("Variants", " ".join(texts)), ("Space", next(iter(texts.values())))]
    return [*lines, *((f"Space, {variant}", text) for variant, text in texts.items())]


def _can_train_on(device: str, gpus_per_worker: float | None, local_gpu: str) -> bool:
    """Whether seats may train on such a device. `gpus` of a worker and the GPU's name, as far as known."""
    if gpus_per_worker is None:
        return True
    return device == (local_gpu or device) != "cpu" if gpus_per_worker else device == "cpu"


def _time_line(estimate: TimeEstimate, num_trainers: int) -> tuple[str, str]:
    """`seats` 0: not known."""
    start = STARTUP_SECONDS if num_trainers else 0.0
    ends = dict.fromkeys(
        format_duration(s / max(1, num_trainers) + start)
        for s in (estimate.low_seconds, estimate.high_seconds)
    )
    divided = "" if num_trainers else " divided by the seats"
    return "Time", f"about {' to '.join(ends)}{divided}, {estimate.source_text}"


def _single_point_command(pending: Sequence[Configuration]) -> str:
    """The command that trains one of them alone: at the lowest rate, as a diverged lane would not tell."""
    from orchestrator.analyze import formatting

    point = min(pending, key=lambda c: (c.seed, c.optimizer.learning_rate))
    command = narrow_command(format_command(sys.argv), Record(point.fingerprint, point, "failed", 0))
    # In the plain script and its own study: one of two stages would make its choice of this point.
    command = formatting.narrow_command(command, point.variant.name, [point.optimizer.learning_rate], {})
    pairs = pairwise(["", *shlex.split(command)])
    return shlex.join(
        word for before, word in pairs if before != "--study" and not word.startswith(("--study", "--plan"))
    )
