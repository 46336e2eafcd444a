"""The section of the curves of a grid: score over learning rate, heat map, and score lost at shared rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from orchestrator.analyze import curve_text, formatting
from orchestrator.analyze.curve_lines import MAX_OVERLAID_CURVES
from orchestrator.analyze.heatmap_cells import heat_map
from orchestrator.analyze.report_parts import Picture, ReportData, Section, new_table
from orchestrator.analyze.results import Curve, CurvePoint, Panel, Summary


def _pictures(data: ReportData) -> Sequence[Picture]:
    from orchestrator.analyze.interactive import plotly_curves, plotly_spread
    from orchestrator.analyze.plots import curves, heatmap, spread

    summary = data.summary
    if not summary.panels:
        return ()
    lines = Picture(
        "curves",
        alt="Validation score over the learning rate, one line per variant",
        draw=lambda: curves.draw_curves(summary),
        interactive=lambda: plotly_curves.curve_figures(summary),
    )
    cells = Picture(
        "heatmap",
        alt="Validation score of each variant at each learning rate, as colored cells",
        draw=lambda: heatmap.draw_heatmap(summary),
        interactive=lambda: plotly_curves.heatmap_figures(summary),
    )
    bests = Picture(
        "spread",
        alt="Test score of each variant at one common rate and at its own best rate",
        draw=lambda: spread.draw_spread(summary),
        interactive=lambda: plotly_spread.spread_figures(summary),
    )
    return lines, cells, bests


def _values(data: ReportData) -> Mapping[str, Any]:
    def reproduce(point: CurvePoint) -> str:
        """Return the command that trains the runs of a point again."""
        return data.study.train_again((run.fingerprint for run in point.runs), store=data.store)

    return {
        "has_run_counts": _has_run_counts(data.summary),
        "reproduce": reproduce,
        "has_many": any(len(p.curves) > MAX_OVERLAID_CURVES for p in data.summary.panels),
        "best_rate": curve_text.best_rate_text,
        "width_text": curve_text.width_text,
        "NOT_RESOLVED": curve_text.NOT_RESOLVED,
    }


def _has_run_counts(summary: Summary) -> bool:
    """Return whether a cell of a heat map on the page shows collapsed or diverged runs."""
    maps = map(heat_map, summary.panels)
    return any(each.has_text_on_page and any(text for row in each.broken for text in row) for each in maps)


def _tables(summary: Summary) -> Sequence[Table | Text]:
    parts: list[Table | Text] = [_panel_table(panel) for panel in summary.panels]
    if parts:
        parts.append(Text(_LEGEND, style="dim"))
    return parts


_LEGEND = (
    "Scores: means over seeds. Usable runs: those that neither diverged nor collapsed "
    "to the level of the untrained model, of those that ended. Lost at LoRA's rate: validation score lost "
    "by training at LoRA's best rate in place of the variant's own."
)
_GRID_TEXT = {"yes": "inside", "low edge": "low edge", "high edge": "high edge", "both edges": "flat"}


def _panel_table(panel: Panel) -> Table:
    rate = "LoRA's\nrate" if panel.reference else "common\nrate"
    columns = (
        "variant",
        "best\nrate",
        "<best in\nthe grid",
        "validation\nscore",
        "95 %\ninterval",
        "test\nscore",
        "usable\nruns",
        f"lost at\n{rate}",
    )
    table = new_table(panel.title, columns)
    for c in panel.curves:
        usable = c.count_runs("finished")
        regret = c.regret_at_reference_best if panel.reference else c.regret_at_average_best
        regret = None if c.nothing_learned else regret
        table.add_row(
            c.label,
            "-" if c.nothing_learned else formatting.rates(c.best_rates) or "-",
            _grid_text(c),
            formatting.number(c.best_validation.mean),
            formatting.interval(c.best_validation, 2) or "-",
            formatting.number(c.best_test.mean),
            f"{usable}/{usable + c.count_runs('collapsed') + c.count_runs('diverged')}",
            formatting.figure(regret),
        )
    if panel.untrained_validation is not None:
        scores = formatting.number(panel.untrained_validation), "", formatting.number(panel.untrained_test)
        table.add_row("untrained", "", "", *scores, "", "", style="dim")
    return table


def _grid_text(curve: Curve) -> str:
    if curve.nothing_learned:
        return curve_text.NOTHING_LEARNED
    return _GRID_TEXT[curve.bracketed] if curve.bracketed else "-"


CURVES = Section("curves", "Score over learning rate", pictures=_pictures, tables=_tables, values=_values)
