"""The options of a study as data: those that differ from the defaults, and as words of a command."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any

from orchestrator.study.options import StudyOptions
from orchestrator.study.presets import preset_defaults


def given_values(options: StudyOptions, existing: Collection[str]) -> dict[str, Any]:
    """Return the options that differ from their defaults: field -> value.

    The defaults are those of the class, or those of the preset if one is chosen. An option that is None is
    left out. A command with the result as its options has the same options.

    Args:
        options: The options.
        existing: Names of this project's variants.
    """
    defaults = {each.name: getattr(type(options)(), each.name) for each in fields(options)}
    if options.preset is not None:
        defaults |= {**preset_defaults(options.preset, type(options), existing), "preset": None}
    values = {each.name: getattr(options, each.name) for each in fields(options)}
    return {name: value for name, value in values.items() if value is not None and value != defaults[name]}


def option_words(values: Mapping[str, Any]) -> list[str]:
    """Return options (field -> value) as words of a command: `--learning-rates 1e-4 1e-3`."""
    words: list[str] = []
    for name, value in values.items():
        words.append(option_flag(name))
        if isinstance(value, tuple):
            words += map(str, value)
        elif not isinstance(value, bool):
            words.append(str(value))
    return words


def option_flag(name: str) -> str:
    """Return the option of a field: `learning_rates` -> `--learning-rates`."""
    return f"--{name.replace('_', '-')}"
