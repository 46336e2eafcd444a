"""Verdicts and other texts on the curves of a panel and on searches."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from orchestrator.analyze import formatting
from orchestrator.analyze.intervals import CurveStatistic
from orchestrator.analyze.results import TOLERANCE, Curve, Panel
from orchestrator.analyze.tuned.fixed_rate import RateScores, compare_at_fixed_rate
from orchestrator.analyze.tuned.tuned_results import CONTROLS, FixedRateComparison
from orchestrator.analyze.tuned.tuned_verdicts import fixed_rate_verdict
from orchestrator.analyze.tuning import SearchResult, TuningPoint
from orchestrator.analyze.verdict import Verdict
from orchestrator.record.study_file import StudyFile

NOTHING_LEARNED = "nothing learnt"
"""Text in place of the best rate where `Curve.nothing_learned` is True."""
NOT_RESOLVED = "not resolved"
"""Text in place of a width that is smaller than the spacing of the grid."""
_SAME_RATE_DECADES = 0.005
"""Best rates that lie closer together are shown as one rate."""
_OTHER_FINDINGS = {
    "refuted": "At LoRA's best learning rate no variant changes its order with LoRA.",
    "undecided": "Whether one fixed learning rate changes which variant wins stays open.",
}
"""The heading of the descriptive verdict where the curves do not show claim 3."""


def best_rate_text(curve: Curve) -> str:
    """Return the best rate, marked if the grid does not bracket it: "best at 3e-4 (edge)"."""
    if curve.best_rate is None:
        return "no score yet"
    if curve.nothing_learned:
        return NOTHING_LEARNED
    if curve.bracketed == "both edges":
        return "flat"
    return f"best at {formatting.rates(curve.best_rates)}" + ("" if curve.bracketed == "yes" else " (edge)")


def width_text(curve: Curve, width: CurveStatistic | None) -> str:
    """Return a width in decades as text.

    Args:
        curve: The curve, whose grid does not resolve a width below the spacing of its rates.
        width: One of the widths of the curve.
    """
    logs = [math.log10(p.learning_rate) for p in curve.points]
    spacing = statistics.median([b - a for a, b in pairwise(logs)]) if len(logs) > 1 else 0.0
    if width is not None and not width.is_lower_bound and width.value < spacing - 1e-9:
        return NOT_RESOLVED
    return formatting.figure(width)


def curve_verdict(panel: Panel, study: StudyFile) -> Verdict:
    """Return the descriptive verdict on the best rates of the variants of a panel.

    Args:
        panel: The curves.
        study: The study, which makes the command of the next step.
    """
    rates = {p.learning_rate for c in panel.curves for p in c.points}
    seeds = {run.seed for c in panel.curves for p in c.points for run in p.runs}
    design = (
        f"{panel.title}: {count_text(len(panel.curves), 'variant')}, "
        f"{count_text(len(rates), 'learning rate')} from {formatting.rate(min(rates))} to "
        f"{formatting.rate(max(rates))}, {count_text(len(seeds), 'seed')}; {panel.metric.replace('_', ' ')}."
    )
    return Verdict(
        _finding(panel),
        "descriptive",
        answer(panel),
        design,
        "The rates were chosen on these seeds. Which variant is better is a question for replicated tuning:",
        study.again(experiment="tuned"),
        panel.scope,
    )


def _finding(panel: Panel) -> str:
    """Return in one sentence whether the variants of a panel have different best rates."""
    rates = [rate for curve in panel.curves if (rate := curve.named_best_rate) is not None]
    if len(rates) < 2:
        return "The learning rate at which each variant is best."
    if _decades(rates) < _SAME_RATE_DECADES and not _has_ties(panel):
        return "All variants are best at one learning rate."
    if _shared_best_rates(panel):
        return "No variant needs a learning rate of its own."
    return "Each variant has a learning rate of its own at which it is best."


def _has_ties(panel: Panel) -> bool:
    return any(len(c.best_rates) > 1 for c in panel.curves if c.named_best_rate is not None)


def _shared_best_rates(panel: Panel) -> list[float]:
    """Return the rates at which every variant with a best rate has its best score."""
    own = [set(c.best_rates) for c in panel.curves if c.named_best_rate is not None]
    return sorted(set.intersection(*own)) if own else []


def _decades(rates: Sequence[float]) -> float:
    return math.log10(max(rates) / min(rates))


def count_text(count: int, what: str) -> str:
    """Return a count and the noun `what`, in the plural unless the count is 1."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def answer(panel: Panel) -> str:
    """Describe the best rates of a panel's curves and the spread of the test scores, in 1 or 2 sentences."""
    scored = [c for c in panel.curves if c.best_rate is not None]
    if not scored:
        return f"No learning rate of {panel.title} has a score yet."
    unlearned = [c.label for c in scored if c.nothing_learned]
    if len(unlearned) == len(scored):
        return (
            f"Nothing was learnt on {panel.title}: no run of any variant is better than the untrained "
            "model or a constant answer."
        )
    # A variant that scores the same at both ends of the grid has no best rate, for example a head with a
    # learning rate of its own.
    peaked = [c for c in scored if c.named_best_rate is not None]
    ranked = sorted((c.best_rates, c.label) for c in peaked)
    nothing = f" Nothing was learnt by {', '.join(unlearned)}." if unlearned else ""
    return _peaks_text(panel, peaked, ranked, len(scored)) + nothing


def _peaks_text(
    panel: Panel, peaked: Sequence[Curve], ranked: Sequence[tuple[tuple[float, ...], str]], num_scored: int
) -> str:
    """Describe the best rates of the curves that have one, and the spread of the test scores.

    Args:
        panel: The panel.
        peaked: The curves with a `named_best_rate`.
        ranked: Best rates and label of each of these curves, by ascending rate.
        num_scored: Number of all curves with a score.
    """
    if not ranked:
        title = panel.title
        return f"No variant of {title} scores better inside the grid than at its ends."
    if len(ranked) == 1:
        return f"The best rate of {ranked[0][1]} is {formatting.rates(ranked[0][0])}."
    low, high = ranked[0], ranked[-1]
    decades = _decades([low[0][0], high[0][0]])
    if decades < _SAME_RATE_DECADES and not _has_ties(panel):
        text = f"All {len(ranked)} variants are best at one rate, {formatting.rate(low[0][0])}."
    elif shared := _shared_best_rates(panel):
        names = " and ".join(map(formatting.rate, shared))
        text = f"All {len(ranked)} variants are best at {names}{' alike' if len(shared) > 1 else ''}."
        more = [f"{label} at {formatting.rates(own)}" for own, label in ranked if set(own) > set(shared)]
        text += f" Equally good are {', '.join(more)}." if more else ""
    else:
        edges = "" if all(c.bracketed == "yes" for c in peaked) else " at least"
        ends = f"({low[1]} {formatting.rates(low[0])}, {high[1]} {formatting.rates(high[0])})"
        text = f"The best rates of {len(ranked)} variants lie{edges} {decades:.1f} decades apart {ends}."
    common, own = panel.spread_at_common, panel.spread_at_best
    if common is not None and own is not None and panel.common_rate is not None:
        # Early stopping leaves some variants without a score at a rate that is not their best.
        whose = "their test scores"
        if common.variants < num_scored:
            whose = f"the test scores of {common.variants} of {num_scored} variants"
        where = f"At {panel.common_rate_label} ({formatting.rate(panel.common_rate)})"
        low_score, high_score, own_size = (
            formatting.number(v, 2) for v in (common.low, common.high, own.size)
        )
        ends = f"({common.worst} {low_score} to {common.best} {high_score})"
        spans = f"{formatting.number(common.size, 2)} {ends}; each at its own best rate, {own_size}"
        text += f" {where} {whose} span {spans}."
    return text


def search_verdict(search: SearchResult, study: StudyFile) -> Verdict:
    """Return the descriptive verdict that names the best point of each variant.

    Args:
        search: The search on one task and model.
        study: The study, which makes the command of the next step.
    """
    found = [
        f"{v.variant} has learnt nothing" if v.nothing_learned else _point_text(v.variant, v.best)
        for v in search.variants
        if v.best is not None
    ]
    points = sorted({len(v.points) for v in search.variants})
    each = count_text(points[-1], "point") if len(points) == 1 else f"{points[0]} to {points[-1]} points"
    return Verdict(
        "The search has found a best point for each variant.",
        "descriptive",
        f"Best by validation score: {'; '.join(found)}." if found else "No point has a score yet.",
        f"{search.task} on {search.model}: {count_text(len(search.variants), 'variant')}, {each} each, one "
        f"seed a point; {search.metric.replace('_', ' ')}. The best of many single runs scores too high.",
        "Which variant is better is a question for replicated tuning:",
        study.again(experiment="tuned"),
        search.task,
    )


def _point_text(variant: str, best: TuningPoint) -> str:
    settings, test = formatting.settings_text(best.settings), formatting.number(best.test.mean)
    return f"{variant} {formatting.number(best.validation.mean)} (test {test}) at {settings}"


def compare_panel_at_fixed_rate(panel: Panel) -> FixedRateComparison | None:
    """Compare the test scores of a panel's curves at LoRA's best rate, and each at its own best rate.

    Returns:
        The comparison, over the curves with `nothing_learned` False. None if LoRA's curve or a second one is
        missing among these, or if they do not all share two rates and the best rate of each.
    """
    curves = {
        curve.label: curve
        for curve in panel.curves
        if curve.best_rate is not None and not curve.nothing_learned and curve.variant not in CONTROLS
    }
    if panel.reference is None or panel.reference not in curves or len(curves) < 2:
        return None
    rates = sorted(set.intersection(*({p.learning_rate for p in c.points} for c in curves.values())))
    seeds = sorted({run.seed for curve in curves.values() for p in curve.points for run in p.runs})
    scores = {label: _rate_scores(curve, rates, seeds) for label, curve in curves.items()}
    if any(found is None for found in scores.values()):
        return None
    known = {label: found for label, found in scores.items() if found is not None}
    return compare_at_fixed_rate(rates, known, panel.reference, TOLERANCE)


def _rate_scores(curve: Curve, rates: list[float], seeds: list[int]) -> RateScores | None:
    """Return the test scores of a curve at the shared rates, shape (seeds, rates), NaN where missing.

    Args:
        curve: The curve.
        rates: The rates that all curves share, ascending.
        seeds: The seeds of all curves, ascending.

    Returns:
        The scores and the index of the curve's best rate. None if there are fewer than two shared rates, or
        the best rate is not among them.
    """
    if curve.best_rate not in rates or len(rates) < 2:
        return None
    scores = np.full((len(seeds), len(rates)), math.nan)
    for point in curve.points:
        for run in point.runs:
            if point.learning_rate in rates and run.test is not None:
                scores[seeds.index(run.seed), rates.index(point.learning_rate)] = run.test
    return RateScores(scores, np.full(len(seeds), rates.index(curve.best_rate)))


def panel_rate_verdict(panel: Panel) -> Verdict | None:
    """Return the verdict on claim 3; None if `compare_panel_at_fixed_rate` gives none.

    The best rates are chosen on the same few seeds that are compared, so the verdict is descriptive.
    """
    found = compare_panel_at_fixed_rate(panel)
    if found is None or panel.reference is None:
        return None
    compared = {panel.reference, *(row.variant for row in found.rows)}
    curves = [curve for curve in panel.curves if curve.label in compared]
    seeds = {run.seed for curve in curves for point in curve.points for run in point.runs}
    names = ", ".join(curve.label for curve in curves)
    rates = len(set.intersection(*({point.learning_rate for point in curve.points} for curve in curves)))
    design = (
        f"{panel.title}: {names}; {rates} learning rates with "
        f"{count_text(len(seeds), 'seed')}. The rates are chosen on the same seeds, so this is descriptive; "
        "lora-orchestrator tuned tunes in replicates."
    )
    verdict = fixed_rate_verdict(found, panel.reference, panel.scope, design)
    finding = _OTHER_FINDINGS.get(verdict.outcome, verdict.claim)
    return replace(verdict, claim=finding, outcome="descriptive")
