"""Designs: pure functions of records that name the configurations of a study, in one stage or more.

The same records give the same configurations. A repeated command therefore trains nothing, and a larger
design trains its additional configurations only.
"""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import ClassVar, Literal

from orchestrator.analyze.effects import find_center
from orchestrator.analyze.runs import finite
from orchestrator.finetune.models import loading
from orchestrator.finetune.resolve.option_names import variant_hyperparameters
from orchestrator.finetune.resolve.templates import check_attach, count_trainable, find_settings_error
from orchestrator.finetune.tasks import catalogue
from orchestrator.record.schema import Record
from orchestrator.study.configuration import HYPERPARAMETERS, Configuration, Value
from orchestrator.study.factors import (
    Factor,
    alias_decades,
    choose_factors,
    default_rate,
    factor_levels,
    load_factors,
    resweep_rates,
)
from orchestrator.study.grids import build_grid, check_grid_size, refine_rates, round_rate
from orchestrator.study.levels import MODEL, NO_LINK, TARGETS, at_level, level_label, level_of, level_title
from orchestrator.study.option import format_value
from orchestrator.study.space import VARIANT_HYPERPARAMETERS, apply_values, get_value
from orchestrator.util.errors import UsageError

FindRecord = Callable[[str], Record | None]
"""Returns the record of a fingerprint whose configuration has ended: finished, diverged, stopped early, or
failed too often to be tried again. Returns None for others."""


class Design(ABC):
    """The rule that names the configurations of a study; a pure function of the records."""

    reason: ClassVar[str] = ""
    """Why a later stage adds configurations, as a phrase; empty if it needs no reason."""
    notes: Sequence[str] = ()
    """What is left out of the study, one line each."""

    @abstractmethod
    def request(self, find: FindRecord) -> list[Configuration]:
        """Return all configurations of the study that follow from the records so far.

        The caller trains them and calls `request` again, until no new configuration is returned.
        """

    def outline(self) -> list[Configuration]:
        """Return the expected configurations of all stages, for --plan, without any records."""
        return self.request(lambda fingerprint: None)


@dataclass(frozen=True)
class DesignInput:
    """The templates of a study, and the grids of learning rates of its tasks."""

    templates: tuple[Configuration, ...]
    """One configuration per task and variant, with placeholders for learning rate and seed."""
    learning_rates: Mapping[str, tuple[float, ...]]
    """Task -> grid of learning rates, ascending."""

    def refined(self, per_decade: int) -> DesignInput:
        """Return a copy whose grids have about `per_decade` rates a decade; 0 leaves the grids unchanged."""
        grids = {task: refine_rates(rates, per_decade) for task, rates in self.learning_rates.items()}
        return replace(self, learning_rates=grids)

    def templates_by_task(self) -> dict[str, list[Configuration]]:
        """Return task -> templates, one per variant."""
        ordered = groupby(self.templates, key=lambda template: template.task.name)
        return {task: list(templates) for task, templates in ordered}


@dataclass(frozen=True)
class FixedDesign(Design):
    """Configurations that do not depend on results, such as those that --only names."""

    configurations: tuple[Configuration, ...]

    def request(self, find: FindRecord) -> list[Configuration]:
        """Return all of them."""
        return list(self.configurations)


STEP_DECADES = 0.5
"""Decades by which a grid is extended at one end in one stage."""
MIN_RATES = 3
"""Smallest number of rates of a grid that is extended."""
_ROUNDING_DECADES = 0.01  # Rates are rounded to three digits.
_SCORE_EPSILON = 1e-9


@dataclass(frozen=True)
class WideningGrid(Design):
    """The grid of every task with all seeds, extended while the best rate of a variant is at its edge.

    When all runs of a task have ended and the best rate of one of its variants is the lowest or the highest,
    the grid of the task is extended at this end by half a decade for all variants. This is repeated, up to
    `max_decades` at each end. A variant whose best score occurs at both ends does not extend the grid.

    Raises:
        UsageError: A grid has too many points.
    """

    reason = "the best rate of a variant is at an end of the grid, which grows (--widen 0 leaves it as it is)"
    given: DesignInput
    seeds: Sequence[int]
    max_decades: float = 0.0
    """Largest extension at each end in decades; 0 for a fixed grid."""
    by: Literal["score", "loss"] = "score"
    """What decides which rate is the best one, on the validation split."""

    def __post_init__(self) -> None:
        for rates in self.given.learning_rates.values():
            check_grid_size(len(self.seeds), len(rates))

    def request(self, find: FindRecord) -> list[Configuration]:
        """Return the grids of all tasks, extended according to the records."""
        return [
            configuration
            for task, templates in self.given.templates_by_task().items()
            for configuration in build_grid(templates, self._widened(task, templates, find), self.seeds)
        ]

    def _widened(self, task: str, templates: Sequence[Configuration], find: FindRecord) -> list[float]:
        """Return the grid of one task, extended according to the records, ascending."""
        rates = list(self.given.learning_rates[task])
        limits = rates[0] / 10**self.max_decades, rates[-1] * 10**self.max_decades
        while len(rates) >= MIN_RATES and all(
            find(c.fingerprint) for c in build_grid(templates, rates, self.seeds)
        ):
            low, high = self._at_edges(templates, rates, find)
            below = _continue_rates(rates, -1, limits[0]) if low else []
            above = _continue_rates(rates, 1, limits[1]) if high else []
            if not below and not above:
                break
            rates = [*reversed(below), *rates, *above]
        return rates

    def _at_edges(
        self, templates: Sequence[Configuration], rates: Sequence[float], find: FindRecord
    ) -> tuple[bool, bool]:
        """Return whether the lowest rate of a task is the best of a variant, and whether the highest is."""
        ends = set()
        for template in templates:
            scores = _scores_by_rate(template, rates, self.seeds, find, self.by)
            means = [math.fsum(each) / len(each) if each else -math.inf for each in scores]
            best = max(means) - _SCORE_EPSILON
            ends.add(tuple(math.isfinite(mean) and mean >= best for mean in (means[0], means[-1])))
        return (True, False) in ends, (False, True) in ends


def _scores_by_rate(
    template: Configuration,
    rates: Sequence[float],
    seeds: Sequence[int],
    find: FindRecord,
    by: Literal["score", "loss"] = "score",
) -> list[list[float]]:
    """Return for each rate the finite validation scores of those seeds that have one."""
    grid = [[find(c.fingerprint) for c in build_grid([template], [rate], seeds)] for rate in rates]
    scores = [
        [finite(record.quality("validation", by)) for record in runs if record is not None] for runs in grid
    ]
    return [[score for score in at_rate if not math.isnan(score)] for at_rate in scores]


def _continue_rates(rates: Sequence[float], direction: Literal[-1, 1], limit: float) -> list[float]:
    """Return the next rates beyond one end of a grid, within `STEP_DECADES`, or else the next one alone.

    A grid of a decade or more repeats its pattern: 1e-3, 3e-3, 1e-2 is followed by 3e-2 and 1e-1. A narrower
    grid continues with the ratio of its last two rates.

    Args:
        rates: The grid, ascending.
        direction: 1 for the high end, -1 for the low end.
        limit: Farthest valid rate, up to rounding.

    Returns:
        Rates in order of their distance from the end; empty if none lies within `limit`.
    """
    ordered = rates[::direction]
    edge = ordered[-1]
    candidates = [round_rate(rate * 10.0**direction) for rate in ordered]
    if abs(math.log10(edge / ordered[0])) < 1 - _ROUNDING_DECADES:
        candidates = [round_rate(edge * (edge / ordered[-2]) ** i) for i in range(1, len(ordered) + 1)]
    distances = {rate: direction * math.log10(rate / edge) for rate in (*candidates, limit)}
    farthest = distances[limit] + _ROUNDING_DECADES
    beyond = [rate for rate in candidates if _ROUNDING_DECADES < distances[rate] <= farthest]
    near = [rate for rate in beyond if distances[rate] <= STEP_DECADES + _ROUNDING_DECADES]
    return near or beyond[:1]


MIN_SPACING = 0.0199
"""Smallest spacing of a grid in decades. In a finer grid rounding to three digits could undo the shift."""


@dataclass(frozen=True)
class ReplicatesDesign(Design):
    """Every template at every rate of its task's shifted grid, once in each replicate.

    The training seed of replicate k is k, and the offset of its grid depends on k alone. All variants and
    tasks of a replicate therefore have the same offset, and more replicates do not change the earlier ones.

    Raises:
        UsageError: The grid of a task has one rate only, or is finer than `MIN_SPACING`.
    """

    given: DesignInput
    replicates: int

    def __post_init__(self) -> None:
        for task, rates in self.given.learning_rates.items():
            if len(rates) < 2:
                raise UsageError(
                    f"--learning-rates: {task} has {len(rates)} rate, so there is nothing to tune; take two "
                    "or more, for example 1e-4:1e-2:2."
                )
            if min(_log_gaps(rates)) < MIN_SPACING:
                raise UsageError(
                    f"--learning-rates: rates of {task} are closer than a shift that three digits can show; "
                    "take at most 50 points a decade."
                )

    def request(self, find: FindRecord) -> list[Configuration]:
        """Return all configurations, one replicate after another."""
        return [
            configuration
            for replicate in range(self.replicates)
            for task, templates in self.given.templates_by_task().items()
            for configuration in build_grid(
                templates, shifted_grid(self.given.learning_rates[task], replicate), [replicate]
            )
        ]


def grid_offset(replicate: int) -> float:
    """Return the offset of a replicate's grid in units of its spacing: a uniform draw from [-0.5, 0.5)."""
    return random.Random(f"grid offset of replicate {replicate}").random() - 0.5


def shifted_grid(rates: Sequence[float], replicate: int) -> tuple[float, ...]:
    """Shift the grid of a task by the offset of a replicate, on a log scale.

    Without the shift, the distance between a variant's optimum and the nearest rate would be the same in all
    replicates. Equally good variants would then differ by the loss that the coarse grid causes for each.

    Args:
        rates: Grid of the task, at least two rates, ascending.
        replicate: Index of the replicate.

    Returns:
        As many rates as in `rates`, with three significant digits.
    """
    offset = grid_offset(replicate)
    gaps = _log_gaps(rates)
    gaps = [*gaps, gaps[-1]] if offset >= 0 else [gaps[0], *gaps]
    return tuple(round_rate(rate * 10 ** (offset * gap)) for rate, gap in zip(rates, gaps, strict=True))


def _log_gaps(rates: Sequence[float]) -> list[float]:
    """Return the distances between neighboring rates in decades."""
    return [math.log10(b / a) for a, b in pairwise(rates)]


ALIAS_REACH = 1.0
"""Decades by which the rates of a level of an alias may lie beyond the expected range of its optimum."""
_SHAPELESS = ("alpha", "dropout")
"""Hyperparameters of variants that do not change the shape of a tensor: every level fits the model."""


@dataclass(frozen=True)
class StarDesign(Design):
    """The curve of the learning rate, then one factor at a time at levels other than its default.

    Stage 1 is the curve: each template at all rates of its task. The template at the rate nearest to the
    curve's optimum is called x*. Stage 2 has one arm per factor: each level is trained at up to five rates of
    the curve, half a decade apart around that of x*, and at the rate of the published default. Arms and curve
    have the same seeds. `make_star` finds the levels.

    A level of the alias group moves the best rate and must be compared at its own, see
    `orchestrator.analyze.replacement`. If alpha is k times its default and acts as a rate, the best rate is
    that of x* divided by k. Such a level is also trained half a decade apart from there to x*, then beyond an
    end at which the score is best, and at last at both neighbors of the best rate in the grid of the curve.
    """

    given: DesignInput
    levels: tuple[tuple[Configuration, ...], ...]
    """For each template, copies with one factor at another level."""
    seeds: Sequence[int]
    notes: Sequence[str] = ()
    """The factors and levels that are left out, and why, one line each."""

    def request(self, find: FindRecord) -> list[Configuration]:
        """Return the curves, and the arms of each template whose curve has ended."""
        found: list[Configuration] = []
        for template, levels in zip(self.given.templates, self.levels, strict=True):
            rates = self.given.learning_rates[template.task.name]
            curve = build_grid([template], rates, self.seeds)
            found += curve
            if not all(find(c.fingerprint) for c in curve):
                continue
            scores = _scores_by_rate(template, rates, self.seeds, find)
            if any(scores):
                means = [math.fsum(each) / len(each) if each else math.nan for each in scores]
                _, center = find_center(rates, means, list(map(len, scores)))
                for level in levels:

                    def score(swept: Sequence[float], level: Configuration = level) -> list[float] | None:
                        return self._means(level, swept, find)

                    swept = level_rates(rates, center, alias_decades(level, template), score)
                    found += build_grid([level], swept, self.seeds)
        return found

    def _means(self, level: Configuration, rates: Sequence[float], find: FindRecord) -> list[float] | None:
        """Return the mean score of a level at each rate; None if a run has not ended."""
        if not all(find(c.fingerprint) for c in build_grid([level], rates, self.seeds)):
            return None
        scores = _scores_by_rate(level, rates, self.seeds, find)
        return [math.fsum(each) / len(each) if each else -math.inf for each in scores]

    def outline(self) -> list[Configuration]:
        """Return the curves and arms, assuming for each curve the best rate with the largest arms."""
        found: list[Configuration] = []
        for template, levels in zip(self.given.templates, self.levels, strict=True):
            rates = self.given.learning_rates[template.task.name]
            found += build_grid([template], rates, self.seeds)
            for level in levels:
                largest = max(
                    (_expected_rates(rates, r, alias_decades(level, template)) for r in rates), key=len
                )
                found += build_grid([level], largest, self.seeds)
        return found


def level_rates(
    rates: Sequence[float],
    center: float,
    decades: float | None,
    score: Callable[[Sequence[float]], list[float] | None],
) -> list[float]:
    """Return the rates of a level, ascending.

    Args:
        rates: The rates of the curve.
        center: The rate of x*.
        decades: By how many decades the level of an alias lies above its default; None for other factors.
        score: Rates -> the mean score of the level at each of them; None if it is not known yet.
    """
    swept = _swept_rates(rates, center, decades)
    if decades is None:
        return swept
    ladder, more = _continued(rates, center, decades), set(swept)
    while more and (means := score(swept)) is not None:
        more = _rates_around(ladder, swept, means) - set(swept)
        swept = sorted((*swept, *more))
    return swept


def _expected_rates(rates: Sequence[float], center: float, decades: float | None) -> list[float]:
    """Return the rates of a level whose best rate is the expected one."""

    def score(swept: Sequence[float]) -> list[float]:
        return [-abs(math.log10(rate / center) + (decades or 0.0)) for rate in swept]

    return level_rates(rates, center, decades, score)


def _continued(rates: Sequence[float], center: float, decades: float) -> list[float]:
    """Return the rates of a curve, continued to `ALIAS_REACH` around the optimum that an alias may have.

    Args:
        rates: The curve.
        center: The rate of x*.
        decades: By how many decades the best rate is expected below x*.
    """
    found = list(rates)
    low, high = sorted((center, center / 10**decades))
    while below := _continue_rates(found, -1, low / 10**ALIAS_REACH):
        found = [*reversed(below), *found]
    while above := _continue_rates(found, 1, high * 10**ALIAS_REACH):
        found += above
    return found


def _swept_rates(rates: Sequence[float], center: float, decades: float | None) -> list[float]:
    """Return the first rates of a level, ascending: those around x* and that of the published default.

    Args:
        rates: The rates of the curve.
        center: The rate of x*.
        decades: By how many decades the level of an alias lies above its default, else None. Its rates reach
            the expected optimum half a decade apart, also beyond the curve.
    """
    found = {*resweep_rates(rates, center), default_rate(rates)}
    if decades is not None:
        ladder = _continued(rates, center, decades)
        for i in range(1, math.ceil(abs(decades) / STEP_DECADES) + 1):
            wanted = math.log10(center) - math.copysign(STEP_DECADES * i, decades)
            found.add(min((abs(math.log10(rate) - wanted), rate) for rate in ladder)[1])
    return sorted(found)


def _rates_around(ladder: Sequence[float], swept: Sequence[float], means: Sequence[float]) -> set[float]:
    """Return the rates that resolve the best rate of a level; empty if both ends score best.

    Args:
        ladder: The rates of the curve, continued at both ends; ascending.
        swept: The rates with a score, a part of `ladder`, ascending.
        means: The mean score at each of them.

    Returns:
        The next rate within half a decade beyond an end that scores best, else both neighbors of the best
        rate.
    """
    best, low, high = max(means), means[0], means[-1]
    rate = swept[means.index(best)]
    if low == best == high:
        return set()
    place = ladder.index(rate)
    if best not in (low, high):
        return {*ladder[place - 1 : place + 2]}
    reached = [r for r in ladder if abs(math.log10(r / rate)) <= STEP_DECADES + _ROUNDING_DECADES]
    return {reached[0] if best == low else reached[-1]}


def make_star(
    given: DesignInput, seeds: Sequence[int], factors: Sequence[str], num_levels: int, bases: Path
) -> StarDesign:
    """Make the star design of a study.

    Args:
        given: The templates, and the rates of the curves.
        seeds: The seeds of curves and arms.
        factors: Names of factors, or `all`.
        num_levels: Largest number of levels of a numeric factor besides its default.
        bases: Folder of the base models.

    Raises:
        UsageError: A factor is unknown, or no variant of the study has one of the factors.
    """
    chosen = choose_factors(factors, given.templates)
    notes: list[str] = []
    levels = tuple(
        tuple(c for factor in chosen for c in _levels(template, factor, num_levels, bases, notes))
        for template in given.templates
    )
    if not any(levels):
        raise UsageError(
            f"--factors {' '.join(factors)}: no variant of the study has one of them; "
            "take others, for example: rank batch_size."
        )
    return StarDesign(given, levels, seeds, tuple(dict.fromkeys(notes)))


def _levels(
    template: Configuration, factor: Factor, count: int, bases: Path, notes: list[str]
) -> list[Configuration]:
    """Return copies of a template with a factor at its other levels.

    Args:
        template: Default configuration of a task and variant.
        factor: The factor.
        count: Largest number of levels of a numeric factor.
        bases: Folder of the base models.
        notes: Gets one line for each factor or level that the variant or the base model does not allow.
    """
    variant = template.variant.name
    if factor.variant not in ("", variant):
        return []
    lacking = VARIANT_HYPERPARAMETERS - set(variant_hyperparameters(variant))
    if factor.name in lacking or get_value(template, factor.name) is None:
        notes.append(f"{variant} has no {factor.title}: left out.")
        return []
    found = []
    for level in factor_levels(factor, template, count):
        configuration = apply_values(template, {factor.name: level})
        if reason := _find_error(configuration, factor, level, bases):
            notes.append(f"{variant}, {factor.title} {factor.label(level)}: left out ({reason}).")
        else:
            found.append(configuration)
    if not found:
        notes.append(f"{variant} on {template.task.name}: {factor.title} has no other level.")
    return found


def _find_error(configuration: Configuration, factor: Factor, level: Value, bases: Path) -> str | None:
    """Return why the variant or the base model rejects a level of a factor; None if both accept it."""
    if error := find_settings_error(configuration):
        return error
    rule = HYPERPARAMETERS.get(factor.name)
    if rule is not None and (broken := rule.find_violation(level)):
        return f"{format_value(level)} {broken}"
    changes_shape = factor.variant or factor.name in VARIANT_HYPERPARAMETERS - set(_SHAPELESS)
    if not changes_shape or not loading.has_config(configuration.model):
        return None
    try:
        check_attach([configuration], catalogue.get(configuration.task.name), bases)
    except UsageError as refused:
        return str(refused)
    return None


@dataclass(frozen=True)
class TransferDesign(Design):
    """A grid of learning rates for each level of a factor, widened by itself. `make_transfer` makes them."""

    reason = WideningGrid.reason
    grids: tuple[WideningGrid, ...]
    notes: Sequence[str] = ()
    """The levels that are left out, and why, one line each."""

    def request(self, find: FindRecord) -> list[Configuration]:
        """Return the grids of all levels."""
        return [configuration for grid in self.grids for configuration in grid.request(find)]


def make_transfer(
    grid: WideningGrid, factor: str, levels: Sequence[Value], links: Sequence[str], bases: Path
) -> TransferDesign:
    """Make the design of a study of the transfer of the learning rate.

    Args:
        grid: The grid of one level. Its templates have the levels of the options, and each base model.
        factor: The factor, see `study.levels`.
        levels: At least two levels.
        links: Keys of `study.levels.LINKS`. Curves of several links may have levels in common.
        bases: Folder of the base models.

    Raises:
        UsageError: Fewer than two levels are possible.
    """
    notes: list[str] = []
    found = list(grid.given.templates)
    if factor != MODEL:
        found = [
            configuration
            for template in grid.given.templates
            for link in links
            for level in levels
            if (configuration := _at_level(template, factor, level, link, bases, notes)) is not None
        ]
    distinct = {configuration.fingerprint: configuration for configuration in found}.values()
    if len({level_of(configuration, factor) for configuration in distinct}) < 2:
        reasons = " ".join(dict.fromkeys(notes))
        raise UsageError(f"--factor {factor}: fewer than two levels are possible. {reasons}".strip())
    # Only templates name the tasks of a grid, so the rates of the other tasks do no harm.
    grids = tuple(replace(grid, given=replace(grid.given, templates=(each,))) for each in distinct)
    return TransferDesign(grids, tuple(dict.fromkeys(notes)))


def _at_level(
    template: Configuration, factor: str, level: Value, link: str, bases: Path, notes: list[str]
) -> Configuration | None:
    """Return a template at a level of the factor; None, with a note, if it is not possible."""
    variant, start, title = template.variant.name, level_of(template, factor), level_title(factor)
    lacking = VARIANT_HYPERPARAMETERS - set(variant_hyperparameters(variant))
    if start is None or factor in lacking:
        notes.append(f"{variant} has no {title}: left out.")
        return None
    ratio = 1.0
    if factor != TARGETS:
        ratio = float(level) / float(start)
    elif link != NO_LINK:
        ratio = count_trainable(apply_values(template, {factor: level}), bases)
        ratio /= count_trainable(template, bases)
    found = at_level(template, factor, level, link, ratio)
    if found is None:
        notes.append(f"{variant} has no {link}: left out of --link {link}.")
        return None
    reason = _find_error(found, load_factors()[factor], level, bases)
    batch_size = get_value(found, "batch_size")
    if level_of(found, factor) != level:
        reason = f"a batch is split into {template.batches.accumulation} micro-batches of equal size"
    elif max(found.task.train_size, int(batch_size or 0)) > template.task.train_size:
        reason = f"the task has {template.task.train_size} training examples"
    if reason:
        notes.append(f"{variant}, {title} {level_label(factor, level)}: left out ({reason}).")
    return None if reason else found
