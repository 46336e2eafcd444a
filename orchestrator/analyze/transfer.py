"""Transfer of the learning rate: how the best rate moves with one other factor, such as the rank.

A level is one value of the factor, with the settings that a link moves with it (see `study.levels`). A curve
has the levels of one variant and one link. The best rate of a level is the optimum of a parabola in the
log rate, with the interval of `ratios`. The slope of a curve is that of log10 of the best rate over log10
of the factor: at slope b, twice the factor has 2 ** b times the rate.

The best rate carries over from level a to level b if b, trained at the best rate of a, loses less than the
margin. As everywhere, validation chooses the rates and the losses are test scores: the rate for a seed is
the best one over the other seeds (`effects.choose_by_others`).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from orchestrator.analyze import effects, ratios, stats
from orchestrator.analyze.factors import Level, normalize, score_array
from orchestrator.analyze.runs import SCORE_EPSILON, finite
from orchestrator.record.schema import Record
from orchestrator.record.study_file import AnalysisSettings
from orchestrator.study.levels import (
    MODEL,
    TARGETS,
    curve_name,
    is_on_curve,
    level_label,
    level_of,
    level_title,
)

if TYPE_CHECKING:
    import pandas as pd

MIN_LEVELS = 3
"""The smallest number of levels with a slope: a line through two points fits always."""


class Known(NamedTuple):
    """A published slope: the best rate is proportional to the factor to the power of `slope`."""

    factor: str
    variant: str
    link: str
    slope: float
    source: str


MUA = "muA, arXiv 2602.06204, Corollary 4.4, second-hand"
KNOWN_SLOPES = (
    Known("rank", "lora", "none", 0.0, MUA),
    Known("rank", "lora", "alpha", -1 / 2, MUA),
    Known("rank", "rslora", "none", -1 / 4, MUA),
    Known(MODEL, "lora", "none", -1 / 2, MUA),
)
"""Published slopes. For A drawn at random (variance 1/width), B = 0, one rate for both and sign descent in
place of Adam, the best rate is proportional to width^(-1/2) rank^(-(1 - g)/2), if the update B A has the
multiplier rank^(-g). The multiplier alpha/rank has g = 1 with fixed alpha and g = 0 with the link alpha; that
of rsLoRA, alpha/sqrt(rank), has g = 1/2. Only the abstract was read here. The corollary is taken from two
summaries that agree. The slope over width supposes that base models differ in width alone."""


@dataclass(frozen=True)
class _Best:
    """A level with its scores and its best rate.

    Attributes:
        level: The runs.
        label: The name of the level.
        position: The value of the factor, or the width of the base model; NaN without such a number.
        rates: The learning rates with a score, ascending.
        choices: The values that choose a rate, shape (rates, seeds); NaN for a missing run.
        values: Test scores, of the same shape.
        optimum: The best rate by the mean of the choices.
    """

    level: Level
    label: str
    position: float
    rates: tuple[float, ...]
    choices: stats.Floats
    values: stats.Floats
    optimum: ratios.Optimum

    @property
    def left_out_for(self) -> str:
        """Why the level is left out of the fit and of the test; empty if it is not."""
        records = self.level.runs.values()
        before = [r.baseline_scores.get("validation", {}).get(r.configuration.task.metric) for r in records]
        known = [score for score in map(finite, before) if not math.isnan(score)]
        floor = max([r.configuration.task.floor for r in records] + known)
        if not any(finite(record.score("validation")) > floor + SCORE_EPSILON for record in records):
            return "nothing learned"
        ends = {"": "", "low edge": "best at the lowest rate", "high edge": "best at the highest rate"}
        return ends[self.optimum.edge]


def transfer_frames(
    records: Sequence[Record], panels: Mapping[str, str], settings: AnalysisSettings
) -> dict[str, pd.DataFrame]:
    """Return the frames `transfer`, `transfer_levels` and `carried` of `Results`.

    Args:
        records: Records with distinct fingerprints, in the order in which the study requested them.
        panels: Fingerprint -> panel.
        settings: The factor, the links, the margin, and what chooses a rate.
    """
    import pandas as pd

    groups: dict[tuple[str, str], dict[str, Level]] = defaultdict(dict)
    for record in records:
        own, normal = record.configuration, normalize(record.configuration)
        level = groups[panels[record.fingerprint], own.variant.name].setdefault(
            normal.fingerprint, Level(normal)
        )
        level.runs[own.optimizer.learning_rate, own.seed] = record
    parts: dict[str, list[dict[str, Any]]] = {"transfer": [], "transfer_levels": [], "carried": []}
    for (panel, variant), by_fingerprint in sorted(groups.items()):
        for link in settings.links:
            of_curve = _find_curve(list(by_fingerprint.values()), settings.factor, link)
            bests = [best for level in of_curve if (best := _find_best(level, settings)) is not None]
            bests.sort(key=lambda each: each.position)
            if not bests:
                continue
            place = {"panel": panel, "curve": curve_name(variant, link), "variant": variant, "link": link}
            carried = [pair | {"panel": panel, "curve": place["curve"]} for pair in _carry(bests)]
            parts["transfer"].append(place | _curve_row(bests, carried, place, settings))
            parts["transfer_levels"] += [place | _level_row(best, settings.factor) for best in bests]
            parts["carried"] += [{k: v for k, v in pair.items() if k != "losses"} for pair in carried]
    return {name: pd.DataFrame(rows) for name, rows in parts.items()}


def _find_curve(levels: Sequence[Level], factor: str, link: str) -> list[Level]:
    """Return the levels of a curve: the most that are one template at several levels, the first of equals."""
    curves = [
        [each for each in levels if is_on_curve(template.configuration, each.configuration, factor, link)]
        for template in levels
    ]
    found = max(curves, key=lambda own: (len(own), sum(len(each.runs) for each in own)), default=[])
    return found if len(found) > 1 else []


def _find_best(level: Level, settings: AnalysisSettings) -> _Best | None:
    """Return a level with its best rate; None if it has no score."""
    rates, seeds = sorted(level.rates), sorted(level.seeds)
    choices = score_array([level], rates, seeds, settings.by)[0, 0]
    values = score_array([level], rates, seeds)[1, 0]
    known = np.isfinite(choices).any(axis=1)
    if not known.any():
        return None
    optimum = ratios.grid_optimum(np.log10(rates)[known], choices[known], seeds)
    value = level_of(level.configuration, settings.factor)
    assert value is not None
    position = float(settings.widths.get(str(value), math.nan)) if settings.factor == MODEL else math.nan
    if settings.factor not in (MODEL, TARGETS):
        position = float(value)
    kept = tuple(rate for rate, is_known in zip(rates, known, strict=True) if is_known)
    label = level_label(settings.factor, value)
    return _Best(level, label, position, kept, choices[known], values[known], optimum)


# -- the slope


def slope_interval(positions: Sequence[float], optima: Sequence[ratios.Optimum]) -> stats.Estimate:
    """Return the slope of a curve, by least squares, with its interval.

    Leaving out a seed leaves it out at all levels. As in `ratios`, half of the spacing of the grid is the
    error of the parabola; here those of the levels are independent. docs/statistics.md has the coverage.

    Args:
        positions: Values of the factor, at least two.
        optima: The best rate at each, on grids with the same seeds.
    """
    offsets = np.log10(positions) - np.log10(positions).mean()
    weights = offsets / np.square(offsets).sum()
    without = [float(weights @ values) for values in zip(*(o.by_seed.values() for o in optima), strict=True)]
    step = float(np.linalg.norm(weights)) * max(optimum.step for optimum in optima)
    return ratios.estimate(float(weights @ [o.log10_rate for o in optima]), without, step)


def _curve_row(
    bests: Sequence[_Best],
    carried: Sequence[Mapping[str, Any]],
    place: Mapping[str, str],
    settings: AnalysisSettings,
) -> dict[str, Any]:
    """Return the row of a curve in `Results.transfer`."""
    inside = [best for best in bests if not best.left_out_for and math.isfinite(best.position)]
    slope, seeds = stats.Estimate(math.nan), min(len(best.level.seeds) for best in bests)
    center = math.nan
    if len(inside) >= MIN_LEVELS and all(best.level.seeds == inside[0].level.seeds for best in inside):
        positions, optima = [best.position for best in inside], [best.optimum for best in inside]
        slope = slope_interval(positions, optima)
        middle = np.mean([optimum.log10_rate for optimum in optima])
        center = float(middle - slope.mean * np.log10(positions).mean())
    key = settings.factor, place["variant"], place["link"]
    known = next((each for each in KNOWN_SLOPES if each[:3] == key), None)
    worst = max(carried, key=lambda pair: pair["lost"], default=None)
    return {
        "factor": settings.factor,
        "title": level_title(settings.factor),
        "levels": ", ".join(best.label for best in bests),
        "inside": len(inside),
        "left_out": ", ".join(f"{best.label} ({why})" for best in bests if (why := best.left_out_for)),
        "seeds": seeds,
        "slope": slope.mean,
        "slope_low": slope.low,
        "slope_high": slope.high,
        "log10_rate_at_1": center,
        "known_slope": math.nan if known is None else known.slope,
        "known_source": "" if known is None else known.source,
        "worst_pair": "" if worst is None else f"{worst['source']} to {worst['target']}",
        "worst": math.nan if worst is None else worst["lost"],
        "worst_low": math.nan if worst is None else worst["lost_low"],
        "worst_high": math.nan if worst is None else worst["lost_high"],
        **_test_carrying([pair["losses"] for pair in carried], settings.margin),
    }


def _level_row(best: _Best, factor: str) -> dict[str, Any]:
    """Return the row of a level in `Results.transfer_levels`."""
    found = ratios.estimate_rate(best.optimum)
    seeds = np.isfinite(best.choices).sum(axis=1)
    return {
        "factor": factor,
        "level": best.label,
        "position": best.position,
        "best_rate": 10**found.mean,
        "best_rate_low": 10**found.low,
        "best_rate_high": 10**found.high,
        "left_out": best.left_out_for,
        "seeds": int(seeds.max()),
        "rates": list(best.rates),
        "quality": np.nanmean(best.choices, axis=1).tolist(),
    }


# -- the score lost by carrying a rate over


def _carry(bests: Sequence[_Best]) -> list[dict[str, Any]]:
    """Return a row of `Results.carried` for each pair of levels that are not left out.

    The additional key `losses` has the loss of each seed. A loss is NaN if the grid of the target does not
    reach the rate of the source. Between two rates of the grid, the score is interpolated.
    """
    rows = []
    for source, target in permutations([best for best in bests if not best.left_out_for], 2):
        losses = _losses(source, target)
        known = losses if np.isfinite(losses).all() else np.array([])
        found = stats.mean_interval(known, stats.DIFFERENCES)
        row = {"source": source.label, "target": target.label, "lost": found.mean, "losses": losses}
        rows.append(row | {"lost_low": found.low, "lost_high": found.high})
    return rows


def _losses(source: _Best, target: _Best) -> stats.Floats:
    """Return what the target loses at the best rate of the source, for each seed with all scores."""
    whole = [
        {s for s, own in zip(sorted(best.level.seeds), scores.T, strict=True) if np.isfinite(own).all()}
        for best in (source, target)
        for scores in [np.vstack([best.choices, best.values])]
    ]
    common = sorted(whole[0] & whole[1])
    if not common:
        return np.array([math.nan])
    a, b = ([sorted(best.level.seeds).index(seed) for seed in common] for best in (source, target))
    rates = np.log10(source.rates)[effects.choose_by_others(source.choices[:, a])]
    own = effects.tuned_scores(target.values[:, b], target.choices[:, b])
    x = np.log10(target.rates)
    at = [
        np.interp(rate, x, column, left=math.nan, right=math.nan)
        for rate, column in zip(rates, target.values[:, b].T, strict=True)
    ]
    return np.asarray(own - np.array(at))


def _test_carrying(losses: Sequence[stats.Floats], margin: float) -> dict[str, Any]:
    """Test whether the rates of a curve carry over, by one-sided t tests over seeds.

    Support needs every loss to be below the margin (an intersection-union test, Berger 1982). Refutation
    needs one loss above the margin, with Bonferroni's correction for the number of pairs. A pair that loses
    nothing with any seed, because both levels have one best rate, is not tested.
    """
    known = [each for each in losses if np.isfinite(each).all()]
    tested = [each for each in known if np.abs(each).max() > 0]
    below = [effects.contrast(each, -margin).p_less for each in tested]
    above = [effects.contrast(each, margin).p_more for each in tested]
    return {
        "pairs": len(losses),
        "p_carries": max(below, default=0.0) if len(known) == len(losses) and losses else 1.0,
        "p_moves": min(1.0, len(losses) * min(above, default=1.0)),
    }
