"""Star design: the curve of the learning rate, then one factor at a time at levels other than its default.

Stage 1 is the curve: the default configuration at 4 rates a decade. The default configuration at the rate
nearest to the curve's optimum is called x*. Stage 2 has one arm per factor: each level is trained at up to
five rates of the curve, half a decade apart around that of x*, and at the rate of the published default. Arms
and curve have the same seeds.
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
from orchestrator.launch.design import DesignInput, validation_scores
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
from orchestrator.study.space import (
    HYPERPARAMETERS,
    VARIANT_HYPERPARAMETERS,
    Value,
    apply_values,
    build_grid,
    format_value,
)
from orchestrator.util.errors import UsageError

RATES_PER_DECADE = 4
_SHAPELESS = ("alpha", "dropout")
"""Hyperparameters of variants that do not change the shape of a tensor: every level fits the model."""


@dataclass(frozen=True)
class StarDesign:
    """A curve and its arms for every template, made by `make_star_design`."""

    templates: tuple[Configuration, ...]
    """One default configuration per task and variant."""
    rates: Mapping[str, tuple[float, ...]]
    """Task -> learning rates of the curve, ascending."""
    levels: tuple[tuple[Configuration, ...], ...]
    """For each template, copies with one factor at another level."""
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
        """Return the curves and arms, assuming for each curve the best rate with the largest arms."""
        found: list[Configuration] = []
        for template, levels in zip(self.templates, self.levels, strict=True):
            rates = self.rates[template.task.name]
            found += build_grid([template], rates, self.seeds)
            found += self._arms(levels, rates, max(rates, key=lambda rate: len(_swept_rates(rates, rate))))
        return found

    def _arms(
        self, levels: Sequence[Configuration], rates: Sequence[float], center: float
    ) -> list[Configuration]:
        """Return all arms of one template.

        Args:
            levels: The template with one factor at another level, for all factors and levels.
            rates: Learning rates of the curve, ascending.
            center: The rate of x*.
        """
        return build_grid(levels, _swept_rates(rates, center), self.seeds)

    def _find_center(
        self, template: Configuration, rates: Sequence[float], records: Mapping[str, Record]
    ) -> float | None:
        """Return the rate of x*; None if no run of the curve has a score."""
        scores = [validation_scores(records, build_grid([template], [rate], self.seeds)) for rate in rates]
        means = [math.fsum(own) / len(own) if own else math.nan for own in scores]
        return find_center(rates, means, [len(own) for own in scores])[1] if any(scores) else None


def _swept_rates(rates: Sequence[float], center: float) -> list[float]:
    """Return the rates of an arm, ascending: those around x* and that of the published default."""
    return sorted({*resweep_rates(rates, center), default_rate(rates)})


def make_star_design(given: DesignInput) -> StarDesign:
    """Make the star design of a study, and print the factors and levels that are left out.

    Raises:
        UsageError: --factors names an unknown factor, or no factor that a variant of the study has.
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
    """Makes the levels of templates, and notes those that the variant or the base model does not allow.

    Args:
        bases: Folder of the base models.
    """

    def __init__(self, bases: Path) -> None:
        self._bases = bases
        self.notes: list[str] = []
        """One line for each factor or level that is left out."""

    def levels(
        self, template: Configuration, factors: Sequence[Factor], count: int
    ) -> tuple[Configuration, ...]:
        """Return copies of a template with one factor at another level, for all factors and levels.

        Args:
            template: Default configuration of a task and variant.
            factors: Factors of the study.
            count: Largest number of levels of a numeric factor.
        """
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
        """Return the reason for which the variant or the base model rejects a level; None if both accept it.

        Args:
            configuration: The template with the factor at this level.
            factor: The factor.
            level: The level.
        """
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
