"""Output of --plan for a preset: the published protocol, and the deviations of this study from it."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sized
from dataclasses import fields
from typing import Any

from orchestrator.study.option_groups import GridOptions, SearchOptions, TrainingOptions
from orchestrator.study.options import StudyOptions, setting_key
from orchestrator.study.presets import (
    Preset,
    main_grid_runs,
    preset_defaults,
    published_words,
    read_preset,
    split_variants,
)
from orchestrator.study.published_variants import read_variants
from variants import catalogue

MIN_WIDTH = 60
"""Smallest width of the output in columns, including the labels."""

Line = tuple[str, str]
"""Label and text of a printed line."""


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
