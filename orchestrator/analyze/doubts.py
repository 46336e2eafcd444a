"""What a reader should hold against a panel before believing it."""

from __future__ import annotations

import math

from orchestrator.analyze.results import Panel


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
            warn("runs were stopped early at every rate; chosen among the rates with most scores", c.label)
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
