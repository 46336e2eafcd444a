"""Caveats: one-line warnings on the limits of what a panel or a search shows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from orchestrator.analyze.results import Curve, Panel
from orchestrator.analyze.tuning import SearchResult

_NOTHING_LEARNED = "no better score than the untrained model's or a constant answer's"
_STOPPED = "the mean is of the seeds that were not stopped early at the best"


def panel_caveats(panel: Panel) -> list[str]:
    """Return the caveats of a panel, one line each, with the labels of the curves that each applies to."""
    labels: dict[str, list[str]] = defaultdict(list)
    for curve in panel.curves:
        for caveat, detail in _curve_caveats(curve):
            labels[caveat].append(curve.label + detail)
    return [f"{panel.title}: {caveat}: {', '.join(who)}." for caveat, who in labels.items()]


def _curve_caveats(c: Curve) -> Iterator[tuple[str, str]]:
    """Yield each caveat of a curve and a detail, often empty, to print after the curve's label."""
    best = c.point_at_rate(c.best_rate)
    if best is None:
        yield "no score yet", ""
        return
    if c.nothing_learned:
        yield f"{_NOTHING_LEARNED} at any rate", ""
        return
    if c.bracketed == "both edges":
        yield "no best rate, the score is the same at both ends of the grid", ""
    elif c.bracketed != "yes":
        yield "best rate at the edge of the grid, the optimum may lie beyond", f" ({c.bracketed})"
    if best.validation.n == 1:
        yield "one seed at the best rate, so no interval", ""
    elif best.validation.interval is None:
        yield "the seeds at the best rate score the same and the items are unknown, so no interval", ""
    if any(r != c.best_rate for r in c.best_rates_leave_one_out):
        yield "without one of the seeds another rate would have been chosen", ""
    if count := best.states.get("diverged"):
        caveat = "seeds diverge at the best rate itself, so read their share and the mean of the others"
        yield caveat, f" ({count} of {best.validation.n})"
    if best.states.get("stopped"):
        yield f"{_STOPPED} rate", ""
    score = best.validation.mean or 0.0
    left_out = [p for p in c.points if not p.eligible]
    better = [p for p in left_out if p.validation.mean is not None and p.validation.mean > score]
    if better:
        rates = ", ".join(f"{p.learning_rate:g}" for p in better)
        yield "the seeds that were not stopped early score higher than the choice", f" at {rates}"
    if len({p.validation.n for p in c.points if p.eligible}) > 1:
        yield "rates have different numbers of seeds", ""


def search_caveats(search: SearchResult) -> list[str]:
    """Return the caveats of a search, one line each."""
    found = []
    for v in search.variants:
        if v.best is None:
            found.append(f"no score yet: {v.variant}.")
            continue
        if v.nothing_learned:
            found.append(f"{_NOTHING_LEARNED} at any point: {v.variant}.")
            continue
        if v.best.stopped_seeds:
            found.append(f"{_STOPPED} point: {v.variant}.")
        if v.edges:
            found.append(f"{v.variant}'s best is not bracketed: {', '.join(v.edges)}.")
    if len({len(v.points) for v in search.variants}) > 1:
        each = ", ".join(f"{v.variant} {len(v.points)}" for v in search.variants)
        found.append(f"variants have different numbers of points ({each}).")
    return [f"{search.task} on {search.model}: {caveat}" for caveat in found]
