"""Best learning rates with intervals, and their ratios between variants, beside published ratios.

The optimum of a curve is the maximum of a parabola in the logarithm of the rate (`stats.find_peak`), fitted
to validation scores. The ratio of two optima is computed from the difference of their logarithms:

- In a grid, the interval is that of the jackknife over seeds, which leaves out a seed of both curves at
  once. All seeds share the rates of the grid, so the spread between seeds does not show the error of the
  parabola. Half of the spacing of the grid is therefore added in quadrature. In simulations (3 seeds, 2 or 4
  rates a decade, bells of 0.4 to 1.2 decades), the jackknife alone covered the true ratio in fewer than half
  of the studies if the noise was small. With the spacing it covered 99 to 100 %, and 85 to 100 % if runs
  collapse 0.4 decades above the optimum.
- In a replicated tuning, every replicate has an optimum on its own shifted grid. The interval is the paired t
  interval over replicates. It covered 82 to 96 %.

An optimum at an end of its grid gives no ratio but a bound.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from orchestrator.analyze import stats

if TYPE_CHECKING:
    import pandas as pd

FULL = "full"
"""The control that trains all weights. LoRA's ratio is taken over it."""
EDGE_SHARE = 0.2
"""A replicated tuning has its optimum at an edge if at least this share of its replicates has."""


class Published(NamedTuple):
    """A published ratio of the best learning rates of two variants."""

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
    Published("dora", "lora", 1 / 1.8, _MATTERS),
    Published("nzlora", "lora", 1 / 1.8, f"{_MATTERS}, as Init[AB]"),
    Published("olora", "lora", 1 / 18.2, _MATTERS),
    Published("lora_ga", "lora", 1 / 18.2, _MATTERS),
)
"""The published ratios, each read in the text or the repository of its source. The first one that fits
counts."""


@dataclass(frozen=True)
class _Optimum:
    """The optimum of one curve, or of all tunings of one variant.

    Attributes:
        log10_rate: Log10 of the best rate.
        by_seed: Seed -> log10 of the best rate without this seed (grid) or in this replicate (tuning).
        edge: "low edge" or "high edge" if the optimum lies at an end of the grid, else empty.
        step: The spacing of the grid in decades; 0 for replicates, whose grids are shifted.
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
            yield {"panel": panel, "curve": curve, "baseline": over if over in found else ""} | {
                **_fields("rate", found[curve], None),
                "edge": found[curve].edge,
                **_fields("ratio", found[curve], found.get(over, _NO_OPTIMUM)),
                "published": published.ratio if published else math.nan,
                "source": published.source if published else "",
            }


def _of_grid(runs: pd.DataFrame, seeds: list[int]) -> _Optimum:
    """Return the optimum of the mean curve over seeds, and that without each of the seeds of the panel."""
    table = runs.pivot(index="learning_rate", columns="seed", values="validation_score").reindex(
        columns=seeds
    )
    x = np.log10(table.index.to_numpy(float))
    peak, left_out = stats.find_optimum(x, table.to_numpy(float))
    gaps = np.diff(x)
    step = float(np.median(gaps)) if len(gaps) else math.inf
    return _Optimum(peak.log10_rate, dict(zip(seeds, left_out.tolist(), strict=True)), _edge(peak, x), step)


def _of_replicates(runs: pd.DataFrame) -> _Optimum:
    """Return the mean of log10 of the best rate over replicates, and that of each replicate."""
    by_seed, edges = {}, []
    for seed, own in runs.dropna(subset="validation_score").groupby("seed"):
        x, y = np.log10(own["learning_rate"].to_numpy(float)), own["validation_score"].to_numpy(float)
        peak = stats.find_peak(x, y, np.ones(len(x)))
        by_seed[int(str(seed))] = peak.log10_rate
        edges.append(_edge(peak, x))
    often = max(("low edge", "high edge"), key=edges.count)
    is_edge = len(edges) > 0 and edges.count(often) >= EDGE_SHARE * len(edges)
    mean = float(np.mean([*by_seed.values()])) if by_seed else math.nan
    return _Optimum(mean, by_seed, often if is_edge else "")


def _edge(peak: stats.Peak, x: stats.Floats) -> str:
    if not peak.at_edge:
        return ""
    return "low edge" if peak.log10_rate - x.min() <= x.max() - peak.log10_rate else "high edge"


_NO_OPTIMUM = _Optimum(math.nan, {}, "")
_SIDES = {"low edge": -1, "high edge": 1, "": 0}
"""Edge -> the sign of (true optimum - best rate of the grid)."""


def _fields(name: str, own: _Optimum, over: _Optimum | None) -> dict[str, float]:
    """Return a best rate, or its ratio to another one, as columns `name`, `name_low` and `name_high`.

    Args:
        name: The name of the columns.
        own: The optimum.
        over: The optimum in the denominator; None for the best rate itself.
    """
    base = over or _Optimum(0.0, dict.fromkeys(own.by_seed, 0.0), "", own.step)
    seeds = sorted(own.by_seed.keys() & base.by_seed.keys())
    values = np.array([own.by_seed[seed] - base.by_seed[seed] for seed in seeds])
    found = stats.Estimate(own.log10_rate - base.log10_rate)
    if step := max(own.step, base.step):
        found = stats.jackknife(found.mean, values)
        half = math.hypot(0.0 if math.isnan(found.low) else found.high - found.mean, step / 2)
        ends = (found.mean - half, found.mean + half) if len(seeds) > 1 else (math.nan, math.nan)
        found = stats.Estimate(found.mean, *ends, len(seeds))
    elif len(seeds):
        found = stats.mean_interval(values)
    if sides := {side for side in (_SIDES[own.edge], -_SIDES[base.edge]) if side}:
        ends = (found.mean if sides == {1} else math.nan, found.mean if sides == {-1} else math.nan)
        found = stats.Estimate(found.mean if over is None else math.nan, *ends)
    return {key: 10**value for key, value in zip((name, f"{name}_low", f"{name}_high"), found, strict=False)}


def _published(variant: str, baseline: str, steps: float) -> Published | None:
    fits = (p for p in PUBLISHED if (p.variant, p.baseline) == (variant, baseline) and steps <= p.most_steps)
    return next(fits, None)
