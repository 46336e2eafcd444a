"""Factors of a sensitivity study: hyperparameters with range, prior, levels, default and source.

The table of factors is `factors.toml`. The name of a factor is the key that `space.apply_values` and --set
take: NAME, or VARIANT.NAME for a setting of one variant.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Literal

from pydantic import TypeAdapter

from orchestrator.study.configuration import Configuration, Value
from orchestrator.study.option import format_value
from orchestrator.study.space import VARIANT_HYPERPARAMETERS, get_value
from orchestrator.util.errors import UsageError, suggest_nearest
from variants.variant_settings import canonical_key

Prior = Literal["log", "uniform", "choice"]
RATE = "learning_rate"
"""Name of the learning rate, which every study measures."""
ALL = "all"
"""Value of --factors for the whole table and the variants' own settings."""
OWN_RANGE = (0.5, 2.0)
"""Range of a variant's numeric setting without an entry in the table, as multiples of its default."""
RESWEEP_DECADES = (-1.0, -0.5, 0.0, 0.5, 1.0)
"""Positions of the rates at which every level is trained, in decades from the best rate of the default. With
the middle three alone, the best rate of an extreme alpha lies outside of them: the loss B(alpha), which
docs/sensitivity.md defines, is then estimated as 3.6 points instead of 0.1."""
RESWEEP_TOLERANCE = 0.13
"""Largest distance of a rate from a position in `RESWEEP_DECADES`, in decades: half of the spacing of 4 rates
a decade, rounded up."""


@dataclass(frozen=True)
class Factor:
    """One factor of a study. The comments in `factors.toml` explain the fields."""

    name: str
    title: str
    """The name in reports."""
    prior: Prior
    levels: tuple[Value, ...] = ()
    relative: bool = False
    range: tuple[float, ...] = ()
    """Lower and upper end of the prior; empty for a choice and for the learning rate."""
    default: Value | None = None
    labels: tuple[str, ...] = ()
    """Names of `levels` in reports, for values that are not readable, such as a regular expression."""
    alias: bool = False
    source: str = ""

    @property
    def variant(self) -> str:
        """The only variant with this factor; empty for a factor of all variants."""
        return self.name.rpartition(".")[0]

    def label(self, value: Value) -> str:
        """Return the name of a level in reports."""
        named = dict(zip(self.levels, self.labels, strict=False))
        if isinstance(value, float | int) and not isinstance(value, bool):
            return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
        return named.get(value, format_value(value))

    def position(self, value: Value, index: int) -> float:
        """Return the position of a level on the axis of the prior.

        Args:
            value: The level.
            index: Index of the level among the measured levels.

        Returns:
            Log10 of the value for a log prior, the value for a uniform prior, the index for a choice.
        """
        if self.prior == "choice":
            return float(index)
        return math.log10(float(value)) if self.prior == "log" else float(value)

    def prior_ends(self, default: Value) -> tuple[float, float]:
        """Return the lower and the upper end of the prior as values of the factor.

        Args:
            default: Default value of the study; a relative range is a multiple of it.
        """
        scale = float(default) if self.relative else 1.0
        return self.range[0] * scale, self.range[1] * scale


@lru_cache(maxsize=1)
def load_factors() -> Mapping[str, Factor]:
    """Return the factors of `factors.toml`: name -> factor, in the order of the file."""
    text = resources.files("orchestrator.study").joinpath("factors.toml").read_text(encoding="utf-8")
    entries = {name: {"name": name, **entry} for name, entry in tomllib.loads(text).items()}
    return TypeAdapter(dict[str, Factor]).validate_python(entries)


def choose_factors(words: Sequence[str], configurations: Iterable[Configuration]) -> list[Factor]:
    """Return the factors that --factors names, without the learning rate, which every study has.

    Args:
        words: Names of factors, or `all`.
        configurations: At least one configuration of each variant of the study. A numeric setting that only
            one variant has is a factor, also without an entry in the table, if it is above 0.

    Raises:
        UsageError: A name is unknown, belongs to a variant that is not in the study, or has no levels.
    """
    table = load_factors()
    known = {name: factor for name, factor in table.items() if not factor.variant}
    for variant in (each.variant for each in configurations):
        for setting, value in variant.extra.items():
            name = f"{variant.name}.{setting}"
            if name in table:
                known[name] = table[name]
            elif setting not in VARIANT_HYPERPARAMETERS and type(value) in (int, float) and float(value) > 0:
                source = f"from half to double of {variant.name}'s default"
                known[name] = Factor(name, name, "log", OWN_RANGE, True, OWN_RANGE, source=source)
    names = [canonical_key(word) for word in words]
    chosen = list(known) if ALL in names else list(dict.fromkeys(names))
    for name in chosen:
        if name not in known:
            rule = f"no factor {name!r}. {suggest_nearest(name, [*known, ALL])}"
            if name in table:
                rule = f"{table[name].variant!r} is not in this study; add it to --variants, or leave it out."
            raise UsageError(f"--factors {name}: {rule}")
    return [known[name] for name in chosen if name != RATE]


def factor_levels(factor: Factor, template: Configuration, count: int) -> tuple[Value, ...]:
    """Return the levels of a factor other than the default.

    Numbers of training examples and batch sizes are clipped to the training examples of the task. Batch sizes
    are rounded to a multiple of the accumulation steps.

    Args:
        factor: A factor other than the learning rate.
        template: Default configuration of a variant and task.
        count: Largest number of levels of a numeric factor. A choice has all of its levels.

    Returns:
        Distinct levels in the order of the table; empty if the variant does not have the factor.
    """
    default = get_value(template, factor.name)
    if default is None:
        return ()
    levels: list[Value] = []
    for each in factor.levels:
        value = each
        if factor.relative:
            value = float(default) * float(each)
            if isinstance(default, int):
                value = max(1, round(value))
            elif not value.is_integer():
                value = float(f"{value:.3g}")
        value = _clip(factor, template, value)
        if value != default and value not in levels:
            levels.append(value)
    return tuple(levels if factor.prior == "choice" else levels[:count])


def _clip(factor: Factor, template: Configuration, value: Value) -> Value:
    """Return the nearest value that the task of the template allows."""
    if factor.name == "train_size":
        return min(int(value), template.task.train_size)
    if factor.name == "batch_size":
        parts = template.batches.accumulation
        largest = template.task.train_size // parts
        return parts * max(1, min(round(int(value) / parts), largest))
    return value


def resweep_rates(rates: Sequence[float], center: float) -> tuple[float, ...]:
    """Return the rates at which every level of a factor is trained: those nearest to `RESWEEP_DECADES`.

    Args:
        rates: Rates of the curve.
        center: The best rate of the default configuration (x* in docs/sensitivity.md), one of `rates`.

    Returns:
        Up to five rates, ascending; fewer near an end of the curve. `center` is one of them.
    """
    found = set()
    for offset in RESWEEP_DECADES:
        wanted = math.log10(center) + offset
        nearest = min(rates, key=lambda rate: abs(math.log10(rate) - wanted))
        if abs(math.log10(nearest) - wanted) <= RESWEEP_TOLERANCE:
            found.add(nearest)
    return tuple(sorted(found | {center}))


def alias_decades(level: Configuration, default: Configuration) -> float | None:
    """Return by how many decades a level of an alias lies above its default; None for other factors."""
    named = [name for name, factor in load_factors().items() if factor.alias and name != RATE]
    pairs = ((get_value(level, name), get_value(default, name)) for name in named)
    return next((math.log10(float(a) / float(b)) for a, b in pairs if a and b and a != b), None)


def is_near(rate: float, center: float) -> bool:
    """Return whether a rate lies within the range of `RESWEEP_DECADES` around a center."""
    return abs(math.log10(rate / center)) <= RESWEEP_DECADES[-1] + RESWEEP_TOLERANCE


def default_rate(rates: Sequence[float]) -> float:
    """Return the rate of the curve that stands for the published default.

    It is the rate nearest to the published default (5e-5 in the table) if that is within the range of the
    curve, else the rate nearest to the middle of the curve. Small models learn nothing at 5e-5.

    Args:
        rates: Rates of the curve.
    """
    published = float(load_factors()[RATE].default or 0)
    if not min(rates) <= published <= max(rates):
        published = math.sqrt(min(rates) * max(rates))
    return min(rates, key=lambda rate: abs(math.log10(rate / published)))
