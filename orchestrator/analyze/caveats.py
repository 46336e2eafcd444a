"""What a reader should hold against a panel, a search or a comparison before believing it."""

from __future__ import annotations

import math

from orchestrator.analyze import formatting
from orchestrator.analyze.comparison import Confirmed
from orchestrator.analyze.results import Panel
from orchestrator.analyze.search_results import Search

STOPPED = "the mean is of the seeds that were not stopped early at the best"


def doubts(panel: Panel) -> list[str]:
    """One line a kind of trouble, with the variants that have it."""
    found: dict[str, list[str]] = {}

    def warn(trouble: str, who: str) -> None:
        found.setdefault(trouble, []).append(who)

    for c in panel.curves:
        best = c.point(c.best_rate)
        if best is None:
            warn("no score yet", c.label)
            continue
        if c.bracketed == "both edges":
            warn("no best rate, the score is the same at both ends of the grid", c.label)
        elif c.bracketed != "yes":
            warn(
                "best rate at the edge of the grid, the optimum may lie beyond", f"{c.label} ({c.bracketed})"
            )
        if best.validation.n == 1:
            warn("one seed at the best rate, so no interval", c.label)
        if any(r != c.best_rate for r in c.best_rates_leaving_one_out):
            warn("without one of the seeds another rate would have been chosen", c.label)
        if count := best.states.get("diverged"):
            trouble = "seeds diverge at the best rate itself, read the share and the mean of the rest instead"
            warn(trouble, f"{c.label} ({count} of {best.validation.n})")
        if best.states.get("stopped"):
            warn(f"{STOPPED} rate", c.label)
        better = [
            f"{p.learning_rate:g}"
            for p in c.points
            if not p.chosen_from and (p.validation.mean or -math.inf) > (best.validation.mean or 0.0)
        ]
        if better:
            who = f"{c.label} at {', '.join(better)}"
            warn("the seeds that were not stopped early score higher than the choice", who)
        if len({p.validation.n for p in c.points if p.chosen_from}) > 1:
            warn("rates have different numbers of seeds", c.label)
    return [f"{panel.task} on {panel.model}: {t}: {', '.join(who)}." for t, who in found.items()]


def doubts_of_search(search: Search) -> list[str]:
    where = f"{search.task} on {search.model}"
    found = []
    for variant in search.variants:
        if variant.best is None:
            found.append(f"{where}: no score yet: {variant.variant}.")
            continue
        if variant.best.stopped:
            found.append(f"{where}: {STOPPED} point: {variant.variant}.")
        if variant.edges:
            edges = ", ".join(variant.edges)
            found.append(f"{where}: {variant.variant}'s best is not bracketed: {edges}.")
    counts = {len(v.points) for v in search.variants}
    if len(counts) > 1:
        each = ", ".join(f"{v.variant} {len(v.points)}" for v in search.variants)
        found.append(f"{where}: variants have different numbers of points ({each}).")
    return found


def doubts_of_comparison(found: Confirmed) -> list[str]:
    where, c = f"{found.task} on {found.model}", found.comparison
    edges = [f"{v} {', '.join(chosen.edges)}" for v, chosen in found.chosen.items() if chosen.edges]
    told = [f"{where}: not bracketed, tuned further it might do better: {'; '.join(edges)}."] if edges else []
    budgets = {chosen.points for chosen in found.chosen.values()}
    if len(budgets) > 1:
        each = ", ".join(f"{v} {chosen.points}" for v, chosen in found.chosen.items())
        told.append(f"{where}: tuned with different numbers of points ({each}).")
    if found.untuned:
        told.append(
            f"{where}: no score at any point of the tuning, so not compared and unknown in the claim: "
            f"{', '.join(found.untuned)}."
        )
    if absent := [label for label in c.unknown if label not in found.untuned]:
        told.append(f"{where}: tuned, but without a fresh seed, unknown in the claim: {', '.join(absent)}.")
    if found.looks:
        seeds = ", ".join(map(str, found.looks))
        told.append(
            f"{where}: look {len(found.looks) + 1} at {len(found.seeds)} seeds, after a verdict at {seeds}: "
            "seeds that are added until it decides no longer hold the 5 % exactly."
        )
    diverged = {arm.label: arm.diverged for arm in c.arms}
    for pair in c.pairs:
        if pair.reason and not diverged.get(pair.label):
            told.append(f"{where}: {pair.label}: {pair.reason}.")
        if pair.dropped:
            seeds = ", ".join(map(str, pair.dropped))
            told.append(f"{where}: {pair.label}: left out, one of the two has no score: seeds {seeds}.")
    for arm in (c.baseline, *c.arms):
        if arm.diverged and arm.diverged_interval is not None:
            low, high = (
                formatting.number(x, 2) for x in (arm.diverged_interval.low, arm.diverged_interval.high)
            )
            told.append(
                f"{where}: {arm.label}: {arm.diverged} of {arm.test.n} fresh seeds diverged (share {low} to "
                f"{high}), which leaves its differences undecided; mean of the rest "
                f"{formatting.estimate(arm.survivors)}."
            )
    if not found.chosen:
        told.append(f"{where}: the choice of the first stage is not at hand.")
    return told
