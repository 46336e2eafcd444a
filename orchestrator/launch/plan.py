"""Output of --plan: the configurations of a study, and the time and price of those that are not known."""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.execution import ray_cluster
from orchestrator.execution.progress import format_duration
from orchestrator.execution.schedulers import scheduler_settings
from orchestrator.finetune.models import loading
from orchestrator.finetune.models.catalogue import UNPREPARED, built_in_names
from orchestrator.finetune.resolve.data import describe_data
from orchestrator.finetune.tasks import catalogue as tasks
from orchestrator.launch.study import Study
from orchestrator.record.store import Store
from orchestrator.record.tables import PARQUET_FILE
from orchestrator.study.configuration import Configuration, ModelChoice
from orchestrator.study.expected import describe
from orchestrator.study.options import Card, StudyOptions
from variants import catalogue
from variants.variant_settings import AdaptationScope

if TYPE_CHECKING:
    from orchestrator.execution.search import Search

Line = tuple[str, str]
"""Label and text of a printed line."""
FROM_HUB = "; the study asks the model hub for it; without a hub give --model a transformers folder"
NOT_CHECKED = ("Not checked", "--rank and --targets: the base model is not here yet")
CARDS: dict[Card, int] = {
    "L4": 121, "A10G": 70, "L40S": 362, "A100": 312, "H100": 989, "H200": 989, "B200": 2250, "RTX 4090": 165,
}  # fmt: skip
"""GPU -> peak of dense bfloat16 products in TFLOP/s, from NVIDIA's data sheets; SXM where there are two."""
PEAK_SHARES = (0.4, 0.15)
"""The shares of a card's peak between which the training of a large and of a small model is guessed to be."""
STARTUP_SECONDS = 25.0
"""Time in which Ray and the first trainer start."""


@dataclass(frozen=True)
class Plan:
    """The content of a plan that was printed."""

    lines: tuple[Line, ...]
    """Label and text of each line."""
    requested: tuple[Configuration, ...]
    """The configurations that are known before the training."""
    pending: tuple[Configuration, ...]
    """Those of `requested` that would be trained."""
    total: int
    """Number of configurations, with those that a search or a later stage adds."""
    num_to_train: int
    """Number of configurations that would be trained."""

    def __repr__(self) -> str:
        return f"<Plan: {self.total} configurations, {self.num_to_train} to train>"


def print_plan(study: Study) -> Plan:
    """Print the configurations of a study and estimates of its time and cost, without starting anything.

    Args:
        study: The study, after `look_up`.

    Returns:
        The content of what was printed.
    """
    lines: list[Line] = []
    for template in {(each.task.name, each.model): each for each in study.templates}.values():
        lines += _task_lines(template, study.store.bases, study.options)
    lines += _configuration_lines(study)
    lines += _cost_lines(study) if study.num_to_train else [("Time", "nothing to train")]
    console = study.console
    wrap = partial(textwrap.fill, width=console.width, break_long_words=False, break_on_hyphens=False)
    for label, text in lines:
        wrapped = wrap(text, initial_indent=f"{label:15} ", subsequent_indent=" " * 16)
        console.print(wrapped, markup=False, soft_wrap=True)
    requested, pending = tuple(study.requested), tuple(study.pending)
    return Plan(tuple(lines), requested, pending, study.total, study.num_to_train)


def _task_lines(template: Configuration, bases: Path, options: StudyOptions) -> list[Line]:
    """Return the lines on a task: its steps, batch size, data and base model, and how many rows are cut."""
    model, batches, task = template.model, template.batches, tasks.get(template.task.name)
    is_here = model.content != UNPREPARED
    batch = batches.batch_size * batches.accumulation
    lines = [("Task", f"{template.task.name}, {template.lr_schedule.steps} steps of {batch}")]
    described = describe_data(template, bases, options.max_length is not None)
    lines += [("Data", text) for text in described[:1]]
    lines += [("Cut rows", f"{template.task.name}: {text}") for text in described[1:]]
    lines += [("Warning", text) for text in task.warnings]
    hint = "" if is_here or model.name in built_in_names() else FROM_HUB
    lines.append(("Base model", f"{model.name} ({model.content[:12] if is_here else model.content}){hint}"))
    return lines if loading.has_config(model) else [*lines, NOT_CHECKED]


def _configuration_lines(study: Study) -> list[Line]:
    """Return the lines on the configurations: variants, learning rates or space, numbers and steps."""
    options, template = study.options, study.templates[0]
    if study.search is not None:
        lines = _search_lines(study.search, template)
    else:
        rates = sorted({c.optimizer.learning_rate for c in study.requested})
        lines = [
            ("Variants", " ".join(dict.fromkeys(c.variant.name for c in study.requested))),
            ("Learning rates", " ".join(f"{rate:g}" for rate in rates)),
        ]
    if options.set:
        lines.append(("Fixed", " ".join(options.set)))
    if options.expected:
        lines.append(("Answer key", describe(options.expected)))
    return [
        *lines,
        ("Seeds", f"{len({c.seed for c in study.requested}) if options.only else options.seed_count}"),
        ("Configurations", f"{study.total}, of them {study.total - study.num_to_train} known"),
        ("Steps", f"at most {study.max_steps()}"),
        ("Early stopping", scheduler_settings(options.scheduler, template) or "none"),
    ]


def _search_lines(search: Search, template: Configuration) -> list[Line]:
    """Return the lines on a search: sampler and variants, and one for each distinct space and its points."""
    variants = dict.fromkeys(group.template.variant.name for group in search.groups.values())
    spaces: dict[str, list[str]] = {}
    for name, group in search.groups.items():
        space = " ".join(f"{key}={spec}" for key, spec in group.specs.items()) or "nothing"
        points = group.num_asked + group.num_remaining
        spaces.setdefault(f"{points} points of {space}", []).append(name)
    search_line = "Search", f"{search.sampler}, {len(search.groups)} searches"
    lines = [search_line, ("Variants", " ".join(variants))]
    if not any("learning_rate" in group.specs for group in search.groups.values()):
        lines.append(("Learning rate", f"{template.optimizer.learning_rate:g}"))
    for space, names in spaces.items():
        each = f", in each of {len(names)} searches" if len(names) > 1 else ""
        lines.append(("Space" if len(spaces) == 1 else f"Space, {names[0]}", f"{space}{each}"))
    return lines


def _probe_hardware(options: StudyOptions) -> tuple[str, int, float]:
    """Return the device of the trainers, their number, and the GPUs of each, before any of them starts.

    The device is `cpu` or the name of the GPU. It is empty, and the number 0, if the cluster decides.
    """
    workers = options.workers_per_trainer
    if options.plan_gpu is not None:
        return options.plan_gpu, options.trainers or 0, workers * (options.gpus_per_worker or 1.0)
    gpus: float | None
    if ray_cluster.running_cluster_address() is not None:
        device, trainers, gpus = "", options.trainers or 0, options.gpus_per_worker
    else:
        device = gpu_name()
        cluster = ray_cluster.estimate_local_cluster()
        trainers, gpus = cluster.plan_trainers(options.trainers, options.gpus_per_worker, workers)
    if options.device == "cpu" or gpus == 0:
        return "cpu", trainers, 0.0
    return device, trainers, workers * (1.0 if gpus is None else gpus)


def gpu_name(proc: Path = Path("/proc/driver/nvidia/gpus")) -> str:
    """Return the name of this machine's GPUs as torch gives it; empty if it is unknown or they differ.

    A MIG slice has a share of its card's memory and speed, so its name differs from the card's. Its size is
    not known here.
    """
    names = set()
    for file in proc.glob("*/information"):
        with suppress(OSError):
            found = re.search(r"^Model:\s*(.+?)\s*$", file.read_text(), re.MULTILINE)
            names.add(found[1] if found else "")
    chosen = (os.environ.get(name, "") for name in ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES"))
    is_slice = any("MIG-" in devices for devices in chosen)
    is_slice = is_slice or any(proc.parent.glob("capabilities/gpu*/mig/gi*"))
    return names.pop() + (" MIG" if is_slice else "") if len(names) == 1 else ""


def find_card(device: str) -> Card | None:
    """Return the card of `CARDS` that a name of a GPU means; None for other cards and for MIG slices."""
    if "MIG" in device:
        return None
    return next((card for card in CARDS if re.search(rf"\b{card}\b", device, re.IGNORECASE)), None)


def _cost_lines(study: Study) -> list[Line]:
    """Return the lines on tokens, time and price of the configurations that are to be trained."""
    options, store = study.options, study.store
    to_train = [*study.pending, *study.unnamed()]
    lines: list[Line] = []
    if all(each.batches.max_length for each in to_train):
        tokens = sum(_count_examples(each) * each.batches.max_length for each in to_train)
        lines.append(("Tokens", f"at most {tokens:,}"))
    device, num_trainers, gpus = _probe_hardware(options)
    card, hours, said = find_card(device), list[float](), ""
    if (measured := _measured_seconds(to_train, store, device)) is not None:
        seconds, where, source = measured
        wait = seconds / num_trainers + STARTUP_SECONDS if num_trainers else seconds
        trainers = f"with --trainers {num_trainers}" if num_trainers else "divided by the number of trainers"
        lines.append(("Time", f"about {format_duration(wait)} {trainers}, {source}"))
        if where != "cpu":
            hours = [seconds * gpus / 3600]
            said = f"about {_span(*hours)} on {where}"
    else:
        lines.append(("Time", "unknown: no lane of this task and model has been trained on such a device"))
        flops = _count_flops(to_train, store, options.gradient_checkpointing) if card else None
        if card and flops:
            lines.append(("FLOPs", f"at most {flops:.2g}, without evaluations"))
            hours = [flops / (share * CARDS[card] * 1e12) / 3600 for share in PEAK_SHARES]
            shares = " to ".join(f"{share:.0%}" for share in PEAK_SHARES)
            speed = f"{shares} of its peak of {CARDS[card]} TFLOP/s"
            said = f"a guess: {_span(*hours)} of one {card}, at {speed}"
        elif card:
            said = "unknown: the model's size is not known, or its inputs are images"
    if said:
        fewer = "" if options.scheduler == "none" or not hours else ", less what early stopping saves"
        lines.append(("GPU hours", f"{said}{fewer}"))
    if hours and (price := options.price_per_hour) is not None:
        cost = _span(*(each * price for each in hours))
        lines.append(("Price", f"{cost} USD, at {price:g} USD for an hour of one GPU"))
    if study.pending and measured is None and device != "cpu":
        # The lowest learning rate is the least likely to diverge early.
        point = min(study.pending, key=lambda c: (c.seed, c.optimizer.learning_rate))
        planned = "--plan and --plan-gpu" if options.plan_gpu else "--plan"
        command = f"the same command with --only {point.fingerprint[:12]} in place of {planned}"
        lines.append(("To know", f"train one of them on such a device, then plan again: {command}"))
    return lines


def _span(*values: float) -> str:
    return " to ".join(dict.fromkeys(f"{float(f'{value:.2g}'):g}" for value in values))


def _count_examples(configuration: Configuration) -> int:
    """Return the number of training examples of all steps."""
    batches = configuration.batches
    return configuration.lr_schedule.steps * batches.batch_size * batches.accumulation


def _count_flops(to_train: Sequence[Configuration], store: Store, checkpointing: bool) -> float | None:
    """Return the FLOPs of the training steps of all configurations, None if they cannot be counted.

    A weight of the base model takes 2 for each token in the forward pass, 2 for the gradients of activations,
    2 for its own gradient if it is trained, and 2 for a second forward pass with checkpointing.
    """
    sizes = {(c.model, c.task.name): _count_weights(c.model, c.task.name, store) for c in to_train}
    total = 0.0
    for each in to_train:
        weights = sizes[each.model, each.task.name]
        if not weights or not each.batches.max_length:
            return None
        scope = catalogue.traits(each.variant.name)["adaptation_scope"]
        is_trained = scope == AdaptationScope.FULL_MODEL
        flops = 4 + 2 * is_trained + 2 * checkpointing
        total += flops * weights * _count_examples(each) * each.batches.max_length
    return total


def _count_weights(model: ModelChoice, task: str, store: Store) -> float | None:
    """Return the number of weights of a base model; of one that is not here, the number in its name."""
    if loading.has_config(model):
        built, _ = loading.build_meta_model(model, store.bases, tasks.get(task))
        return float(sum(parameter.numel() for parameter in built.parameters()))
    found = re.search(r"(?<![\d.])(\d+(?:\.\d+)?)([BM])(?![a-z])", model.name, re.IGNORECASE)
    return float(found[1]) * {"B": 1e9, "M": 1e6}[found[2].upper()] if found else None


def _measured_seconds(
    to_train: Sequence[Configuration], store: Store, device: str
) -> tuple[float, str, str] | None:
    """Return the seconds of all configurations by the mean of finished lanes of the same variant.

    A lane's seconds are its share of its trainer's time. They are taken as proportional to the number of
    training examples. A variant that was not measured is taken as the mean of the others.

    Returns:
        The seconds of one trainer, the device of the lanes, and a phrase about them; None if a task and model
        have no finished lane on such a device.
    """
    if not (path := store.root / PARQUET_FILE).exists():  # every report writes it
        return None
    import pandas as pd  # takes half a second

    columns = ["task", "model", "variant", "device", "steps", "batch_size", "accumulation", "seconds"]
    try:
        finished = [("state", "==", "finished")]
        runs = pd.read_parquet(path, columns=columns, filters=finished)
    except (OSError, ValueError):  # it is damaged; the next report writes it again from the records
        return None
    card, wanted = find_card(device), {(c.task.name, c.model.name) for c in to_train}
    runs = runs.loc[[place in wanted for place in zip(runs.task, runs.model, strict=True)]]
    if device:
        alike = {device, card} - {None}
        runs = runs.loc[[name in alike or find_card(name) in alike for name in runs.device]]
    counts = runs.device.value_counts()
    where = max(counts.index, key=lambda name: (name != "cpu", counts[name]), default="")
    runs = runs[runs.device == where]
    seconds = runs.seconds / (runs.steps * runs.batch_size * runs.accumulation)
    by_task = seconds.groupby([runs.task, runs.model]).mean()
    by_variant = seconds.groupby([runs.task, runs.model, runs.variant]).mean()
    if not len(by_task):
        return None
    total = 0.0
    for each in to_train:
        place = each.task.name, each.model.name
        seconds_each = by_variant.get((*place, each.variant.name), by_task.get(place, 0.0))
        total += _count_examples(each) * seconds_each
    missing = [f"without {task} (not measured)" for task, _ in sorted(wanted - set(by_task.index))]
    return total, where, ", ".join([f"from {len(runs)} lanes measured on {where}", *missing])
