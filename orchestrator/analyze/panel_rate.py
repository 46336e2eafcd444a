"""Claim 3 on the curves of a panel: at one fixed learning rate the winner is an artefact of the rate."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from orchestrator.analyze.curve_text import count_text
from orchestrator.analyze.results import TOLERANCE, Curve, Panel
from orchestrator.analyze.tuned.fixed_rate import RateScores, compare_at_fixed_rate
from orchestrator.analyze.tuned.tuned_results import CONTROLS, FixedRateComparison
from orchestrator.analyze.tuned.tuned_verdicts import fixed_rate_verdict
from orchestrator.analyze.verdict import Verdict

_OTHER_FINDINGS = {
    "refuted": "At LoRA's best learning rate no variant changes its order with LoRA.",
    "undecided": "Whether one fixed learning rate changes which variant wins stays open.",
}
"""The heading of the descriptive verdict where the curves do not show the claim."""


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
