"""Rows of the coverage benchmark: each function simulates studies and returns measured percentages.

All of them take `studies`, the number of studies, and `seed`, the seed of the random numbers. n is the number
of replicates, K (`count`) the number of variants besides the baseline.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from synthetic_studies import (
    Noise,
    from_baseline,
    item_scores,
    score_noise,
    tuned_scores,
)

from orchestrator.analyze.statistics import planning
from orchestrator.analyze.statistics.item_noise import item_standard_error
from orchestrator.analyze.statistics.outcome import classify
from orchestrator.analyze.statistics.sign_flips import critical_values, from_z, to_z
from orchestrator.analyze.statistics.simultaneous import SimultaneousIntervals, compare_with_baseline
from orchestrator.analyze.statistics.spending import level_of_look
from orchestrator.analyze.statistics.usable import usable_p_values

Floats = NDArray[np.float64]

BATCH = 250
"""Number of studies in one array operation."""
UNBOUNDED = (-np.inf, np.inf)
ERROR, ERROR_AT_MOST, COVERAGE = (4.0, 6.0), (0.0, 6.0), (93.0, 97.0)
"""The least and the largest percentage that is ok: of an error rate that should be exact, of one that may be
smaller, and of a coverage."""


@dataclass(frozen=True)
class Row:
    """A row of the table."""

    group: str
    case: str
    quantity: str
    percent: float
    """The share of the studies in which the quantity occurred."""
    limits: tuple[float, float]
    """The least and the largest percentage that is ok."""
    studies: int

    @property
    def passed(self) -> bool:
        """Whether the percentage lies within its limits."""
        return self.limits[0] <= self.percent <= self.limits[1]


def _batches(studies: int) -> list[int]:
    """Return the sizes of the batches into which the studies are divided."""
    return [min(BATCH, studies - start) for start in range(0, studies, BATCH)]


def _z(differences: Floats) -> Floats:
    """Return the t statistics of the means over replicates, converted to z values.

    Args:
        differences: Differences from the baseline, shape (studies, n, K).

    Returns:
        Shape (studies, K).
    """
    n = differences.shape[1]
    return to_z(differences.mean(axis=1) / differences.std(axis=1, ddof=1) * np.sqrt(n), n - 1.0)


def noise_rows(noise: Noise, n: int, count: int, studies: int, seed: int) -> list[Row]:
    """Measure the error for equal variants, and the coverage for variants that differ.

    In half of the studies the variants differ by up to 1.5 standard errors in either direction, in the other
    half by 20 times as much, so that all that differ are found to differ. If K is odd, the middle variant
    equals the baseline.
    """
    generator = np.random.default_rng(seed)
    error = missed = 0
    for batch in _batches(studies):
        d = from_baseline(score_noise(noise, (batch, n, count + 1), generator))
        size = np.abs(_z(d)).max(axis=1)
        error += int((size > critical_values(d)[0]).sum())
        true = np.linspace(-1.5, 1.5, count) * np.sqrt(2 / n)
        far = np.where(np.arange(batch)[:, None] % 2, 20.0, 1.0) * true
        missed += int((size > critical_values(d + far[:, None, :])[1]).sum())
    case = f"{noise}, n = {n}, K = {count}"
    return [
        Row("intervals", case, "error, equal variants", 100 * error / studies, ERROR, studies),
        Row("intervals", case, "coverage, equal variants", 100 - 100 * error / studies, COVERAGE, studies),
        Row("intervals", case, "coverage, unequal variants", 100 - 100 * missed / studies, COVERAGE, studies),
    ]


def unusable_rows(share: float, n: int, count: int, studies: int, seed: int) -> list[Row]:
    """Measure verdicts and errors where a share of the runs is unusable, equally often for all variants."""
    generator = np.random.default_rng(seed)
    verdicts = differs = shares = 0
    for _ in range(studies):
        scores = score_noise("equal", (1, n, count + 1), generator)[0]
        usable = generator.random(scores.shape) >= share
        shares += int((usable_p_values(usable[:, 1:], usable[:, 0]) <= 0.05).any())
        found = compare_with_baseline(from_baseline(np.where(usable, scores, np.nan)), 1.0, bounds=UNBOUNDED)
        verdicts += int(np.isfinite(found.low).all())
        differs += int(_excludes(found, 0.0).any())
    case = f"{share:.0%} unusable, n = {n}, K = {count}"
    return [
        Row(
            "unusable runs",
            case,
            "verdict for every variant",
            100 * verdicts / studies,
            (95.0, 100.0),
            studies,
        ),
        Row("unusable runs", case, "error, difference", 100 * differs / studies, ERROR_AT_MOST, studies),
        Row("unusable runs", case, "error, usable share", 100 * shares / studies, ERROR_AT_MOST, studies),
    ]


def _excludes(found: SimultaneousIntervals, value: float) -> NDArray[np.bool_]:
    """Return for each comparison whether its interval excludes a value."""
    return (found.low > value) | (found.high < value)


def tuning_rows(rates_per_decade: int, n: int, count: int, studies: int, seed: int) -> list[Row]:
    """Measure the error of the whole procedure, including tuning, for variants that are equal when tuned."""
    generator = np.random.default_rng(seed)
    error = 0
    for batch in _batches(studies):
        d = from_baseline(tuned_scores(batch, n, count + 1, rates_per_decade, generator))
        error += int((np.abs(_z(d)).max(axis=1) > critical_values(d)[0]).sum())
    case = f"{rates_per_decade} rates a decade, n = {n}, K = {count}"
    return [Row("tuning inside", case, "error, equal variants", 100 * error / studies, ERROR, studies)]


def item_rows(items_per_question: int, studies: int, seed: int) -> list[Row]:
    """Measure the coverage of the true difference over the population of questions, with n = 10 and K = 9."""
    generator = np.random.default_rng(seed)
    questions, missed = 200 // items_per_question, 0
    clusters = np.arange(questions).repeat(items_per_question).tolist()
    for _ in range(studies):
        items = from_baseline(item_scores(items_per_question, questions, 10, 10, generator))
        error = item_standard_error(items.mean(axis=0), clusters)
        found = compare_with_baseline(items.mean(axis=1), 1.0, item_error=error, bounds=UNBOUNDED)
        missed += int(_excludes(found, 0.0).any())
    case = f"{questions} questions of {items_per_question} items, n = 10, K = 9"
    return [
        Row("item noise", case, "coverage over questions", 100 - 100 * missed / studies, COVERAGE, studies)
    ]


def power_rows(n: int, count: int, studies: int, seed: int) -> list[Row]:
    """Measure how often a second study detects the resolvable difference that the first study stated."""
    generator = np.random.default_rng(seed)
    # The resolvable difference is proportional to the standard error. It is computed on a grid of critical
    # values and interpolated, since it is almost linear between them.
    grid = np.geomspace(1.0, 100.0, 60)
    per_error = np.array([planning.resolvable_difference(1.0, n - 1, c) for c in grid])
    detected = 0
    for batch in _batches(studies):
        first, repeat = (
            from_baseline(score_noise("equal", (batch, n, count + 1), generator)) for _ in range(2)
        )
        critical = from_z(critical_values(first)[1], np.full(batch, n - 1.0))
        error = first[:, :, 0].std(axis=1, ddof=1) / np.sqrt(n)
        repeat[:, :, 0] += (error * np.interp(critical, grid, per_error))[:, None]
        detected += int((np.abs(_z(repeat)[:, 0]) > critical_values(repeat)[0]).sum())
    case = f"n = {n}, K = {count}"
    share = 100 * detected / studies
    return [Row("power", case, "resolvable difference is detected", share, (75.0, 85.0), studies)]


def plan_rows(std: float, count: int, studies: int, seed: int) -> list[Row]:
    """Measure how often the planned number of replicates gives a decision, for three true differences.

    Args:
        std: Standard deviation of the differences between replicates, in margins.
        count: K.
        studies: Number of studies.
        seed: Seed of the random numbers.
    """
    generator = np.random.default_rng(seed)
    pilot = from_baseline(score_noise("equal", (BATCH, 10, count + 1), generator))
    z_critical = float(np.mean(critical_values(pilot)[1]))
    n = planning.replicates_to_decide(std, 1.0, z_critical)
    assert n is not None
    rows = []
    for true in (-0.5, 0.0, -1.0):
        decided = 0
        for batch in _batches(studies):
            d = from_baseline(score_noise("equal", (batch, n, count + 1), generator)) * std / np.sqrt(2)
            d[:, :, 0] += true
            critical = critical_values(d)[1]
            mean, error = d[:, :, 0].mean(axis=1), d[:, :, 0].std(axis=1, ddof=1) / np.sqrt(n)
            half = from_z(critical, np.full(batch, n - 1.0)) * error
            decided += int(((mean - half > -1) | (mean + half < 0)).sum())
        case = f"planned n = {n}, K = {count}, true difference {true:+.1f} margins"
        rows.append(Row("plan", case, "is decided", 100 * decided / studies, (75.0, 100.0), studies))
    return rows


def look_rows(step: int, count: int, studies: int, seed: int) -> list[Row]:
    """Measure the error when `step` replicates are added until all is decided, with at most five looks."""
    generator = np.random.default_rng(seed)
    looks = [step * (i + 1) for i in range(5)]
    levels = [level_of_look(looks[: i + 1], looks[-1], comparisons=count) for i in range(5)]
    wrong_at_end = wrong_once = 0
    for _ in range(studies):
        d = from_baseline(score_noise("equal", (1, looks[-1], count + 1), generator))[0]
        wrong = False
        for n, level in zip(looks, levels, strict=True):
            found = compare_with_baseline(d[:n], 1.0, alpha=level, bounds=UNBOUNDED)
            at_this_look = bool(_excludes(found, 0.0).any())
            wrong = wrong or at_this_look
            outcomes = {classify(low, high, 1.0) for low, high in zip(found.low, found.high, strict=True)}
            if "undecided" not in outcomes:
                break
        wrong_once += wrong
        wrong_at_end += at_this_look
    case = f"looks at {', '.join(map(str, looks))}, K = {count}"
    return [
        Row("looks", case, "error at any look", 100 * wrong_once / studies, ERROR_AT_MOST, studies),
        Row("looks", case, "error when it ends", 100 * wrong_at_end / studies, ERROR_AT_MOST, studies),
    ]


RowFunction = Callable[..., list[Row]]
"""A function that returns rows; its last arguments are `studies` and `seed`."""
