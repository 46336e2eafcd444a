"""The parts that a report is made of: sections, the pictures in them, and tables for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from orchestrator.analyze.results import Summary
from orchestrator.record.schema import Record
from orchestrator.record.study_file import StudyFile

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from plotly.graph_objects import Figure as PlotlyFigure
    from rich.console import RenderableType


@dataclass(frozen=True)
class ReportData:
    """The input of the sections of the report."""

    study: StudyFile
    """The study, with secrets removed from its command."""
    summary: Summary
    records: Sequence[Record]
    """The records of the study, at most one per configuration."""
    tracking_uri: str = ""
    """MLflow's tracking URI of the runs, without user and password."""
    output: Path | None = None
    """The output folder with the study's folder; None for the default."""
    store: Path | None = None
    """The store of the records; None for the one in the output folder."""


@dataclass(frozen=True)
class Picture:
    """One picture of the report: two image files, and interactive figures in the page."""

    name: str
    """The stem of its files, NAME.png and NAME.svg; one of `record.study_file.PICTURES`."""
    alt: str
    """The alternative text of the image: a description for readers who cannot see it."""
    draw: Callable[[], Figure]
    """Function that returns the static picture, a matplotlib figure."""
    interactive: Callable[[], Sequence[PlotlyFigure]] | None = None
    """Function that returns the interactive figures, which the page shows one below the other in place of
    the image. Their layout comes from `interactive.plotly_style`. None: the page shows the image."""


def _no_pictures(_: ReportData) -> Sequence[Picture]:
    return ()


def _no_tables(_: Summary) -> Sequence[RenderableType]:
    return ()


def _no_values(_: ReportData) -> Mapping[str, Any]:
    return {}


@dataclass(frozen=True)
class Section:
    """One section of the report, and its tables in the terminal.

    The template `templates/NAME.html.jinja` renders the body of the section, without its headline. The
    section is left out if the body is blank. The template may use `data` (ReportData), `summary`,
    `formatting`, the names that `values` returns, and the macros of `macros.html.jinja`, which it imports
    `with context`. Headlines inside it start at the third level.
    """

    name: str
    """The stem of the template's file name."""
    title: str
    """The headline in the page, and the entry in its list of contents."""
    pictures: Callable[[ReportData], Sequence[Picture]] = field(default=_no_pictures)
    """Function that returns the section's pictures; none for a study without data for them. The template
    places each with its caption: `{% call m.picture("NAME") %}how to read it{% endcall %}`."""
    tables: Callable[[Summary], Sequence[RenderableType]] = field(default=_no_tables)
    """Function that returns the terminal's output for this section: texts, and tables of
    `new_table`, at most 80 columns wide."""
    values: Callable[[ReportData], Mapping[str, Any]] = field(default=_no_values)
    """Function that returns further variables and functions for the template: name -> value."""


def new_table(title: str, columns: Sequence[str]) -> Table:
    """Return an empty table.

    Args:
        title: The line above the table: the task, the model, and what a row stands for.
        columns: The headers, which may have several lines. The first column holds the labels of the rows. A
            header that starts with "<" marks a column of text, which is aligned left and wrapped; the "<" is
            not shown. The other columns hold numbers, which are aligned right and never wrapped.
    """
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left", padding=(0, 1, 0, 0))
    first, *others = columns
    table.add_column(first, overflow="fold", min_width=10, vertical="top")
    for name in others:
        if name.startswith("<"):
            table.add_column(name[1:], overflow="fold")
        else:
            table.add_column(name, justify="right", no_wrap=True)
    return table
