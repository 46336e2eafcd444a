"""Warnings: what limits the conclusions from a panel, a search or a comparison."""

from __future__ import annotations

import math

from orchestrator.analyze import formatting
from orchestrator.analyze.comparison import TunedComparison
from orchestrator.analyze.results import Panel
from orchestrator.analyze.search_results import SearchResult
from orchestrator.analyze.significance import Comparison

STOPPED_CAVEAT = "the mean is of the seeds that were not stopped early at the best"


def panel_caveats(panel: Panel) -> list[str]:
    """Return one line per kind of caveat, with the variants that it applies to."""
    labels_by_caveat: dict[str, list[str]] = {}

    def add(caveat: str, label: str) -> None:
        labels_by_caveat.setdefault(caveat, []).append(label)

    for c in panel.curves:
        best = c.point_at_rate(c.best_rate)
        if best is None:
            add("no score yet", c.label)
            continue
        if c.bracketed == "both edges":
            add("no best rate, the score is the same at both ends of the grid", c.label)
        elif c.bracketed != "yes":
            add("best rate at the edge of the grid, the optimum may lie beyond", f"{c.label} ({c.bracketed})")
        if best.validation.n == 1:
            add("one seed at the best rate, so no interval", c.label)
        if any(r != c.best_rate for r in c.best_rates_leave_one_out):
            add("without one of the seeds another rate would have been chosen", c.label)
        if count := best.states.get("diverged"):
            caveat = "seeds diverge at the best rate itself, read the share and the mean of the rest instead"
            add(caveat, f"{c.label} ({count} of {best.validation.n})")
        if best.states.get("stopped"):
            add(f"{STOPPED_CAVEAT} rate", c.label)
        better = [
            f"{p.learning_rate:g}"
            for p in c.points
            if not p.eligible and (p.validation.mean or -math.inf) > (best.validation.mean or 0.0)
        ]
        if better:
            who = f"{c.label} at {', '.join(better)}"
            add("the seeds that were not stopped early score higher than the choice", who)
        if len({p.validation.n for p in c.points if p.eligible}) > 1:
            add("rates have different numbers of seeds", c.label)
    return [f"{panel.task} on {panel.model}: {t}: {', '.join(who)}." for t, who in labels_by_caveat.items()]


def search_caveats(search: SearchResult) -> list[str]:
    """Return the caveats of a search, one line each."""
    where = f"{search.task} on {search.model}"
    found = []
    for variant in search.variants:
        if variant.best is None:
            found.append(f"{where}: no score yet: {variant.variant}.")
            continue
        if variant.best.stopped_seeds:
            found.append(f"{where}: {STOPPED_CAVEAT} point: {variant.variant}.")
        if variant.edges:
            edges = ", ".join(variant.edges)
            found.append(f"{where}: {variant.variant}'s best is not bracketed: {edges}.")
    counts = {len(v.points) for v in search.variants}
    if len(counts) > 1:
        each = ", ".join(f"{v.variant} {len(v.points)}" for v in search.variants)
        found.append(f"{where}: variants have different numbers of points ({each}).")
    return found


def comparison_caveats(result: TunedComparison) -> list[str]:
    """Return the caveats of a comparison, one line each."""
    where, c = f"{result.task} on {result.model}", result.comparison
    caveats = [*_tuning_caveats(result, where), *_pair_caveats(c, where), *_divergence_caveats(c, where)]
    if not result.chosen:
        caveats.append(f"{where}: the choice of the first stage is not at hand.")
    return caveats


def _tuning_caveats(result: TunedComparison, where: str) -> list[str]:
    """Return what limits the choice of the points and of the seeds."""
    edges = [f"{v} {', '.join(chosen.edges)}" for v, chosen in result.chosen.items() if chosen.edges]
    caveats = (
        [f"{where}: not bracketed, tuned further it might do better: {'; '.join(edges)}."] if edges else []
    )
    budgets = {chosen.points for chosen in result.chosen.values()}
    if len(budgets) > 1:
        each = ", ".join(f"{v} {chosen.points}" for v, chosen in result.chosen.items())
        caveats.append(f"{where}: tuned with different numbers of points ({each}).")
    if result.untuned:
        caveats.append(
            f"{where}: no score at any point of the tuning, so not compared and unknown in the claim: "
            f"{', '.join(result.untuned)}."
        )
    not_compared = result.comparison.not_compared
    if absent := [label for label in not_compared if label not in result.untuned]:
        caveats.append(
            f"{where}: tuned, but without a fresh seed, unknown in the claim: {', '.join(absent)}."
        )
    if result.looks:
        seeds = ", ".join(map(str, result.looks))
        caveats.append(
            f"{where}: look {len(result.looks) + 1} at {len(result.seeds)} seeds, after a verdict at {seeds}"
            ": seeds that are added until it decides no longer hold the 5 % exactly."
        )
    return caveats


def _pair_caveats(c: Comparison, where: str) -> list[str]:
    """Return which pairs are not compared as the others are."""
    caveats = []
    diverged = {arm.label: arm.diverged for arm in c.arms}
    for pair in c.pairs:
        if pair.reason and not diverged.get(pair.label):
            caveats.append(f"{where}: {pair.label}: {pair.reason}.")
        if pair.dropped:
            seeds = ", ".join(map(str, pair.dropped))
            caveats.append(f"{where}: {pair.label}: left out, one of the two has no score: seeds {seeds}.")
    return caveats


def _divergence_caveats(c: Comparison, where: str) -> list[str]:
    """Return which variants have diverged seeds."""
    caveats = []
    for arm in (c.baseline, *c.arms):
        if arm.diverged and arm.diverged_interval is not None:
            low, high = (
                formatting.number(x, 2) for x in (arm.diverged_interval.low, arm.diverged_interval.high)
            )
            caveats.append(
                f"{where}: {arm.label}: {arm.diverged} of {arm.test.n} fresh seeds diverged (share {low} to "
                f"{high}), which leaves its differences undecided; mean of the rest "
                f"{formatting.estimate(arm.without_diverged)}."
            )
    return caveats
