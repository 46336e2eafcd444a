"""The star design: the curve of the learning rate, then every other factor at further levels around its best.

Stage 1 is the rate's curve at the default configuration, 4 rates a decade. Its optimum, rounded to the
curve's grid, is x*. Stage 2 varies one factor after another: every level is trained at five rates of the
curve, half a decade apart around x*, and at the rate of the published default, with the same seeds. All are
ordinary configurations, so that one more factor, seed or decade trains what is new.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.analyze.factors.star_data import find_center
from orchestrator.finetune.resolve.model_limits import check_attach
from orchestrator.finetune.resolve.option_names import variant_hyperparameters
from orchestrator.finetune.resolve.templates import find_settings_error, has_layer_shapes
from orchestrator.finetune.tasks import catalogue
from orchestrator.launch.design import DesignInput
from orchestrator.launch.script_options import FactorOptions
from orchestrator.record.schema import Record
from orchestrator.record.store import Store
from orchestrator.study.configuration import Configuration
from orchestrator.study.factors import (
    Factor,
    choose_factors,
    default_rate,
    factor_levels,
    has_factor,
    own_settings,
    resweep_rates,
)
from orchestrator.study.grid import build_grid
from orchestrator.study.space import (
    HYPERPARAMETERS,
    VARIANT_HYPERPARAMETERS,
    Value,
    apply_values,
    format_value,
)
from orchestrator.util.errors import UsageError

RATES_PER_DECADE = 4
_SHAPELESS = ("alpha", "dropout")
"""Factors of a variant that change no tensor's shape, so that every level fits the model."""


@dataclass(frozen=True)
class StarDesign:
    """A curve and its arms for every template; `make_star_design` makes it from options."""

    templates: tuple[Configuration, ...]
    """One default configuration per task and variant."""
    rates: Mapping[str, tuple[float, ...]]
    """Task -> the rates of the curve, ascending."""
    levels: tuple[tuple[Configuration, ...], ...]
    """For each template, the default with one factor at another level."""
    seeds: tuple[int, ...]

    def request(self, records: Mapping[str, Record]) -> list[Configuration]:
        """Return the curves, and the arms of each template whose curve has ended."""
        found: list[Configuration] = []
        for template, levels in zip(self.templates, self.levels, strict=True):
            rates = self.rates[template.task.name]
            curve = build_grid([template], rates, self.seeds)
            found += curve
            if all(c.fingerprint in records for c in curve):
                center = self._find_center(template, rates, records)
                found += [] if center is None else self._arms(levels, rates, center)
        return found

    def outline(self) -> list[Configuration]:
        """Return the curves and arms, as if every curve had its best rate where an arm has the most rates."""
        found: list[Configuration] = []
        for template, levels in zip(self.templates, self.levels, strict=True):
            rates = self.rates[template.task.name]
            found += build_grid([template], rates, self.seeds)
            found += self._arms(levels, rates, max(rates, key=lambda rate: len(_swept_rates(rates, rate))))
        return found

    def _arms(
        self, levels: Sequence[Configuration], rates: Sequence[float], center: float
    ) -> list[Configuration]:
        return build_grid(levels, _swept_rates(rates, center), self.seeds)

    def _find_center(
        self, template: Configuration, rates: Sequence[float], records: Mapping[str, Record]
    ) -> float | None:
        """Return x*; None if no run of the curve has a score."""
        means, counts = [], []
        for rate in rates:
            ended = [records.get(c.fingerprint) for c in build_grid([template], [rate], self.seeds)]
            scores = [s for r in ended if r is not None and (s := r.score("validation")) is not None]
            finite = [score for score in scores if math.isfinite(score)]
            means.append(math.fsum(finite) / len(finite) if finite else math.nan)
            counts.append(len(finite))
        return find_center(rates, means, counts)[1] if any(counts) else None


def _swept_rates(rates: Sequence[float], center: float) -> list[float]:
    """Return the rates at which every level is trained: those around x*, and the published default."""
    return sorted({*resweep_rates(rates, center), default_rate(rates)})


def make_star_design(given: DesignInput) -> StarDesign:
    """Make the star design of a study, and print what it leaves out.

    Raises:
        UsageError: --factors names an unknown factor, or none that a variant of the study has.
    """
    options: FactorOptions = given.options
    settings = {t.variant.name: own_settings(t) for t in given.templates}
    factors = choose_factors(options.factor_names, settings)
    checker = _LevelChecker(Store(options.store_folder).bases)
    levels = tuple(checker.levels(template, factors, options.levels) for template in given.templates)
    if not any(levels):
        raise UsageError(
            f"--factors {' '.join(options.factor_names)}: no variant of the study has one of them; "
            "take others, for example: rank batch_size."
        )
    for note in dict.fromkeys(checker.notes):
        print(note)
    rates = given.refined(0 if options.learning_rates else RATES_PER_DECADE).learning_rates
    return StarDesign(given.templates, rates, levels, tuple(range(options.seed_count)))


class _LevelChecker:
    """Builds the levels of every template, and notes those that its variant or the model cannot have."""

    def __init__(self, bases: Path) -> None:
        self._bases = bases
        self.notes: list[str] = []
        """One line for each factor or level that is left out."""

    def levels(
        self, template: Configuration, factors: Sequence[Factor], count: int
    ) -> tuple[Configuration, ...]:
        """Return the template with one factor at another level, for all factors and levels."""
        return tuple(c for factor in factors for c in self._levels_of(template, factor, count))

    def _levels_of(self, template: Configuration, factor: Factor, count: int) -> list[Configuration]:
        variant = template.variant.name
        if factor.variant not in ("", variant):
            return []
        known = variant_hyperparameters(variant)
        is_own = factor.name in VARIANT_HYPERPARAMETERS and factor.name not in known
        if is_own or not has_factor(template, factor):
            self.notes.append(f"{variant} has no {factor.title}: left out.")
            return []
        found = []
        for level in factor_levels(factor, template, count):
            configuration = apply_values(template, {factor.name: level})
            reason = self._find_error(configuration, factor, level)
            if reason is None:
                found.append(configuration)
            else:
                self.notes.append(f"{variant}, {factor.title} {factor.label(level)}: left out ({reason}).")
        if not found:
            self.notes.append(f"{variant} on {template.task.name}: {factor.title} has no other level.")
        return found

    def _find_error(self, configuration: Configuration, factor: Factor, level: Value) -> str | None:
        """Return why the variant or the model refuses a level, in one line; None if it accepts it."""
        if (error := find_settings_error(configuration)) is not None:
            return error
        rule = HYPERPARAMETERS.get(factor.name)
        if rule is not None and (broken := rule.find_violation(level)):
            return f"{format_value(level)} {broken}"
        changes_shape = factor.variant or (factor.name in VARIANT_HYPERPARAMETERS - set(_SHAPELESS))
        if not changes_shape or not has_layer_shapes(configuration.model):
            return None
        task = catalogue.get(configuration.task.name)
        try:
            check_attach([configuration], task, self._bases)
        except UsageError as refused:
            return str(refused)
        return None
