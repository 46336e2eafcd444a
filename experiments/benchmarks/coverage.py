"""Measure error rates, coverage and power of the analysis on synthetic studies with known truth.

    python experiments/benchmarks/coverage.py [--replicates 2000] [--rows intervals power ...] [--json FILE]

The script prints a Markdown table. A row with limits ends in "ok" or "MISSED". The exit code is 1 if a row
has missed its limits. docs/statistics.md has the table of the last complete run.

The intervals of the comparison are paired t intervals. If all true differences change, the intervals move by
the same amounts. Their simultaneous coverage for unequal variants is therefore 100 % minus the error for
equal variants.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

# Each process computes on one core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from measuring import markdown_table
from numpy.typing import NDArray
from scipy import stats as scipy_stats
from star_studies import ROWS, claim_cases, claim_share, interval_shares

from orchestrator.analyze import ratios, stats
from orchestrator.analyze.effects import find_center
from orchestrator.analyze.replacement import Sweep, judge_replacement
from orchestrator.analyze.transfer import slope_interval

Floats = NDArray[np.float64]
Noise = Literal["equal", "unequal", "heavy tails", "near ceiling", "one in ten collapsed"]
STANDARD_DEVIATIONS: dict[Noise, float] = {
    "equal": 1.0,
    "unequal": 1.0,
    "heavy tails": 3**0.5,
    "near ceiling": 1.0,
    "one in ten collapsed": (1 + 0.09 * 15**2) ** 0.5,
}
"""Noise -> the standard deviation of the baseline's scores."""
FLOOR = -50.0
"""The score of a collapsed run in `tuned_scores`, relative to the score at the best rate."""


def score_noise(noise: Noise, shape: tuple[int, ...], generator: np.random.Generator) -> Floats:
    """Draw the noise of scores with equal means. The first variant is the baseline.

    Args:
        noise: The distribution. "equal": normal with standard deviation 1. "unequal": normal with standard
            deviation 2 for one variant, 3 for two variants and 1 for the others. "heavy tails": t
            distribution with 3 degrees of freedom. "near ceiling": the distance below a ceiling is
            exponential with mean 1. "one in ten collapsed": normal with standard deviation 1, and each score
            is 15 lower with probability 0.1.
        shape: (studies, replicates, variants with the baseline), and additional axes.
        generator: The random number generator.
    """
    if noise == "heavy tails":
        return generator.standard_t(3, shape)
    if noise == "near ceiling":
        return 1 - generator.exponential(1.0, shape)
    values = generator.standard_normal(shape)
    if noise == "one in ten collapsed":
        values -= 15.0 * (generator.random(shape) < 0.1)
    if noise == "unequal":
        values[:, :, 1] *= 2
        values[:, :, 2:4] *= 3
    return values


def from_baseline(scores: Floats) -> Floats:
    """Return the differences of K scores from the first of K + 1 scores, shape (..., K)."""
    return scores[..., 1:] - scores[..., :1]


def tuned_scores(
    noise: Noise,
    studies: int,
    replicates: int,
    variants: int,
    rates_per_decade: int,
    generator: np.random.Generator,
) -> Floats:
    """Draw the test scores of replicated tuning, for variants that are equal when tuned.

    Each variant has its own best rate and loses 30 points one decade away from it (quadratically). The
    probability that a run collapses is a logistic function of log10 of the rate; it is one half at 0.7
    decades above the best rate. The noise of a run has two parts: a part with a standard deviation of about
    0.7 points, which validation and test score share, and a part of 0.5 points in each score alone. The grid
    spans three decades. Each replicate shifts the grid by a random offset, which is the same for all
    variants.

    Args:
        noise: The distribution of the noise that validation and test score share. Collapsed runs have the
            score `FLOOR`.
        studies: The number of studies.
        replicates: The number of replicates of each study.
        variants: The number of variants, including the baseline.
        rates_per_decade: The number of learning rates per decade.
        generator: The random number generator.

    Returns:
        Test scores, shape (studies, replicates, variants).
    """
    spacing = 1 / rates_per_decade
    grid = np.arange(0.0, 3.0, spacing)
    best = generator.uniform(1.0, 2.0, (studies, 1, variants, 1))
    offset = generator.uniform(0.0, spacing, (studies, replicates, 1, 1))
    distance = grid + offset - best
    shape = distance.shape
    at_cliff = 1 / (1 + np.exp(-(distance - 0.7) / 0.08))
    broken = 0.1 if noise == "one in ten collapsed" else 0.0
    collapsed = generator.random(shape) < 1 - (1 - at_cliff) * (1 - broken)
    own = score_noise("equal" if broken else noise, shape, generator)
    score = np.where(collapsed, FLOOR, -30 * distance**2 + 0.7 * own)
    validation, test = (score + 0.5 * generator.standard_normal(shape) for _ in range(2))
    return np.take_along_axis(test, validation.argmax(axis=3)[..., None], axis=3)[..., 0]


BATCH = 250
"""The number of studies in one array operation."""
UNBOUNDED = (-np.inf, np.inf)
Limits = tuple[float, float]
ERROR: Limits = (0.0, 5.9)
"""The allowed range of an error, in percent. With 10,000 studies, the standard error of such a percentage is
0.2."""
NO_LIMITS: Limits = (-np.inf, np.inf)
SIZES = [(n, count) for n in (5, 10, 20) for count in (4, 9, 19)]
"""(number of replicates, number of variants besides the baseline)."""
SMALL_SIZES = [(n, count) for n in (5, 10) for count in (4, 9)]


@dataclass(frozen=True)
class Row:
    """A row of the table: a percentage of the studies, or another value without limits."""

    group: str
    case: str
    quantity: str
    value: float
    limits: Limits
    studies: int

    @property
    def passed(self) -> bool:
        """Whether the value lies within its limits."""
        return bool(self.limits[0] <= self.value <= self.limits[1])


def _batches(studies: int) -> Iterator[int]:
    """Return the number of studies in each array operation."""
    return (min(BATCH, studies - start) for start in range(0, studies, BATCH))


def _errs(differences: Floats, true: Floats | float = 0.0) -> NDArray[np.bool_]:
    """Return for each study whether an interval excludes its true difference, shape (studies,)."""
    found = stats.compare(differences, bounds=UNBOUNDED)
    return np.asarray(((found.low > true) | (found.high < true)).any(axis=-1))


def _error_rows(
    group: str, case: str, draw: Callable[[int], tuple[Floats, Floats | float]], studies: int
) -> list[Row]:
    """Measure the error for each of `SIZES`, on parts of the same studies.

    Args:
        group: The group of the rows.
        case: The case, without the size.
        draw: Number of studies -> the differences for the largest size, and the true differences.
        studies: The number of studies.
    """
    errors = np.zeros(len(SIZES))
    for batch in _batches(studies):
        d, true = draw(batch)
        for i, (n, count) in enumerate(SIZES):
            part = true if isinstance(true, float) else true[:count]
            errors[i] += _errs(d[:, :n, :count], part).sum()
    quantity = "error, equal variants"
    return [
        Row(group, f"{case}, n = {n}, K = {count}", quantity, 100 * error / studies, ERROR, studies)
        for (n, count), error in zip(SIZES, errors, strict=True)
    ]


def interval_rows(noise: Noise, studies: int, seed: int) -> list[Row]:
    """Measure the error for variants with equal expected scores."""
    generator = np.random.default_rng(seed)
    n, count = SIZES[-1]

    def draw(batch: int) -> tuple[Floats, float]:
        return from_baseline(score_noise(noise, (batch, n, count + 1), generator)), 0.0

    return _error_rows("intervals", noise, draw, studies)


def tuning_rows(noise: Noise, rates_per_decade: int, studies: int, seed: int) -> list[Row]:
    """Measure the error of the whole procedure, including tuning, for variants that are equal when tuned.

    Validation prefers runs whose noise is positive. Tuned variants with unequal noise are therefore not
    equal. Their true differences are estimated as means over many tunings.
    """
    generator = np.random.default_rng(seed)
    n, count = SIZES[-1]
    arguments = noise, BATCH, n, count + 1, rates_per_decade, generator
    true: Floats | float = 0.0
    if noise == "unequal":
        true = np.mean([from_baseline(tuned_scores(*arguments)).mean(axis=(0, 1)) for _ in range(40)], axis=0)

    def draw(batch: int) -> tuple[Floats, Floats | float]:
        return from_baseline(tuned_scores(noise, batch, *arguments[2:])), true

    return _error_rows("tuning inside", f"{noise}, {rates_per_decade} rates a decade", draw, studies)


def skewed_rows(lower: float, studies: int, seed: int) -> list[Row]:
    """Measure the error if one tuning in ten of every variant but the baseline ends `lower` points lower.

    No method keeps its nominal error here, so the rows have no limits.
    """
    generator = np.random.default_rng(seed)
    n, count = SIZES[-1]

    def draw(batch: int) -> tuple[Floats, float]:
        scores = generator.standard_normal((batch, n, count + 1))
        scores[..., 1:] += lower * (0.1 - (generator.random((batch, n, count)) < 0.1))
        return from_baseline(scores), 0.0

    rows = _error_rows("skewed", f"one in ten {lower:g} points lower", draw, studies)
    return [Row(row.group, row.case, row.quantity, row.value, NO_LIMITS, studies) for row in rows]


def power_rows(noise: Noise, n: int, count: int, studies: int, seed: int) -> list[Row]:
    """Measure the power and the width of the intervals if every second variant differs from the baseline.

    The true difference is 1.15 times the average half-width of an interval for equal normal noise of the same
    standard deviation. The power is the share of these differences that are found.
    """
    generator = np.random.default_rng(seed)
    unit = STANDARD_DEVIATIONS[noise]
    size = 1.15 * float(scipy_stats.t.isf(0.025 / count, n - 1)) * unit * np.sqrt(2 / n)
    true = size * (np.arange(count) % 2 == 0) * (-1.0) ** (np.arange(count) // 2)
    covered = found_share = width = 0.0
    for batch in _batches(studies):
        d = from_baseline(score_noise(noise, (batch, n, count + 1), generator)) + true
        found = stats.compare(d, bounds=UNBOUNDED)
        covered += ((found.low <= true) & (true <= found.high)).all(axis=1).sum()
        found_share += np.where(true > 0, found.low > 0, found.high < 0)[:, true != 0].mean(axis=1).sum()
        width += (found.high - found.low).mean(axis=1).sum()
    case = f"{noise}, n = {n}, K = {count}, difference {size / unit:.1f}"
    coverage = (100 - ERROR[1], 100.0)
    return [
        Row("power", case, "coverage", 100 * covered / studies, coverage, studies),
        Row("power", case, "found differences", 100 * found_share / studies, NO_LIMITS, studies),
        Row("power", case, "mean width, in standard deviations", width / studies / unit, NO_LIMITS, studies),
    ]


def unusable_rows(share: float, n: int, count: int, studies: int, seed: int) -> list[Row]:
    """Measure verdicts and errors if a share of the runs of every variant is unusable."""
    generator = np.random.default_rng(seed)
    verdicts = differs = shares = 0
    for batch in _batches(studies):
        scores = score_noise("equal", (batch, n, count + 1), generator)
        usable = generator.random(scores.shape) >= share
        d = from_baseline(np.where(usable, scores, np.nan))
        verdicts += int(np.isfinite(stats.compare(d).low).all(axis=1).sum())
        differs += int(_errs(d).sum())
        own, base = usable[..., 1:], usable[..., :1]
        for won, lost in zip((own & ~base).sum(axis=1), (base & ~own).sum(axis=1), strict=True):
            p = [stats.paired_share_p(int(w), int(x)) for w, x in zip(won, lost, strict=True)]
            shares += int((stats.holm(p) <= stats.ALPHA).any())
    case = f"{share:.0%} unusable, n = {n}, K = {count}"
    return [
        Row("unusable", case, "verdict for every variant", 100 * verdicts / studies, (95.0, 100.0), studies),
        Row("unusable", case, "error, difference", 100 * differs / studies, ERROR, studies),
        Row("unusable", case, "error, usable share", 100 * shares / studies, ERROR, studies),
    ]


def factor_rows(noise: str, seeds: int, studies: int, seed: int) -> list[Row]:
    """Measure the coverage of the intervals of each factor's losses and of their contrasts with the rate.

    A contrast is the loss of the learning rate minus the loss of the factor.
    """
    shares = interval_shares(ROWS[noise], seeds, studies, np.random.default_rng(seed))
    case = f"{noise}, {seeds} seeds"
    return [
        Row("factors", case, f"coverage of {figure}", 100 * share, (92.5, 97.0), studies)
        for figure, share in shares.items()
    ]


def slope_rows(shape: str, seeds: int, studies: int, seed: int) -> list[Row]:
    """Measure the coverage of the interval of a slope of -1/2 over five levels.

    Each seed moves the best rate, by 0.05 decades at all levels alike and by 0.05 at each level alone. A grid
    has 4 rates a decade. The curve of a level is symmetric, or it is "skewed": steeper above the best rate.
    The parabola then misses the best rate by a bias that depends on the place of the grid and that more seeds
    do not reduce. The second row has the jackknife alone, without the term for this bias.
    """
    generator, levels, slope = np.random.default_rng(seed), 2.0 ** np.arange(5), -0.5
    x, covered = np.arange(-3.5, -0.49, 0.25), np.zeros(2)
    above, below = (0.5, 0.9) if shape == "skewed" else (0.7, 0.7)
    for _ in range(studies):
        shift = generator.uniform(-0.125, 0.125)
        moved = 0.05 * (generator.standard_normal((5, seeds)) + generator.standard_normal(seeds))
        best = -2 + shift + slope * np.log10(levels / 4)[:, None] + moved
        distance = x[:, None] - best[:, None, :]
        scores = 0.9 * np.exp(-((distance / np.where(distance > 0, above, below)) ** 2))
        scores += 0.01 * generator.standard_normal(scores.shape)
        optima = [ratios.grid_optimum(x, own, range(seeds)) for own in scores]
        for i, found in enumerate((optima, [replace(each, step=1e-9) for each in optima])):
            low, high = slope_interval(list(levels), found)[1:3]
            covered[i] += low <= slope <= high
    whole, alone = 100 * covered / studies
    case = f"{shape}, {seeds} seeds"
    return [
        Row("slopes", case, "coverage of the slope", whole, (90.0, 100.0), studies),
        Row("slopes", case, "coverage of the jackknife alone", alone, NO_LIMITS, studies),
    ]


def ratio_rows(design: str, shape: str, n: int, studies: int, seed: int) -> list[Row]:
    """Measure the coverage of the interval of a ratio of two best rates.

    The best rates are 0.3 to 1.2 decades apart. A curve is a bell; with the shape "cliff", all runs collapse
    from 0.4 decades above the best rate on. There the parabola is biased, so these rows have no limits.

    Args:
        design: "grid" (n seeds on one grid) or "tuned" (n replicates, each with its own shifted grid).
        shape: "bell" or "cliff".
        n: The number of seeds or replicates.
        studies: The number of studies.
        seed: The seed of the random numbers.
    """
    generator, seeds, covered = np.random.default_rng(seed), range(n), 0
    for study in range(studies):
        spacing, noise = (0.5, 0.25)[study % 2], (0.003, 0.01, 0.03)[study % 3]
        best = generator.uniform(-0.25, 0.25) + np.array([0.0, generator.uniform(0.3, 1.2)])
        offsets = generator.uniform(0, spacing, n) if design == "tuned" else np.zeros(n)
        x = np.arange(-2.0, 3.01, spacing)[:, None] + offsets
        found = []
        for top, wide in zip(best, generator.uniform(0.4, 1.2, 2), strict=True):
            scores = 0.9 * np.exp(-(((x - top) / wide) ** 2))
            scores *= (x < top + 0.4) | (shape == "bell")
            scores += noise * generator.standard_normal(x.shape)
            tuned = {k: (x[:, k], scores[:, k]) for k in seeds}
            grid = ratios.grid_optimum(x[:, 0], scores, seeds)
            found.append(grid if design == "grid" else ratios.tuned_optimum(tuned))
        low, high = ratios.estimate_ratio(found[1], found[0])[1:3]
        covered += low <= best[1] - best[0] <= high
    limits = (90.0, 100.0) if shape == "bell" else NO_LIMITS
    case = f"{design}, {shape}, n = {n}"
    return [Row("ratios", case, "coverage of the ratio", 100 * covered / studies, limits, studies)]


def replacement_rows(shape: str, noise: float, seeds: int, studies: int, seed: int) -> list[Row]:
    """Measure how often the learning rate is called a replacement for alpha, and no replacement.

    Alpha acts as a rate: k times its default has its best rate at 1 / k. The level x 64 also lowers the best
    score by 0, 1 or 3 margins of 1 point. The rates of a level are those of `sensitivity`.

    Args:
        shape: The score over the rate: "narrow" (a bell of width 0.8 decades; runs collapse 0.8 decades above
            its top), "wide" (width 2), or "cliff" (width 0.8; runs collapse directly above the top).
        noise: The standard deviation of the noise of a seed, and of that of a run.
        seeds: The number of seeds.
        studies: The number of studies.
        seed: The seed of the random numbers.
    """
    from orchestrator.launch.designs import level_rates

    generator, margin = np.random.default_rng(seed), 0.01
    width, cliff = {"narrow": (0.8, 0.8), "wide": (2.0, 2.0), "cliff": (0.8, 0.01)}[shape]
    rates = [10.0 ** (k / 4) for k in range(-16, -3)]

    def study(cost: float) -> str:
        best, by_seed = generator.uniform(-2.6, -2.4), noise * generator.standard_normal(seeds)
        runs: dict[tuple[float, float], Floats] = {}

        def scores(times: float, rate: float) -> Floats:
            if (times, rate) not in runs:
                distance = math.log10(rate * times) - best
                true = 0.9 * math.exp(-((distance / width) ** 2)) - cost * (times == 64)
                own = true + by_seed + noise * generator.standard_normal(seeds)
                items = noise / 2 * generator.standard_normal((2, seeds))
                runs[times, rate] = (own + items) * (distance < cliff)
            return runs[times, rate]

        def means(times: float, swept: Sequence[float]) -> list[float]:
            return [float(scores(times, rate)[0].mean()) for rate in swept]

        def sweep(times: float, swept: Sequence[float]) -> Sweep:
            choices, values = np.array([scores(times, rate) for rate in swept]).transpose(1, 0, 2)
            return Sweep(np.log10(swept), tuple(range(seeds)), choices, values)

        center = find_center(rates, means(1.0, rates), [seeds] * len(rates))[1]
        levels = [0.25, 1.0, 64.0]
        swept = [
            rates if t == 1 else level_rates(rates, center, math.log10(t), partial(means, t)) for t in levels
        ]
        return judge_replacement(list(map(sweep, levels, swept)), 1, levels, margin).outcome

    found = {cost: [study(cost * margin) for _ in range(studies)] for cost in (0, 1, 3)}
    case = f"{shape}, noise {100 * noise:g} points, {seeds} seeds"
    return [
        Row("replacement", case, quantity, 100 * found[cost].count(outcome) / studies, limits, studies)
        for cost, outcome, quantity, limits in (
            (0, "could not", "error, the same score: could not", ERROR),
            (1, "could", "error, 1 margin lower: could", ERROR),
            (1, "could not", "error, 1 margin lower: could not", ERROR),
            (0, "could", "the same score: could", NO_LIMITS),
            (3, "could not", "3 margins lower: could not", NO_LIMITS),
        )
    ]


def claim_rows(index: int, seeds: int, studies: int, seed: int) -> list[Row]:
    """Measure how often claim 1 has the outcome that a case of `claim_cases` counts."""
    case = claim_cases()[index]
    share = claim_share(case, seeds, studies, np.random.default_rng(seed))
    low, high = case.bounds
    name = f"{case.name}, {seeds} seeds"
    return [Row("claims", name, f"claim 1: {case.counted}", 100 * share, (100 * low, 100 * high), studies)]


RowFunction = Callable[..., list[Row]]
"""A function that returns rows of the table. Its last arguments are `studies` and `seed`."""
CHEAP_FACTOR = 5
"""A row that analyzes many studies in one array operation simulates this many times as many studies."""
Task = tuple[str, RowFunction, tuple[Any, ...], int]
"""(group of rows, function that computes them, its first arguments, number of studies)."""


def list_tasks(replicates: int) -> list[Task]:
    """Return the simulations, the slowest ones first.

    Args:
        replicates: The number of synthetic studies of a slow row.
    """
    many = CHEAP_FACTOR * replicates
    noises = list(STANDARD_DEVIATIONS)
    seeds = (3, 5, 10)
    tasks: list[Task] = [("factors", factor_rows, (noise, n), replicates) for noise in ROWS for n in seeds]
    tasks += [
        ("slopes", slope_rows, (shape, n), replicates) for shape in ("symmetric", "skewed") for n in seeds
    ]
    tasks += [
        ("ratios", ratio_rows, (design, shape, n), replicates)
        for design in ("grid", "tuned")
        for shape in ("bell", "cliff")
        for n in seeds
    ]
    tasks += [
        ("replacement", replacement_rows, (shape, noise, n), replicates)
        for shape in ("narrow", "wide", "cliff")
        for noise in (0.003, 0.014)
        for n in (3, 5)
    ]
    tasks += [("claims", claim_rows, (i, 5), replicates) for i in range(len(claim_cases()))]
    tasks += [("tuning", tuning_rows, (noise, 4), many) for noise in noises]
    tasks += [("tuning", tuning_rows, ("equal", 2), many)]
    tasks += [("intervals", interval_rows, (noise,), many) for noise in noises]
    tasks += [("skewed", skewed_rows, (lower,), many) for lower in (6.0, 15.0)]
    tasks += [("power", power_rows, (noise, *size), many) for size in SMALL_SIZES for noise in noises]
    for share in (0.0, 0.03, 0.1):
        tasks += [("unusable", unusable_rows, (share, *size), many) for size in ((20, 19), (10, 9), (5, 4))]
    return tasks


def simulate(task: Task) -> list[Row]:
    """Return the rows of a task. The seed depends on the task alone, so --rows changes no number."""
    group, function, arguments, studies = task
    started = time.monotonic()
    rows = function(*arguments, studies, zlib.crc32(repr((group, function.__name__, arguments)).encode()))
    print(f"{time.monotonic() - started:.0f} s: {group}, {rows[0].case}", file=sys.stderr, flush=True)
    return rows


def row_cells(row: Row) -> list[str]:
    """Return a row as the cells of the printed table."""
    low, high = row.limits
    wanted = (
        f"at most {high:g}" if low == 0 else f"at least {low:g}" if high == 100 else f"{low:g} to {high:g}"
    )
    verdict = "ok" if row.passed else "MISSED"
    if row.limits == NO_LIMITS:
        wanted = verdict = ""
    return [row.group, row.case, row.quantity, f"{row.value:.3g}", wanted, f"{row.studies:,}", verdict]


def main() -> int:
    """Run the benchmark with the arguments of the command line, and return the exit code."""
    groups = sorted({task[0] for task in list_tasks(1)})
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--replicates", type=int, default=2000, help="synthetic studies of an expensive row")
    parser.add_argument("--rows", nargs="+", choices=groups, default=groups, help="groups of rows")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    if options.replicates < 1:
        parser.error(f"--replicates {options.replicates}: at least 1, for example --replicates 2000")
    tasks = [task for task in list_tasks(options.replicates) if task[0] in options.rows]
    with ProcessPoolExecutor(options.processes) as pool:
        rows = [row for found in pool.map(simulate, tasks) for row in found]
    rows.sort(key=lambda row: (row.group, row.quantity))
    header = ["group", "case", "quantity", "value", "wanted", "studies", ""]
    print(markdown_table(header, map(row_cells, rows)))
    if options.json:
        options.json.write_text(json.dumps([{**asdict(row), "passed": row.passed} for row in rows], indent=1))
    missed = sum(not row.passed for row in rows)
    print(f"\n{len(rows) - missed} of {len(rows)} rows ok")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
