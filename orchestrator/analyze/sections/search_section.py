"""The section of a search: the points that the sampler has tried, and the best point of each variant."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from orchestrator.analyze import formatting
from orchestrator.analyze.curve_text import NOTHING_LEARNED
from orchestrator.analyze.report_parts import Picture, ReportData, Section, new_table
from orchestrator.analyze.results import Summary
from orchestrator.analyze.tuning import SearchResult


def _pictures(data: ReportData) -> Sequence[Picture]:
    from orchestrator.analyze.interactive import plotly_search
    from orchestrator.analyze.plots import search_curves

    searches = data.summary.searches
    if not searches:
        return ()
    points = Picture(
        "search",
        alt="Validation score of each point over its learning rate, and the best score so far",
        draw=lambda: search_curves.draw_search(searches),
        interactive=lambda: plotly_search.search_figures(searches),
    )
    return (points,)


def _tables(summary: Summary) -> Sequence[Table]:
    return [_search_table(search) for search in summary.searches]


def _search_table(search: SearchResult) -> Table:
    title = f"{search.task} on {search.model}: the best point of each search"
    columns = (
        "variant",
        "<best point",
        "validation\nscore",
        "test\nscore",
        "points\ntried",
        "<runs",
        "steps\ntrained",
    )
    table = new_table(title, columns)
    for v in search.variants:
        row = ["no score yet", "-", "-"]
        if v.best is not None:
            edge = f" (edge: {', '.join(v.edges)})" if v.edges else ""
            scores = formatting.number(v.best.validation.mean), formatting.number(v.best.test.mean)
            row = [formatting.settings_text(v.best.settings) + edge, *scores]
            if v.nothing_learned:
                row[0] = f"- ({NOTHING_LEARNED})"
        ended = ", ".join(f"{n} {state}" for state, n in v.states.items())
        share = f"{v.steps / v.max_steps:.0%}" if v.max_steps else "-"
        table.add_row(v.variant, *row, f"{len(v.points)}", ended, share)
    return table


SEARCH = Section("search", "Points of the search", pictures=_pictures, tables=_tables)
