"""The section of a sensitivity study: the test score lost by each hyperparameter and by the learning rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from orchestrator.analyze.factors.factor_results import FactorEffect, TaskFactors, VariantFactors
from orchestrator.analyze.factors.factor_verdicts import number, points
from orchestrator.analyze.report_parts import Picture, ReportData, Section, new_table
from orchestrator.analyze.results import Summary

LEGEND = (
    "Lost test score in points (0.01 of the score), means over seeds with 95 % intervals. Set blindly (A): "
    "the value is drawn from the factor's range, and nothing else reacts. Tuned again (B): the same with the "
    "learning rate tuned at each value; for the learning rate, with that other factor tuned that makes up "
    "for it best. * acts as a learning rate. Off by 3.16 (D): the value is wrong by that factor, either way. "
    "Gain (C): from tuning this alone, all else at the published default."
)


def _pictures(data: ReportData) -> Sequence[Picture]:
    from orchestrator.analyze.interactive import plotly_factors
    from orchestrator.analyze.plots import factor_bars

    study = data.summary.factor_study
    if study is None or not study.tasks:
        return ()
    bars = Picture(
        "factors",
        alt="Test score lost by each hyperparameter, set blindly and with the learning rate tuned again",
        draw=lambda: factor_bars.draw_factors(study.tasks),
        interactive=lambda: plotly_factors.factor_figures(study.tasks),
    )
    return (bars,)


def _tables(summary: Summary) -> Sequence[Table | Text]:
    tasks = summary.factor_study.tasks if summary.factor_study else ()
    parts: list[Table | Text] = [_variant_table(task, variant) for task in tasks for variant in task.variants]
    return [*parts, Text(LEGEND, style="dim")] if parts else []


def _variant_table(task: TaskFactors, variant: VariantFactors) -> Table:
    outcome = "not counted" if variant.variant in task.uncounted else variant.claim.outcome
    title = f"{variant.variant} on {task.task}: what each factor costs ({outcome})"
    columns = (
        "factor",
        "set blindly\n(A)",
        "tuned again\n(B)",
        "off by\n3.16",
        "gain",
        "usable\nruns",
    )
    table = new_table(title, columns)
    for factor in variant.effects:
        table.add_row(
            mark_alias(factor),
            points(factor.misset),
            points(factor.retuned),
            number(factor.off_by_half_decade.mean),
            number(factor.gain.mean),
            usable_text(factor),
        )
    return table


def mark_alias(factor: FactorEffect) -> str:
    """Return the title of a factor, with a star at its end if the factor acts as a learning rate."""
    return f"{factor.title}*" if factor.alias else factor.title


def usable_text(factor: FactorEffect) -> str:
    """Return the number of usable runs and of all runs that ended: 55/60; "-" without any."""
    return f"{factor.usable.usable}/{factor.usable.n}" if factor.usable else "-"


def _values(data: ReportData) -> Mapping[str, Any]:
    return {
        "points": points,
        "number": number,
        "mark_alias": mark_alias,
        "usable_text": usable_text,
        "ranges": {
            "half": "half of the range",
            "measured": "the measured range",
            "double": "double the range",
        },
    }


FACTORS = Section("factors", "What each hyperparameter costs", _pictures, _tables, _values)
