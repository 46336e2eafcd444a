"""The study on a terminal of 80 columns."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from orchestrator.analyze import words
from orchestrator.analyze.results import Curve, Panel, Summary

_COLUMNS = (
    "variant",
    "best\nrate",
    "validation",
    "test",
    "brack-\neted",
    "width",
    "diver-\nged",
    "regret\n@LoRA",
)
_EDGES = {"yes": "yes", "low edge": "low edge", "high edge": "high edge", "both edges": "flat"}


def render(summary: Summary) -> Group:
    """One table a panel, best variant first, each closed by the answer in words; warnings last."""
    parts: list[Table | Text] = []
    for panel in summary.panels:
        parts += [_table(panel), Text(words.answer(panel)), Text("")]
    if summary.panels:
        parts.append(Text(_legend(summary), style="dim"))
    parts += [Text(f"! {warning}", style="yellow") for warning in summary.warnings]
    return Group(*parts)


def _table(panel: Panel) -> Table:
    table = Table(box=SIMPLE_HEAD, title=words.title(panel), title_justify="left", padding=(0, 1, 0, 0))
    for name in _COLUMNS:
        left = name in ("variant", _COLUMNS[4])
        table.add_column(
            name,
            justify="left" if left else "right",
            overflow="fold",
            min_width=13 if name == "variant" else None,
            no_wrap=name != "variant" and not left,
        )
    for curve in panel.curves:
        table.add_row(*_row(curve))
    if panel.untrained_validation is not None:
        untrained = (words.number(panel.untrained_validation), words.number(panel.untrained_test))
        table.add_row("untrained", "", *untrained, "", "", "", "", style="dim")
    return table


def _row(c: Curve) -> tuple[str, ...]:
    diverged = c.total("diverged")
    return (
        c.label,
        words.rate(c.best_rate),
        words.estimate(c.best_validation),
        words.number(c.best_test.mean),
        _EDGES[c.bracketed] if c.bracketed else "-",
        words.figure(c.width),
        f"{diverged}/{diverged + c.total('finished')}",
        words.figure(c.regret_at_reference_best),
    )


def _legend(summary: Summary) -> str:
    return (
        "± half of the 95 % t-interval over seeds. width: decades of rate within "
        f"{summary.tolerance:g} of the best. diverged: runs that did (worth the task's floor) of those that "
        "ended, over the whole grid. regret: validation score given up at LoRA's best rate."
    )
