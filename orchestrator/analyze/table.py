"""The summary of a study as tables for a terminal of 80 columns."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from orchestrator.analyze import formatting
from orchestrator.analyze.results import Curve, Panel, Summary
from orchestrator.analyze.tuning import SearchResult

_BRACKET_TEXT = {"yes": "yes", "low edge": "low edge", "high edge": "high edge", "both edges": "flat"}


def render_summary(summary: Summary) -> Group:
    """Render a summary for a terminal.

    The verdicts come first. Every search and panel is a table, the best variant first, with the answer.
    The warnings come last.
    """
    parts: list[Table | Text] = []
    for verdict in summary.verdicts:
        parts += [Text(f"{verdict.claim} {verdict.outcome.capitalize()}. {verdict.answer}"), Text("")]
    for search in summary.searches:
        parts += [_search_table(search), Text("")]
    for panel in summary.panels:
        parts += [_panel_table(panel), Text(formatting.answer(panel)), Text("")]
    if summary.panels:
        parts.append(Text(_legend(summary), style="dim"))
    parts += [Text(f"! {warning}", style="yellow") for warning in summary.warnings]
    return Group(*parts)


def _new_table(title: str) -> Table:
    return Table(box=SIMPLE_HEAD, title=title, title_justify="left", padding=(0, 1, 0, 0))


def _panel_table(panel: Panel) -> Table:
    table = _new_table(formatting.panel_title(panel))
    table.add_column("variant", overflow="fold", min_width=13)
    for name in ("best\nrate", "validation", "test", "brack-\neted", "width", "diver-\nged", "regret\n@LoRA"):
        left = name == "brack-\neted"
        table.add_column(name, justify="left" if left else "right", overflow="fold", no_wrap=not left)
    for curve in panel.curves:
        table.add_row(*_curve_row(curve))
    if panel.untrained_validation is not None:
        untrained = (formatting.number(panel.untrained_validation), formatting.number(panel.untrained_test))
        table.add_row("untrained", "", *untrained, "", "", "", "", style="dim")
    return table


def _curve_row(c: Curve) -> tuple[str, ...]:
    diverged = c.count_runs("diverged")
    return (
        c.label,
        formatting.rate(c.best_rate),
        formatting.estimate(c.best_validation),
        formatting.number(c.best_test.mean),
        _BRACKET_TEXT[c.bracketed] if c.bracketed else "-",
        formatting.figure(c.width),
        f"{diverged}/{diverged + c.count_runs('finished')}",
        formatting.figure(c.regret_at_reference_best),
    )


def _search_table(search: SearchResult) -> Table:
    table = _new_table(f"{search.task} on {search.model}: the best of each search")
    for name in ("variant", "best point", "validation", "test", "points", "ended", "steps"):
        left = name in ("variant", "best point", "ended")
        table.add_column(name, justify="left" if left else "right", overflow="fold")
    for v in search.variants:
        row = ["no score yet", "-", "-"]
        if v.best is not None:
            edge = f" (edge: {', '.join(v.edges)})" if v.edges else ""
            scores = formatting.number(v.best.validation.mean), formatting.number(v.best.test.mean)
            row = [formatting.settings_text(v.best.settings) + edge, *scores]
        ended = ", ".join(f"{n} {state}" for state, n in v.states.items())
        table.add_row(v.variant, *row, f"{len(v.points)}", ended, f"{v.steps}/{v.max_steps}")
    return table


def _legend(summary: Summary) -> str:
    return (
        "± half of the 95 % t-interval over seeds. width: decades of rate within "
        f"{summary.tolerance:g} of the best. diverged: diverged runs (they count as the task's floor) of "
        "those that ended, over the whole grid. regret: validation score lost at LoRA's best rate."
    )
