"""The section of a replicated tuning: each variant compared with the tuned baseline."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from orchestrator.analyze import formatting
from orchestrator.analyze.report_parts import Picture, ReportData, Section, new_table
from orchestrator.analyze.results import Summary
from orchestrator.analyze.tuned import tuned_text
from orchestrator.analyze.tuned.tuned_results import TaskComparison, TunedComparison


def _pictures(data: ReportData) -> Sequence[Picture]:
    found = data.summary.comparison
    if found is None:
        return ()
    from orchestrator.analyze.interactive import plotly_tuned
    from orchestrator.analyze.plots import forest, tuned_curves

    return (
        Picture(
            "forest",
            alt="Difference of each variant's test score from the tuned baseline's, with its interval",
            draw=lambda: forest.draw_forest(found),
            interactive=lambda: plotly_tuned.forest_figures(found),
        ),
        Picture(
            "tuned_curves",
            alt="Validation score over the learning rate, from the runs of all replicates",
            draw=lambda: tuned_curves.draw_tuned_curves(found),
            interactive=lambda: plotly_tuned.curve_figures(found),
        ),
    )


def _values(data: ReportData) -> Mapping[str, Any]:
    return {
        "text": tuned_text,
        "points": formatting.points,
        "points_interval": formatting.points_interval,
        "percent": formatting.percent,
    }


def _tables(summary: Summary) -> Sequence[Table | Text]:
    return [] if summary.comparison is None else list(_all_tables(summary.comparison))


def _all_tables(found: TunedComparison) -> Iterator[Table | Text]:
    for task in found.tasks:
        yield _task_table(task)
    yield Text(_legend(found.tasks[0]), style="dim")


def _task_table(task: TaskComparison) -> Table:
    name = tuned_text.shown_name(task.baseline)
    columns = (
        "variant",
        "tuned\ntest score",
        f"minus\n{name}",
        f"{formatting.percent(1 - task.alpha)}\ninterval",
        "<outcome",
        f"{name}\nmatches or\nbeats it",
        "usable\ntunings",
    )
    table = new_table(f"{task.title}, {task.replicates} replicates: differences in points", columns)
    for row in task.rows:
        table.add_row(
            row.variant,
            formatting.number(row.test.mean),
            formatting.points(row.difference) if row.role != "baseline" else "",
            formatting.points_interval(row.interval),
            tuned_text.outcome_text(row),
            "" if row.role == "baseline" else row.counts,
            tuned_text.share_text(row.usable),
            style="dim" if row.role == "baseline" else "",
        )
    return table


def _legend(task: TaskComparison) -> str:
    return (
        "Each variant is tuned in every replicate; the test score of the run that validation chose counts. "
        f"Outcomes with a margin of {100 * task.margin:.3g} points. Usable tunings: those whose chosen run "
        "neither diverged nor collapsed."
    )


COMPARISON = Section(
    "comparison", "Tuned variants against the baseline", pictures=_pictures, tables=_tables, values=_values
)
