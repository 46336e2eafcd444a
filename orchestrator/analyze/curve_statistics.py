"""The statistics of a panel's curves, computed on all seeds and again without each seed in turn."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.analyze import curve_shape
from orchestrator.analyze.censored import PointOutcome, eligible_points
from orchestrator.analyze.results import TOLERANCE, CurvePoint, Run, is_reference


@dataclass(frozen=True)
class CurveMeans:
    """A curve as numbers: the means over seeds at each rate. All lists have one entry for each rate.

    A rate without a score is left out, so that the curve is interpolated over it, unless a run was stopped
    there. A rate with a stopped run stays, and its scores are None unless it is eligible.
    """

    rates: list[float]
    x: list[float]
    """log10 of the rates."""
    y: list[float | None]
    """The mean validation scores."""
    test: list[float | None]
    """The mean test scores."""
    diverged: list[float]
    """The shares of diverged seeds."""
    best: int | None
    """The index of the best rate; None without a score."""

    @property
    def best_rate(self) -> float | None:
        """The best rate; None without a score."""
        return None if self.best is None else self.rates[self.best]

    @property
    def best_rates(self) -> tuple[float, ...]:
        """All rates with the score of the best rate, ascending."""
        top = None if self.best is None else self.y[self.best]
        if top is None:
            return ()
        scores = zip(self.rates, self.y, strict=True)
        return tuple(rate for rate, y in scores if y is not None and y >= top - curve_shape.SCORE_EPSILON)


@dataclass(frozen=True)
class CurveStatistics:
    """The statistics of one curve, see `curve_shape`; None where the curve does not determine one."""

    best_rate: float | None = None
    interpolated_log_rate: float | None = None
    """log10 of the rate at the parabola's peak."""
    width: tuple[float, bool] | None = None
    """The width in decades, and whether it is only a lower bound."""
    width_90: tuple[float, bool] | None = None
    """The same, with a threshold at 90 % of the way from the floor to the best score."""
    half_decade_regret: tuple[float, float] | None = None
    """The mean regret, and the decades over which it is taken."""
    regret_at_reference: float | None = None
    """The best score minus the score at LoRA's best rate."""
    regret_at_average: float | None = None
    """The best score minus the score at the rate that is best on average over the variants."""


@dataclass(frozen=True)
class PanelStatistics:
    """The statistics of all curves of a panel, and the rates at which they are compared."""

    means: Mapping[str, CurveMeans]
    """Label -> means."""
    curves: Mapping[str, CurveStatistics]
    """Label -> statistics."""
    reference: str | None
    """The label of LoRA's curve."""
    reference_rate: float | None
    """LoRA's best rate."""
    average_rate: float | None
    """The rate that is best on average over the variants."""

    @property
    def common_rate(self) -> float | None:
        """LoRA's best rate, or else the rate that is best on average."""
        return self.average_rate if self.reference_rate is None else self.reference_rate


def panel_statistics(
    points: Mapping[str, Sequence[CurvePoint]], floor: float, without_seed: int | None = None
) -> PanelStatistics:
    """Compute the statistics of a panel.

    Args:
        points: Label -> the points of the curve.
        floor: The score of a constant or untrained answer.
        without_seed: A seed to leave out, for the jackknife. Seeds are paired, so the seed is left out of all
            curves at once, and the rates at which the curves are compared are chosen again.
    """
    means = {label: _curve_means(own, floor, without_seed) for label, own in points.items()}
    reference = _reference_curve(means)
    rate = None if reference is None else means[reference].best_rate
    average = _average_best_rate(means)
    curves = {label: _curve_statistics(m, floor, rate, average) for label, m in means.items()}
    return PanelStatistics(means, curves, reference, rate, average)


def point_outcome(runs: Sequence[Run]) -> PointOutcome:
    """Return the outcome of the runs of a point, from which `eligible_points` decides."""
    scores = [r.validation for r in runs if r.validation is not None]
    return PointOutcome(scores, sum(r.state == "stopped" for r in runs))


def _curve_means(points: Sequence[CurvePoint], floor: float, without_seed: int | None) -> CurveMeans:
    rates: list[float] = []
    y: list[float | None] = []
    test: list[float | None] = []
    diverged: list[float] = []
    runs_left = [[r for r in point.runs if r.seed != without_seed] for point in points]
    eligible = eligible_points([point_outcome(runs) for runs in runs_left], floor)
    for point, runs, is_eligible in zip(points, runs_left, eligible, strict=True):
        scores = [r.validation for r in runs if r.validation is not None]
        tests = [r.test for r in runs if r.test is not None]
        if not scores and "stopped" not in point.states:
            continue
        usable = bool(scores) and is_eligible
        rates.append(point.learning_rate)
        y.append(math.fsum(scores) / len(scores) if usable else None)
        test.append(math.fsum(tests) / len(tests) if usable and tests else None)
        diverged.append(sum(r.state == "diverged" for r in runs) / len(scores) if scores else 0.0)
    return CurveMeans(rates, [math.log10(r) for r in rates], y, test, diverged, curve_shape.best_index(y))


def _curve_statistics(
    m: CurveMeans, floor: float, reference_rate: float | None, average_rate: float | None
) -> CurveStatistics:
    if m.best is None or (best := m.y[m.best]) is None:
        return CurveStatistics()

    def regret(rate: float | None) -> float | None:
        score = None if rate is None else curve_shape.score_at(m.x, m.y, math.log10(rate))
        return None if score is None else best - score

    width_90 = None
    if best > floor + curve_shape.SCORE_EPSILON:
        width_90 = curve_shape.width(m.x, m.y, m.best, floor + 0.9 * (best - floor))
    return CurveStatistics(
        best_rate=m.rates[m.best],
        interpolated_log_rate=curve_shape.parabola_peak(m.x, m.y, m.best),
        width=curve_shape.width(m.x, m.y, m.best, best - TOLERANCE),
        width_90=width_90,
        half_decade_regret=curve_shape.mean_regret(m.x, m.y, m.best),
        regret_at_reference=regret(reference_rate),
        regret_at_average=regret(average_rate),
    )


def _reference_curve(means: Mapping[str, CurveMeans]) -> str | None:
    """Return the label of LoRA's curve; None without one.

    If there are several, for example with different alphas, it is the curve with the highest best score.
    """
    scores = {
        label: m.y[m.best] or 0.0 for label, m in means.items() if is_reference(label) and m.best is not None
    }
    return max(sorted(scores), key=lambda label: scores[label]) if scores else None


def _average_best_rate(means: Mapping[str, CurveMeans]) -> float | None:
    """Return the rate with the highest mean over variants, among those at which every variant has a score."""
    scores_by_rate: dict[float, list[float]] = defaultdict(list)
    scored = [m for m in means.values() if m.best is not None]
    for m in scored:
        for rate, score in zip(m.rates, m.y, strict=True):
            if score is not None:
                scores_by_rate[rate].append(score)
    shared = [rate for rate in sorted(scores_by_rate) if len(scores_by_rate[rate]) == len(scored)]
    if not shared:
        return None
    return max(shared, key=lambda rate: (round(math.fsum(scores_by_rate[rate]), 9), -rate))
