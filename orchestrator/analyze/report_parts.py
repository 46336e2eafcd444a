"""The parts that a report is made of: sections, and the pictures in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from orchestrator.analyze.results import Summary
from orchestrator.record.schema import Record
from orchestrator.record.study_file import StudyFile

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from plotly.graph_objects import Figure as PlotlyFigure
    from rich.console import RenderableType


@dataclass(frozen=True)
class ReportData:
    """What a section of the report may read."""

    study: StudyFile
    """The study; its command holds no secret."""
    summary: Summary
    records: Sequence[Record]
    """The records of the study, one per configuration, as far as they exist."""
    tracking_uri: str = ""
    """Where MLflow has the runs, without user and password."""
    notes: Sequence[str] = ()
    """Sentences for the reader, printed below the verdicts."""


@dataclass(frozen=True)
class Picture:
    """One picture of the report: two files, and an image in the page that JavaScript makes interactive."""

    name: str
    """The stem of its files, NAME.png and NAME.svg; one of `record.study_file.PICTURES`."""
    alt: str
    """What it shows, for a reader who cannot see it."""
    draw: Callable[[], Figure]
    """Return the static picture, a figure of matplotlib's."""
    interactive: Callable[[], Sequence[PlotlyFigure]] | None = None
    """Return the interactive figures that take the image's place, one below the other. Their layout comes
    from `interactive.plotly_style`."""


def _no_pictures(_: ReportData) -> Sequence[Picture]:
    return ()


def _no_tables(_: Summary) -> Sequence[RenderableType]:
    return ()


def _no_values(_: ReportData) -> Mapping[str, Any]:
    return {}


@dataclass(frozen=True)
class Section:
    """One section of the report, and what the terminal shows of it.

    Its template is `templates/NAME.html.jinja`, a part of the page without a frame: no headline of the first
    two levels. A template that gives only blanks leaves its section out. It may use `data` (ReportData),
    `summary`, `formatting`, what `values` returns, and the macros of `macros.html.jinja`, which it imports
    `with context`.
    """

    name: str
    title: str
    """The headline in the page, and the entry in its list of contents."""
    pictures: Callable[[ReportData], Sequence[Picture]] = field(default=_no_pictures)
    """Return the pictures that have something to show. The template places each, with its caption:
    `{% call m.picture("NAME") %}how to read it{% endcall %}`."""
    tables: Callable[[Summary], Sequence[RenderableType]] = field(default=_no_tables)
    """Return what the terminal prints: tables of `table.new_table` and texts, at most 80 columns wide."""
    values: Callable[[ReportData], Mapping[str, Any]] = field(default=_no_values)
    """Return further names for the template and their values, functions too."""
