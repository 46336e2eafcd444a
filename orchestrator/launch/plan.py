"""Output of --plan: configurations, estimates of their time and cost, and the protocol of a preset."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Mapping, Sized
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from orchestrator.execution.ray import runtime
from orchestrator.execution.rungs import scheduler_settings
from orchestrator.finetune.models import loading
from orchestrator.finetune.models.catalogue import UNPREPARED, built_in_names
from orchestrator.finetune.resolve.data_lengths import report_truncation
from orchestrator.finetune.resolve.templates import has_layer_shapes
from orchestrator.finetune.tasks import catalogue as tasks
from orchestrator.finetune.tasks.data_task import DataTask
from orchestrator.launch.cost import Line, cost_lines, require_card
from orchestrator.launch.study import Study
from orchestrator.study.configuration import Configuration
from orchestrator.study.option_groups import GridOptions, SearchOptions, TrainingOptions
from orchestrator.study.options import StudyOptions, setting_key
from orchestrator.study.presets import (
    Preset,
    main_grid_runs,
    preset_defaults,
    published_words,
    read_preset,
    read_variants,
    split_variants,
)
from variants import catalogue

if TYPE_CHECKING:
    from orchestrator.execution.search.budget import SearchBudget
    from orchestrator.execution.search.search_file import GroupUsage

LABEL_WIDTH = 15
FROM_HUB = (
    "; the study asks the model hub for it; without a hub give --model a folder with a transformers model"
)
UNCHECKED_OPTIONS = "--rank and --targets: the base model is not here yet"


@dataclass(frozen=True)
class _Hardware:
    """The number of trainers of a study and their devices, as far as they are known before it starts."""

    num_trainers: int
    """Number of trainers; 0 if the cluster decides."""
    gpus_per_worker: float | None
    """GPUs of each worker; None if the cluster decides."""
    device: str
    """`cpu`, or the name of the GPU; empty if it is unknown."""
    place: str
    """Description of the trainers, for the output."""


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
    options, console = study.options, study.console
    hardware = _probe_hardware(options)
    lines = [*_configuration_lines(study), *_trainer_lines(hardware, study)]
    is_measured = True
    if study.num_to_train:
        found, is_measured = cost_lines(
            [*study.pending, *study.unnamed()],
            study.store,
            hardware.device,
            hardware.num_trainers,
            1.0 if hardware.gpus_per_worker is None else hardware.gpus_per_worker,
            options,
        )
        lines += found
    else:
        lines.append(("Time", "nothing to train"))
    for label, text in lines:
        _print_line(console, label, text)
    if study.pending and not is_measured and hardware.device != "cpu":
        # The lowest learning rate is the least likely to diverge early.
        point = min(study.pending, key=lambda c: (c.seed, c.optimizer.learning_rate))
        where = f" on a machine with GPUs of type {options.plan_gpu}" if options.plan_gpu else ""
        text = (
            f"To know, train one of them{where}, then plan again: "
            f"the same command with --only {point.fingerprint[:12]} in place of --plan"
        )
        console.print(text, markup=False, soft_wrap=True)
    requested, pending = tuple(study.requested), tuple(study.pending)
    return Plan(tuple(lines), requested, pending, study.total, study.num_to_train)


def _print_line(console: Console, label: str, text: str) -> None:
    """Print a line of the plan; where it is wider than the terminal, the text continues below itself."""
    indent = " " * (LABEL_WIDTH + 1)
    wrapped = textwrap.fill(
        text,
        console.width,
        initial_indent=f"{label:{LABEL_WIDTH}} ",
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    console.print(wrapped, markup=False, soft_wrap=True)


def _probe_hardware(options: StudyOptions) -> _Hardware:
    if options.plan_gpu is not None:
        card = require_card(options.plan_gpu)
        place = f"{options.trainers or 'as many as have room'} on GPUs of type {card}"
        return _Hardware(options.trainers or 0, options.gpus_per_worker or 1.0, card, place)
    address = runtime.running_cluster_address()
    gpus_per_worker: float | None
    if address is None:
        num_trainers, gpus_per_worker = runtime.estimate_local_cluster().plan_trainers(
            options.trainers, options.gpus_per_worker, options.workers_per_trainer
        )
        place, device = f"{num_trainers} on this machine", runtime.gpu_name()
    else:
        num_trainers, gpus_per_worker, device = options.trainers or 0, options.gpus_per_worker, ""
        place = f"{num_trainers or 'as many as have room'} on the cluster at {address}"
    if options.device == "cpu" or gpus_per_worker == 0:
        gpus_per_worker, device = 0.0, "cpu"
    return _Hardware(num_trainers, gpus_per_worker, device, place)


def _task_lines(template: Configuration, bases: Path, may_truncate: bool) -> list[Line]:
    """Return the lines on a task: its steps, batch size, data and base model, and how many rows are cut."""
    model, steps = template.model, template.lr_schedule.steps
    batch = template.batches.batch_size * template.batches.accumulation
    content, hub = model.content[:12], ""
    if model.content == UNPREPARED:
        content, hub = UNPREPARED, FROM_HUB if model.name not in built_in_names() else ""
    lines = [
        ("Task", f"{template.task.name}, {steps} steps of {batch}"),
        ("Base model", f"{model.name} ({content}){hub}"),
    ]
    task = tasks.get(template.task.name)
    lines[1:1] = [("Warning", text) for text in task.warnings]
    if isinstance(task, DataTask):
        lines.insert(1, ("Data", task.describe()))
        if may_truncate and content != UNPREPARED:
            processor = loading.load_processor(model, bases, task)
            max_length = template.batches.max_length
            report_truncation(task, processor, max_length, lambda text: lines.insert(2, ("Cut rows", text)))
    return lines if has_layer_shapes(model) else [*lines, ("Not checked", UNCHECKED_OPTIONS)]


def _configuration_lines(study: Study) -> list[Line]:
    """Return the lines on the configurations: tasks, variants, learning rates or space, numbers and steps."""
    options, template = study.options, study.templates[0]
    may_truncate = options.max_length is not None
    by_task = {t.task.name: t for t in study.templates}
    lines = [line for each in by_task.values() for line in _task_lines(each, study.store.bases, may_truncate)]
    if study.search is not None:
        lines += _search_lines(study.search, template)
    else:
        rates = sorted({c.optimizer.learning_rate for c in study.requested})
        lines.append(("Variants", " ".join(dict.fromkeys(c.variant.name for c in study.requested))))
        lines.append(("Learning rates", " ".join(f"{rate:g}" for rate in rates)))
    if options.set:
        lines.append(("Fixed", " ".join(options.set)))
    return [
        *lines,
        ("Seeds", f"{len({c.seed for c in study.requested}) if options.only else options.seed_count}"),
        ("Configurations", f"{study.total}, of them {study.total - study.num_to_train} known"),
        ("Steps", f"at most {study.max_steps()}"),
        ("Early stopping", scheduler_settings(options.scheduler, template) or "none"),
    ]


def _search_lines(search: SearchBudget, template: Configuration) -> list[Line]:
    """Return the lines on a search: sampler, budget and space, with one line for each distinct space."""
    counts = {name: search.num_asked[name] + search.num_remaining(name) for name in search.groups}
    variants = list(dict.fromkeys(group.template.variant.name for group in search.groups.values()))
    searches = len(counts) // len(variants)
    each = "of each variant" if searches == 1 else f"in each of {searches} searches of each variant"
    if len(set(counts.values())) == 1:
        budget = f"{next(iter(counts.values()))} points {each}"
    else:
        budget = f"points: {', '.join(f'{count} of {name}' for name, count in counts.items())}"
    lines = [("Search", f"{search.file.sampler}, {budget}")]
    texts = {
        name: " ".join(f"{key}={spec}" for key, spec in group.specs.items()) or "nothing"
        for name, group in search.groups.items()
    }
    if not any("learning_rate" in group.specs for group in search.groups.values()):
        lines.append(("Learning rate", f"{template.optimizer.learning_rate:g}"))
    if len(set(texts.values())) == 1:
        return [*lines, ("Variants", " ".join(variants)), ("Space", next(iter(texts.values())))]
    spaces = {text: next(name for name, own in texts.items() if own == text) for text in texts.values()}
    return [*lines, *((f"Space, {name}", text) for text, name in spaces.items())]


def _trainer_lines(hardware: _Hardware, study: Study) -> list[Line]:
    options = study.options
    workers = options.workers_per_trainer
    split = f", {workers} workers per trainer" if workers > 1 else ""
    if hardware.gpus_per_worker and hardware.gpus_per_worker < 1:
        split = f", up to {int(1 / hardware.gpus_per_worker)} share one GPU"
    gpus = 1.0 if hardware.gpus_per_worker is None else hardware.gpus_per_worker
    lanes, is_measured = study.choose_lanes(hardware.num_trainers, gpus)
    text = f"{lanes} lanes each"
    if is_measured:
        text = f"up to {lanes} lanes each: the first trainer measures how many fit into its GPU's memory"
    lines = [("Trainers", f"{hardware.place}{split}"), ("Lanes", text)]
    if options.plan_gpu is None and hardware.num_trainers and runtime.running_cluster_address() is not None:
        gib = runtime.driver_node_gib(hardware.num_trainers)
        lines.append(("Driver's node", f"{gib:g} GiB of memory for Ray, for this number of trainers"))
    return lines


def print_point_shortfall(console: Console, usage: Mapping[str, GroupUsage], points: int) -> None:
    """Print the groups of a search that have fewer points than the budget, because their space has no more.

    Args:
        console: The console for the output.
        usage: Name of the group -> its usage of the budget.
        points: Budget of each group, in points.
    """
    for name, used in usage.items():
        if used.points < points:
            line = f"{name}: {used.points} points of {points}: its space has no more"
            console.print(line, markup=False)


MIN_WIDTH = 60
"""Smallest width of the output in columns, including the labels."""


def print_preset(options: StudyOptions) -> None:
    """Print the protocol of the preset in `options`, and the deviations of this study from it."""
    assert options.preset is not None
    width = max(MIN_WIDTH, shutil.get_terminal_size().columns)
    for label, text in preset_lines(read_preset(options.preset), options):
        print(textwrap.fill(f"{label:15} {text}", width, subsequent_indent=" " * 16, break_on_hyphens=False))
    print()


def preset_lines(preset: Preset, options: StudyOptions) -> list[Line]:
    """Return the lines that describe the protocol of a preset and the deviations of a study from it.

    Args:
        preset: The preset.
        options: Options of the study, completed by the preset.
    """
    existing, absent = split_variants(catalogue.names())
    rates = len(preset.options["learning_rates"])
    product = f"{len(read_variants())} variants x {rates} rates x {_count(preset.tasks, 'task')}"
    grids = f"; the main grids together {main_grid_runs():,}" if preset.main_grid else ""
    lines = [
        ("Preset", f"{preset.name}, {preset.title} (arXiv 2601.22708)"),
        ("Protocol", f"{product}, one seed: {preset.runs:,} runs{grids}"),
        ("Exist here", f"{len(existing)} variants: {len(existing) * preset.runs_per_variant:,} runs"),
    ]
    if absent:
        names = ", ".join(variant.title for variant in absent)
        count = len(absent) * preset.runs_per_variant
        lines.append(("Absent here", f"{_count(absent, 'variant')}, {count:,} runs: {names}"))
    settings = [f"{v.title}: {v.published}{'' if v in existing else ' (absent)'}" for v in read_variants()]
    differs = [
        *preset.deviations,
        *(sentence for variant in existing for sentence in variant.differs),
        *(
            f"{variant.title} is trained with the settings of its own file: {variant.published} is not set."
            for variant in existing
            if not variant.set and variant.name not in _WITHOUT_SETTINGS
        ),
    ]
    lines += [("As published", text) for text in settings]
    lines += [("Deviation", text) for text in differs]
    lines += [("Changed", text) for text in _changes(preset, options)]
    return lines


_WITHOUT_SETTINGS = ("lora", "hira", "dora", "rslora", "moslora")
"""Published variants that have no settings of their own."""


def _count(items: Sized, noun: str) -> str:
    return f"{len(items)} {noun}{'' if len(items) == 1 else 's'}"


def _changes(preset: Preset, options: StudyOptions) -> list[str]:
    """Return the options that differ from the preset, each with its value and the preset's value."""
    own = [each for group in (GridOptions, SearchOptions, TrainingOptions) for each in fields(group)]
    defaults = {each.name: each.default for each in own if each.name not in ("set", "dry_run")}
    defaults |= preset_defaults(preset.name, type(options), catalogue.names())
    changed = [
        f"{_option(name)} {_text(getattr(options, name))} (preset: {_text(value)})"
        for name, value in defaults.items()
        if getattr(options, name) not in (None, value)
    ]
    words = {setting_key(word): word for word in published_words(preset.name, options.variants or ())}
    typed = {setting_key(word): word for word in options.set}
    changed += [f"--set {w} (preset: {words.get(k, 'none')})" for k, w in typed.items() if words.get(k) != w]
    return changed


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _text(value: Any) -> str:
    if value is None:
        return "not given"
    return " ".join(map(str, value)) if isinstance(value, tuple) else f"{value}"
