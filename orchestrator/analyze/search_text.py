"""Text about the best points of a search, for the terminal and the report."""

from __future__ import annotations

from orchestrator.analyze import formatting
from orchestrator.analyze.curve_text import count_text, replicated_command
from orchestrator.analyze.tuning import SearchResult, TuningPoint
from orchestrator.analyze.verdict import Verdict


def search_verdict(search: SearchResult, command: str) -> Verdict:
    """Return the descriptive verdict that names the best point of each variant.

    Args:
        search: The search on one task and model.
        command: The command of the study, from which the command of the next step is made.
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
        replicated_command(command),
        search.task,
    )


def _point_text(variant: str, best: TuningPoint) -> str:
    settings, test = formatting.settings_text(best.settings), formatting.number(best.test.mean)
    return f"{variant} {formatting.number(best.validation.mean)} (test {test}) at {settings}"
