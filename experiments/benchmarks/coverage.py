"""Measure coverage and error rates of the analysis on synthetic studies with known truth.

    python experiments/benchmarks/coverage.py [--replicates 2000] [--rows intervals looks ...] [--json FILE]

Prints a Markdown table. Every row ends in ok or MISSED, depending on whether the percentage lies within its
limits; the exit code is 1 if a row has missed. docs/statistics.md has the table of the last complete run.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

# Each process computes on one core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from measuring import markdown_table
from numpy.typing import NDArray
from star_studies import ROWS, claim_cases, claim_share, interval_shares

from orchestrator.analyze.statistics.outcome import classify
from orchestrator.analyze.statistics.sign_flips import critical_values, to_z
from orchestrator.analyze.statistics.simultaneous import SimultaneousIntervals, compare_with_baseline
from orchestrator.analyze.statistics.spending import level_of_look
from orchestrator.analyze.statistics.usable import usable_p_values

Floats = NDArray[np.float64]
Noise = Literal["equal", "unequal", "heavy tails", "near ceiling"]
NOISES: tuple[Noise, ...] = ("equal", "unequal", "heavy tails", "near ceiling")
FLOOR = -50.0
"""The score of a collapsed run, relative to that of the best rate."""


def score_noise(noise: Noise, shape: tuple[int, int, int], generator: np.random.Generator) -> Floats:
    """Draw the noise of scores, with mean 0; the first variant is the baseline.

    Args:
        noise: The distribution. "equal": normal, standard deviation 1. "unequal": normal, standard deviation
            2 for one variant, 3 for two and 1 for the others. "heavy tails": t with 3 degrees of freedom.
            "near ceiling": the distance below a ceiling is exponential with mean 1.
        shape: (studies, replicates, variants with the baseline).
        generator: The source of random numbers.

    Returns:
        The noise, of the given shape.
    """
    if noise == "heavy tails":
        return generator.standard_t(3, shape)
    if noise == "near ceiling":
        return 1 - generator.exponential(1.0, shape)
    values = generator.standard_normal(shape)
    if noise == "unequal":
        values[:, :, 1] *= 2
        values[:, :, 2:4] *= 3
    return values


def from_baseline(scores: Floats) -> Floats:
    """Return the differences from the baseline.

    Args:
        scores: Scores, shape (..., K + 1), with the baseline first.

    Returns:
        Shape (..., K).
    """
    return scores[..., 1:] - scores[..., :1]


def tuned_scores(
    studies: int, replicates: int, variants: int, rates_per_decade: int, generator: np.random.Generator
) -> Floats:
    """Draw the test scores of replicated tuning, for variants that are equal when tuned.

    Every variant has a best rate of its own, and loses 30 points one decade away from it (quadratically). The
    probability that a run collapses is logistic in the rate: one half at 0.7 decades above the best rate. A
    run has noise with a standard deviation of 0.7 points that validation and test score share, and 0.5 points
    in each score alone. The grid spans three decades. Every replicate shifts it by a random offset, the same
    for all variants.

    Args:
        studies: Number of studies.
        replicates: Number of replicates of each study.
        variants: Number of variants, including the baseline.
        rates_per_decade: Number of learning rates per decade.
        generator: The source of random numbers.

    Returns:
        Shape (studies, replicates, variants).
    """
    spacing = 1 / rates_per_decade
    grid = np.arange(0.0, 3.0, spacing)
    best = generator.uniform(1.0, 2.0, (studies, 1, variants, 1))
    offset = generator.uniform(0.0, spacing, (studies, replicates, 1, 1))
    distance = grid + offset - best
    shape = distance.shape
    collapsed = generator.random(shape) < 1 / (1 + np.exp(-(distance - 0.7) / 0.08))
    score = np.where(collapsed, FLOOR, -30 * distance**2 + 0.7 * generator.standard_normal(shape))
    validation, test = (score + 0.5 * generator.standard_normal(shape) for _ in range(2))
    return np.take_along_axis(test, validation.argmax(axis=3)[..., None], axis=3)[..., 0]


BATCH = 250
"""Number of studies in one array operation."""
UNBOUNDED = (-np.inf, np.inf)
ERROR, ERROR_AT_MOST, COVERAGE = (4.0, 6.0), (0.0, 6.0), (93.0, 97.0)
"""The smallest and the largest allowed percentage: of an error rate that should be 5 %, of one that may be
smaller, and of a coverage."""


@dataclass(frozen=True)
class Row:
    """A row of the table."""

    group: str
    case: str
    quantity: str
    percent: float
    """The percentage of the studies in which the quantity occurred."""
    limits: tuple[float, float]
    """The smallest and the largest allowed percentage."""
    studies: int

    @property
    def passed(self) -> bool:
        """Whether the percentage lies within its limits."""
        return self.limits[0] <= self.percent <= self.limits[1]


def _batches(studies: int) -> list[int]:
    """Return the number of studies in each array operation."""
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

    In half of the studies the variants differ from the baseline by up to 1.5 standard errors in either
    direction. In the other half they differ by 20 times as much, so that every difference is found. If K is
    odd, the middle variant equals the baseline.
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
        Row("intervals", case, "coverage, unequal variants", 100 - 100 * missed / studies, COVERAGE, studies),
    ]


def unusable_rows(share: float, n: int, count: int, studies: int, seed: int) -> list[Row]:
    """Measure verdicts and errors if a share of the runs of every variant is unusable."""
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


def look_rows(step: int, count: int, studies: int, seed: int) -> list[Row]:
    """Measure the error if `step` replicates are added until every outcome is decided, at most five times."""
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


def factor_rows(noise: str, seeds: int, studies: int, seed: int) -> list[Row]:
    """Measure the coverage of each factor's losses, and of their differences from the learning rate's."""
    shares = interval_shares(ROWS[noise], seeds, studies, np.random.default_rng(seed))
    case = f"{noise}, {seeds} seeds"
    return [
        Row("factors", case, f"coverage of {figure}", 100 * share, (92.5, 97.0), studies)
        for figure, share in shares.items()
    ]


def claim_rows(index: int, seeds: int, studies: int, seed: int) -> list[Row]:
    """Measure how often claim 1 has the outcome that a case of `claim_cases` counts."""
    case = claim_cases()[index]
    share = claim_share(case, seeds, studies, np.random.default_rng(seed))
    low, high = case.bounds
    name = f"{case.name}, {seeds} seeds"
    return [Row("claims", name, f"claim 1: {case.counted}", 100 * share, (100 * low, 100 * high), studies)]


RowFunction = Callable[..., list[Row]]
"""Function that returns rows of the table. Its last arguments are `studies` and `seed`."""
CHEAP_FACTOR = 5
"""Rows that analyze many studies in one array operation simulate this many times as many studies."""
Task = tuple[str, RowFunction, tuple[Any, ...], int]
"""Group of rows, function that computes them, its first arguments, and the number of studies."""
SIZES = [(n, count) for n in (5, 10, 20) for count in (4, 9, 19)]
"""Numbers of replicates and of variants besides the baseline."""


def list_tasks(replicates: int) -> list[Task]:
    """Return the simulations, those that take longest first.

    Args:
        replicates: Number of synthetic studies of the expensive rows.
    """
    many = CHEAP_FACTOR * replicates
    tasks: list[Task] = [
        ("unusable", unusable_rows, (share, n, count), replicates)
        for share in (0.0, 0.03, 0.1)
        for n, count in ((20, 19), (10, 9), (5, 4))
    ]
    tasks += [("looks", look_rows, (step, count), replicates) for step, count in ((10, 9), (5, 9), (10, 1))]
    tasks += [("tuning", tuning_rows, (rate, n, 9), many) for rate in (4, 2) for n in (20, 10)]
    tasks += [("tuning", tuning_rows, (rate, 10, 19), many) for rate in (4, 2)]
    tasks += [("factors", factor_rows, (noise, n), replicates) for noise in ROWS for n in (3, 5, 10)]
    tasks += [("claims", claim_rows, (i, 5), replicates) for i in range(len(claim_cases()))]
    tasks += [("intervals", noise_rows, (noise, *size), many) for size in SIZES[::-1] for noise in NOISES]
    return tasks


def simulate(task: Task) -> list[Row]:
    """Return the rows of a task. The seed depends on the task alone, so that --rows changes no result."""
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
    return [row.group, row.case, row.quantity, f"{row.percent:.1f}", wanted, f"{row.studies:,}", verdict]


def main() -> int:
    """Run the benchmark of the command line, and return the exit code."""
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
    header = ["group", "case", "quantity", "percent", "wanted", "studies", ""]
    print(markdown_table(header, map(row_cells, rows)))
    if options.json:
        options.json.write_text(json.dumps([{**asdict(row), "passed": row.passed} for row in rows], indent=1))
    missed = sum(not row.passed for row in rows)
    print(f"\n{len(rows) - missed} of {len(rows)} rows ok")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
