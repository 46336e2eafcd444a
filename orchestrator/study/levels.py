"""The levels of one factor, and the settings that move with it, in a study of the transfer of the rate.

A factor is a hyperparameter of `factors.toml`, or the base model, whose level is its name. A link moves
another setting together with the factor, so that something stays constant from level to level.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from orchestrator.study.configuration import HYPERPARAMETERS, Configuration, Value
from orchestrator.study.factors import load_factors
from orchestrator.study.option import format_value
from orchestrator.study.space import apply_values, get_value, parse_value
from orchestrator.util.errors import UsageError

FactorName = Literal["rank", "batch_size", "steps", "train_size", "alpha", "targets", "model"]
LinkName = Literal["none", "alpha", "examples", "epochs", "parameters"]
MODEL, TARGETS, NO_LINK = "model", "targets", "none"


@dataclass(frozen=True)
class Link:
    """A setting that moves with a factor.

    With a factor of numbers, the setting at a level is its value in the template times (level / level of the
    template) ** `power`. With the adapted layers as factor, the ratio is that of the trainable parameters.
    """

    constant: str
    """What stays constant from level to level."""
    moved: Mapping[str, tuple[str, int]]
    """Factor -> the setting that moves with it, and `power`. Other factors have no such link."""


LINKS: Mapping[str, Link] = {
    NO_LINK: Link("", {}),
    "alpha": Link("alpha/rank", {"rank": ("alpha", 1)}),
    "examples": Link("steps x batch", {"batch_size": ("steps", -1), "steps": ("batch_size", -1)}),
    "epochs": Link("epochs", {"train_size": ("steps", 1)}),
    "parameters": Link("parameters", {TARGETS: ("rank", -1)}),
}
"""Value of --link -> the link. To add one, add its entry and its name to `LinkName`."""


def level_title(factor: str) -> str:
    """Return the name of a factor in reports."""
    return "base model" if factor == MODEL else load_factors()[factor].title


def level_of(configuration: Configuration, factor: str) -> Value | None:
    """Return the level of a factor in a configuration; None if the variant does not have the factor."""
    return configuration.model.name if factor == MODEL else get_value(configuration, factor)


def level_label(factor: str, level: Value) -> str:
    """Return the name of a level in reports."""
    return str(level) if factor == MODEL else load_factors()[factor].label(level)


def parse_levels(factor: str, words: Sequence[str]) -> tuple[Value, ...]:
    """Return the levels that --levels names: numbers in ascending order, others as they were given.

    Raises:
        UsageError: A word is no value of the factor, or there are fewer than two levels.
    """
    values: list[Value] = list(words)
    if factor != MODEL:
        named = load_factors()[factor]
        by_label = dict(zip(named.labels, named.levels, strict=False))
        values = [by_label.get(word, word) for word in words]
    if factor not in (MODEL, TARGETS):
        try:
            values = sorted(parse_value(HYPERPARAMETERS[factor], word) for word in words)
        except ValueError as error:
            raise UsageError(f"--levels: {error}") from None
    levels = tuple(dict.fromkeys(values))
    if len(levels) < 2:
        raise UsageError(
            f"--levels {' '.join(words)}: {level_title(factor)} has one level, so there is nothing to "
            "transfer to; name three to six."
        )
    return levels


def at_level(
    template: Configuration, factor: str, level: Value, link: str, ratio: float
) -> Configuration | None:
    """Return a template at another level of the factor, with the linked setting moved.

    Args:
        template: A configuration that has the factor.
        factor: A factor other than the base model.
        level: The level.
        link: Key of `LINKS`, a link of this factor.
        ratio: How many times the level of the template the level is, or, for the adapted layers, how many
            times the trainable parameters.

    Returns:
        The configuration; None if the template lacks the linked setting.
    """
    values: dict[str, Value] = {factor: level}
    if factor in LINKS[link].moved:
        setting, power = LINKS[link].moved[factor]
        start = get_value(template, setting)
        if start is None:
            return None
        moved = float(start) * ratio**power
        values[setting] = max(1, round(moved)) if isinstance(start, int) else float(f"{moved:.6g}")
    return apply_values(template, values)


def is_on_curve(template: Configuration, other: Configuration, factor: str, link: str) -> bool:
    """Return whether a configuration is the template at another level of the factor.

    Both have the same learning rate and seed. Steps may have lowered the number of evaluations. How the
    adapted layers set the rank depends on the base model, so any rank will do for their link.
    """
    level = level_of(other, factor)
    if factor == MODEL or level is None:
        return level is not None and replace(other, model=template.model) == template
    moved, ratio = LINKS[link].moved.get(factor), 1.0
    if factor == TARGETS and moved is not None:
        template = apply_values(template, {moved[0]: get_value(other, moved[0]) or 1})
        link = NO_LINK
    elif factor != TARGETS:
        ratio = float(level) / float(level_of(template, factor) or math.nan)
    expected = at_level(template, factor, level, link, ratio)
    return expected is not None and replace(expected, evaluations=other.evaluations) == other


def curve_name(variant: str, link: str) -> str:
    """Return the name of the curve of a variant's best rates over the levels, with what is constant."""
    return f"{variant}, {LINKS[link].constant} constant" if LINKS[link].constant else variant


def describe_level(configuration: Configuration, factor: str, links: Sequence[str]) -> str:
    """Return the factor and all settings that a link moves with it, for example "rank 4 alpha 8"."""
    moved = [LINKS[link].moved[factor][0] for link in links if factor in LINKS[link].moved]
    names = [factor, *dict.fromkeys(moved)]
    values: list[tuple[str, Any]] = [(name, level_of(configuration, name)) for name in names]
    return " ".join(
        level_label(name, value) if name == MODEL else f"{name} {_short(name, value)}"
        for name, value in values
        if value is not None
    )


def _short(name: str, value: Value) -> str:
    return level_label(name, value) if name in load_factors() else format_value(value)
