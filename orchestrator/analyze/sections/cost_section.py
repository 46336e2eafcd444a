"""The section of the costs: time, memory and parameters of each variant, and its test score over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from orchestrator.analyze import formatting
from orchestrator.analyze.costs import CostRow, known_axes, pareto_front, rows_by_title
from orchestrator.analyze.report_parts import Picture, ReportData, Section, new_table
from orchestrator.analyze.results import Summary


def _pictures(data: ReportData) -> Sequence[Picture]:
    from orchestrator.analyze.interactive import plotly_costs
    from orchestrator.analyze.plots import cost_scatter

    rows = [row for own in rows_by_title(data.summary.costs).values() if known_axes(own) for row in own]
    if not rows:
        return ()
    scatter = Picture(
        "costs",
        alt="Test score of each variant over what it costs, with the Pareto front",
        draw=lambda: cost_scatter.draw_costs(rows),
        interactive=lambda: plotly_costs.cost_figures(rows),
    )
    return (scatter,)


def _front(rows: Sequence[CostRow]) -> set[str]:
    """Return the variants of one task and model on the Pareto front of test score and training time."""
    scored = [row for row in rows if row.score.mean is not None and row.train_seconds > 0]
    front = pareto_front([row.train_seconds for row in scored], [row.score.mean or 0.0 for row in scored])
    return {scored[i].label for i in front}


def _values(data: ReportData) -> Mapping[str, Any]:
    return {
        "groups": _groups(data.summary),
        "front": _front,
        "memory_text": memory_text,
        "seconds": seconds_text,
        "time_use": time_use_text(data.summary),
    }


def _groups(summary: Summary) -> dict[str, list[CostRow]]:
    """Return title of the task and model -> all its rows, also those without a score."""
    groups: dict[str, list[CostRow]] = {}
    for row in summary.costs:
        groups.setdefault(row.title, []).append(row)
    return groups


def memory_text(size: int) -> str:
    """Format a number of bytes in gigabytes (1e9 bytes); "-" for 0, which stands for an unknown number."""
    return f"{size / 1e9:.2f} GB" if size else "-"


def seconds_text(seconds: float) -> str:
    """Format a duration: 3.4 s, from 2 minutes on 12.5 min, from 2 hours on 3.1 h."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def time_use_text(summary: Summary) -> str:
    """Return a sentence with the shares of the trainers' time by kind; empty if `time_use` is None."""
    if summary.time_use is None:
        return ""
    shares = ", ".join(f"{name} {share:.1%}" for name, share in summary.time_use.shares.items())
    return f"Time of the trainers, {seconds_text(summary.time_use.total)} in total: {shares}."


def _tables(summary: Summary) -> Sequence[Table | str]:
    tables: list[Table | str] = [_cost_table(title, rows) for title, rows in _groups(summary).items()]
    text = time_use_text(summary)
    return [*tables, text] if text else tables


def _cost_table(title: str, rows: Sequence[CostRow]) -> Table:
    columns = (
        "variant",
        "test\nscore",
        "training\nof a run",
        "evaluation\nof a run",
        "peak\nmemory",
        "trainable\nparameters",
        "all its\nruns",
    )
    table = new_table(f"{title}: cost of a run, mean over fully trained runs", columns)
    for row in rows:
        table.add_row(
            row.label,
            formatting.number(row.score.mean),
            seconds_text(row.train_seconds),
            seconds_text(row.evaluate_seconds),
            memory_text(row.peak_memory),
            f"{row.trainable_parameters:,}",
            seconds_text(row.study_seconds),
        )
    return table


COSTS = Section("costs", "Cost, and score against cost", pictures=_pictures, tables=_tables, values=_values)
