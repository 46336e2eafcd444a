"""Best learning rates with intervals, and their ratios between variants, beside published ratios.

The optimum of a curve is the maximum of a parabola in the logarithm of the rate (`stats.find_peak`), fitted
to validation scores. The ratio of two optima is computed from the difference of their logarithms:

- In a grid, the interval is that of the jackknife over seeds, which leaves out a seed of both curves at
  once. All seeds share the rates of the grid, so the spread between seeds does not show the error of the
  parabola. Half of the spacing of the grid at the optimum is therefore added in quadrature.
- In a replicated tuning, every replicate has an optimum on its own shifted grid. The interval is the paired t
  interval over replicates.

experiments/benchmarks/coverage.py (`--rows ratios`) measures how often these intervals contain the true
ratio.

An optimum at an end of its grid gives no ratio but a bound.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from orchestrator.analyze import stats

if TYPE_CHECKING:
    import pandas as pd

FULL = "full"
"""The control that trains all weights. LoRA's ratio is taken over it."""
EDGE_SHARE = 0.25
"""A variant has its optimum at an edge if more than this share of its tunings has, as in `limits`."""


class Published(NamedTuple):
    """A published ratio: the best learning rate of `variant` divided by that of `baseline`."""

    variant: str
    baseline: str
    ratio: float
    source: str
    most_steps: float = math.inf
    """The largest number of optimizer steps for which the ratio is published."""


_REGRET = "LoRA Without Regret, 2025 (14 Llama and Qwen models"
_MATTERS = "Learning Rate Matters, arXiv 2602.04998 (Qwen3-0.6B, rank 128)"
PUBLISHED = (
    Published("lora", FULL, 15.0, f"{_REGRET}; runs of up to about 100 steps)", 100),
    Published("lora", FULL, 10.0, f"{_REGRET})"),
    Published("pissa", "lora", 1 / 10, _MATTERS),
    Published("milora", "lora", 1 / 3.2, _MATTERS),
    Published("dora", "lora", 1 / 1.8, f"{_MATTERS}, from its best rates 1.12e-4 and 2e-4"),
    Published("nzlora", "lora", 1 / 1.8, f"{_MATTERS}, as Init[AB]"),
    Published("olora", "lora", 1 / 18.2, _MATTERS),
    Published("lora_ga", "lora", 1 / 18.2, _MATTERS),
)
"""The published ratios. The first one that fits counts. They were read in the text of the first source, and
in the tables of best rates in the README of the second one's repository (yuang-lee/lr-matters-lora)."""


@dataclass(frozen=True)
class Optimum:
    """The optimum of one curve, or of all tunings of one variant.

    Attributes:
        log10_rate: Log10 of the best rate.
        by_seed: Seed -> log10 of the best rate without this seed (grid) or in this replicate (tuning).
        edge: "low edge" or "high edge" if the optimum lies at an end of the grid, else empty.
        step: The spacing of the grid at the optimum in decades; 0 for replicates, whose grids are shifted.
    """

    log10_rate: float
    by_seed: Mapping[int, float]
    edge: str
    step: float = 0.0


def ratio_rows(
    runs: pd.DataFrame, points: pd.DataFrame, best: pd.DataFrame, references: Mapping[str, str]
) -> Iterator[dict[str, Any]]:
    """Yield the rows of `Results.ratios`.

    Args:
        runs: The runs of the curves or tunings, from `run_frame`.
        points: The points of these runs, from `make_points`.
        best: The best points of the curves or tunings. A curve on which nothing was learned, or with the best
            score at both ends of its grid, has no optimum.
        references: Panel -> label of the curve over which the ratios are taken; empty if there is none.
    """
    known = best["learning_rate"].notna() & ~best["nothing_learned"]
    is_grid = "replicate" not in best
    if is_grid:
        known &= best["bracket"] != "both edges"
    eligible = points.loc[points["eligible"], "point"]
    kept = runs[runs["group"].isin(best.loc[known, "group"]) & runs["point"].isin(eligible)]
    for panel, own in kept.groupby("panel"):
        seeds = sorted(own["seed"].unique())
        found = {
            str(curve): _of_grid(rows, seeds) if is_grid else _of_replicates(rows)
            for curve, rows in own.groupby("curve")
        }
        variants = own.drop_duplicates("curve").set_index("curve")["variant"].to_dict()
        full = next((curve for curve in found if variants[curve] == FULL), "")
        reference, steps = references.get(str(panel), ""), own["steps_horizon"].max()
        for curve in sorted(found, key=lambda curve: (curve != reference, curve)):
            over = {reference: full, full: ""}.get(curve, reference)
            published = _published(variants[curve], variants.get(over, ""), steps)
            ratio = estimate_ratio(found[curve], found[over]) if over in found else stats.Estimate(math.nan)
            yield {"panel": panel, "curve": curve, "baseline": over if over in found else ""} | {
                **columns("rate", estimate_rate(found[curve])),
                "edge": found[curve].edge,
                **columns("ratio", ratio),
                "published": published.ratio if published else math.nan,
                "source": published.source if published else "",
            }


def _of_grid(runs: pd.DataFrame, seeds: list[int]) -> Optimum:
    table = runs.pivot(index="learning_rate", columns="seed", values="validation_score")
    scores = table.reindex(columns=seeds).to_numpy(float)
    return grid_optimum(np.log10(table.index.to_numpy(float)), scores, seeds)


def grid_optimum(x: stats.Floats, scores: stats.Floats, seeds: Sequence[int]) -> Optimum:
    """Return the optimum of a curve on one grid.

    Args:
        x: Log10 of the learning rates, shape (rates,), ascending.
        scores: Validation scores, shape (rates, seeds); NaN for a missing score.
        seeds: The seeds.
    """
    peak, left_out = stats.find_optimum(x, scores)
    at = int(np.argmin(np.abs(x - peak.log10_rate)))
    step = float(np.diff(x[max(0, at - 1) : at + 2]).mean()) if len(x) > 1 else math.inf
    return Optimum(peak.log10_rate, dict(zip(seeds, left_out.tolist(), strict=True)), _edge(peak, x), step)


def _of_replicates(runs: pd.DataFrame) -> Optimum:
    scored = runs.dropna(subset="validation_score").groupby("seed")
    curves = {
        int(str(seed)): (
            np.log10(own["learning_rate"].to_numpy(float)),
            own["validation_score"].to_numpy(float),
        )
        for seed, own in scored
    }
    return tuned_optimum(curves)


def tuned_optimum(curves: Mapping[int, tuple[stats.Floats, stats.Floats]]) -> Optimum:
    """Return the mean of log10 of the best rate over replicates, and that of each replicate.

    Args:
        curves: Seed of the replicate -> log10 of its learning rates and their validation scores, both of
            shape (rates,).
    """
    by_seed, edges = {}, []
    for seed, (x, y) in curves.items():
        peak = stats.find_peak(x, y, np.ones(len(x)))
        by_seed[seed] = peak.log10_rate
        edges.append(_edge(peak, x))
    often = max(("low edge", "high edge"), key=edges.count)
    is_edge = edges.count(often) > EDGE_SHARE * len(edges)
    mean = float(np.mean([*by_seed.values()])) if by_seed else math.nan
    return Optimum(mean, by_seed, often if is_edge else "")


def _edge(peak: stats.Peak, x: stats.Floats) -> str:
    if not peak.at_edge:
        return ""
    return "low edge" if peak.log10_rate - x.min() <= x.max() - peak.log10_rate else "high edge"


_SIDES = {"low edge": -1, "high edge": 1}
"""Edge -> the sign of (true optimum - best rate of the grid)."""


def estimate_rate(own: Optimum) -> stats.Estimate:
    """Return log10 of a best rate with its interval; at an edge, the interval has one end."""
    sides = {_SIDES[own.edge]} if own.edge else set()
    return estimate(own.log10_rate, list(own.by_seed.values()), own.step, sides)


def estimate_ratio(own: Optimum, over: Optimum) -> stats.Estimate:
    """Return log10 of the ratio of two best rates, `own` / `over`, with its interval.

    If an optimum lies at an edge, the ratio is NaN and an end of the interval is the bound.
    """
    values = [own.by_seed[seed] - over.by_seed[seed] for seed in own.by_seed if seed in over.by_seed]
    sides = {_SIDES[own.edge]} if own.edge else set()
    sides |= {-_SIDES[over.edge]} if over.edge else set()
    found = estimate(own.log10_rate - over.log10_rate, values, max(own.step, over.step), sides)
    return found._replace(mean=math.nan) if sides else found


def estimate(
    value: float, by_seed: Sequence[float], step: float, sides: AbstractSet[int] = frozenset()
) -> stats.Estimate:
    """Return a value in decades with its interval.

    Args:
        value: The value.
        by_seed: The values of `Optimum.by_seed`, or their differences.
        step: The spacing of the grid at the optimum in decades; 0 for replicates.
        sides: The signs of (true value - `value`) that optima at edges allow.
    """
    if sides:  # two optima at edges may give no bound
        return stats.Estimate(
            value, value if sides == {1} else math.nan, value if sides == {-1} else math.nan
        )
    if not step:
        return stats.mean_interval(by_seed)
    if len(by_seed) < 2 or not np.isfinite(by_seed).all():
        return stats.Estimate(value)
    found = stats.jackknife(value, by_seed)
    half = math.hypot(0.0 if math.isnan(found.low) else found.high - value, step / 2)
    return stats.Estimate(value, value - half, value + half)


def columns(name: str, found: stats.Estimate) -> dict[str, float]:
    """Return an estimate in decades as the ratio `name` with its interval, `name_low` and `name_high`."""
    ends = {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high}
    return {column: 10**value for column, value in ends.items()}


def _published(variant: str, baseline: str, steps: float) -> Published | None:
    fits = (p for p in PUBLISHED if (p.variant, p.baseline) == (variant, baseline) and steps <= p.most_steps)
    return next(fits, None)
