"""Rendering of a summary for a terminal of 80 columns: the verdicts first, then the tables."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from orchestrator.analyze import formatting
from orchestrator.analyze.results import Summary
from orchestrator.analyze.sections.catalogue import SECTIONS
from orchestrator.analyze.verdict import Verdict

OUTCOME_STYLES = {"supported": "green", "refuted": "red", "undecided": "yellow", "descriptive": "cyan"}


def render_summary(summary: Summary) -> Group:
    """Render a summary: the verdicts, the tables of each section of the report, and the warnings."""
    parts: list[RenderableType] = []
    for verdict in summary.verdicts:
        parts += [*_verdict_lines(verdict), Text("")]
    for section in SECTIONS:
        for part in section.tables(summary):
            parts += [part, Text("")]
    parts += [Text(f"! {warning}", style="yellow") for warning in summary.warnings]
    return Group(*parts)


def _verdict_lines(verdict: Verdict) -> Iterator[RenderableType]:
    """Yield the outcome with the claim, and below it the answer, the design, and the next step."""
    style = OUTCOME_STYLES[verdict.outcome]
    yield Text.assemble((verdict.outcome.upper(), f"bold {style}"), "  ", (verdict.heading, "bold"))
    yield Padding(Text(verdict.answer), (0, 0, 0, 2))
    yield Padding(Text(verdict.design, style="dim"), (0, 0, 0, 2))
    if verdict.next_step:
        yield Padding(Text(verdict.next_step), (0, 0, 0, 2))
    if verdict.next_command:
        # Not as Padding, which appends spaces: a backslash before a space does not continue a shell's line.
        yield Text(textwrap.indent(formatting.fold_command(verdict.next_command, 70), "    "))
