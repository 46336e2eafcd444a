"""Rendering of the sections of a report in three forms.

The forms are text for a terminal of 80 columns, Markdown, and an HTML page that needs no network. In this
module, "the page" is the HTML page.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
import shlex
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from rich import box
from rich import table as rich_table
from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.text import Text

from orchestrator.analyze import formatting
from orchestrator.util.command import PROGRAM

if TYPE_CHECKING:
    from orchestrator.analyze.chart_style import Chart


@dataclass(frozen=True)
class Column:
    """The header of a column and the kind of its cells."""

    header: str
    kind: Literal["text", "number", "command", "code"] = "number"
    more: bool = False
    """Whether the page hides the column until the reader asks for it. The terminal and Markdown omit it."""


@dataclass(frozen=True)
class Table:
    """A table of formatted cells. The first column names the row."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    dim: frozenset[int] = frozenset()
    """The indices of the rows that have a fainter color."""


@dataclass(frozen=True)
class Section:
    """A section of a report."""

    name: str
    """The anchor, unique in a report, and the stem of the names of the chart's files: "curves" for the first
    panel, "curves-2" for the second panel."""
    title: str
    text: str = ""
    """Paragraphs of plain text, separated by a blank line."""
    table: Table | None = None
    chart: Chart | None = None
    note: str = ""
    """How to read the table and the chart."""
    step: str = ""
    """The sentence that introduces the command."""
    command: str = ""
    """One shell command."""
    outcome: str = ""
    """The outcome of a verdict: supported, refuted, undecided or descriptive; empty for other sections."""
    level: Literal["normal", "warning", "alarm"] = "normal"
    folded: bool = False
    """Whether the section is closed until the reader of the page opens it. The terminal and Markdown leave it
    out."""
    in_terminal: bool = True
    """Whether the terminal shows the section."""


_WIDTH = 80
_OUTCOME_STYLES = {"supported": "green", "refuted": "red", "undecided": "yellow", "descriptive": "dim"}
_LEVEL_STYLES = {"warning": "yellow", "alarm": "bold red"}


def paragraphs(text: str) -> list[str]:
    """Return the paragraphs of a text, each on one line."""
    return [" ".join(part.split()) for part in text.split("\n\n") if part.strip()]


def _has_text(section: Section) -> bool:
    """Return whether the terminal and Markdown, which cannot show charts, show a section.

    They leave out folded sections, and sections with a chart but without a text, table, step or command.
    """
    texts = section.text or section.table or section.step or section.command
    return not section.folded and bool(section.chart is None or texts)


# -- terminal


def to_terminal(sections: Iterable[Section]) -> Group:
    """Return the sections as Rich text for a terminal of 80 columns.

    Charts and folded sections are left out, and so are sections with nothing but a chart and a note.
    """
    shown = [section for section in sections if section.in_terminal and _has_text(section)]
    return Group(*(part for section in shown for part in (*_terminal_parts(section), Text(""))))


def _terminal_parts(section: Section) -> Iterator[RenderableType]:
    if style := _LEVEL_STYLES.get(section.level):
        yield from (Text(f"! {text}", style) for text in paragraphs(section.text))
    else:
        word = f"{section.outcome.upper()}  " if section.outcome else ""
        style = f"bold {_OUTCOME_STYLES.get(section.outcome, '')}"
        yield Text.assemble((word, style), (section.title, "bold"))
        yield from map(Text, paragraphs(section.text))
    if section.table is not None and section.table.rows:
        yield _terminal_table(section.table)
    yield from (Text(text, "dim") for text in paragraphs(section.note))
    yield from map(Text, paragraphs(section.step))
    if section.command:
        # Rich does not pad this text on the right. A shell does not continue a line if a space follows the
        # backslash at its end.
        yield Text(terminal_command(section.command), no_wrap=True)


def terminal_command(command: str, width: int = _WIDTH - 4) -> str:
    """Break a command into indented lines that a shell reads as one command.

    A word that does not fit a line of 80 characters is split into quoted parts. All its parts but the first
    start at the left edge, because indentation would separate them into words.

    Args:
        command: The command.
        width: The number of characters of a line. Only a single word may exceed it.
    """
    lines = []
    for line in textwrap.indent(formatting.fold_command(command, width - 4), "  ").split("\n"):
        if len(line) > _WIDTH:
            end = " \\" if line.endswith(" \\") else ""
            word = shlex.split(line.removesuffix(end))[0]
            parts = [shlex.quote(word[i : i + width // 2]) for i in range(0, len(word), width // 2)]
            line = "  " + "\\\n".join(parts) + end
        lines.append(line)
    return "\n".join(lines)


def _terminal_table(table: Table) -> rich_table.Table:
    """Return a table for the terminal.

    Commands and the columns that the page hides at first are left out. If the other columns do not fit 80
    characters, the last ones are left out too. At least two columns remain.
    """
    places = [i for i, c in enumerate(table.columns) if not c.more and c.kind != "command"]
    while len(places) > 2 and sum(_least_width(table, i) + 2 for i in places) > _WIDTH + 2:
        places.pop()
    shown = rich_table.Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for place in places:
        column = table.columns[place]
        is_text = column.kind == "text"
        header = column.header if is_text else textwrap.fill(column.header, _least_width(table, place))
        shown.add_column(
            Text(header), no_wrap=not is_text, overflow="fold", justify="left" if is_text else "right"
        )
    for place, row in enumerate(table.rows):
        shown.add_row(*(Text(row[i]) for i in places), style="dim" if place in table.dim else None)
    return shown


def _least_width(table: Table, place: int) -> int:
    """Return the smallest width of a column in characters. Numbers do not wrap; texts may wrap at 16."""
    column = table.columns[place]
    longest = max(cell_len(row[place]) for row in table.rows)
    word = max(map(cell_len, column.header.split()), default=1)
    return max(word, min(longest, 16) if column.kind == "text" else longest)


# -- Markdown


def to_markdown(sections: Iterable[Section]) -> str:
    """Return the sections in Markdown, without charts and without folded sections."""
    parts = [part for section in sections if _has_text(section) for part in _markdown_parts(section)]
    return "\n\n".join(parts) + "\n"


def _markdown_parts(section: Section) -> Iterator[str]:
    outcome = f"{section.outcome.capitalize()}: " if section.outcome else ""
    yield f"## {outcome}{_escape(section.title)}"
    texts = [_escape(text) for text in paragraphs(section.text)]
    if texts:
        yield "\n\n".join(texts) if section.level == "normal" else "\n".join(f"- {text}" for text in texts)
    if section.table is not None and section.table.rows:
        yield _markdown_table(section.table)
    yield from map(_escape, (*paragraphs(section.note), *paragraphs(section.step)))
    if section.command:
        yield f"```sh\n{section.command}\n```"


def _markdown_table(table: Table) -> str:
    columns = [(i, column) for i, column in enumerate(table.columns) if not column.more]
    lines = [[_escape(column.header) for _, column in columns]]
    lines.append(["---" if column.kind == "text" else "---:" for _, column in columns])
    lines += [[_markdown_cell(column, row[i]) for i, column in columns] for row in table.rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _markdown_cell(column: Column, text: str) -> str:
    is_code = column.kind in ("command", "code") and text and "`" not in text
    return "`" + " ".join(text.split()).replace("|", "\\|") + "`" if is_code else _escape(text)


def _escape(text: str) -> str:
    """Escape the characters of a text that Markdown would read as markup, and put the text on one line."""
    return re.sub(r"([\\|*`<]|(?<=\])\()", r"\\\1", " ".join(text.split()))


# -- page


def to_html(title: str, subtitle: str, setup: str, chips: Sequence[str], sections: Sequence[Section]) -> str:
    """Return the page of a report as one HTML file, which shows everything without another file.

    The page contains a static SVG picture of each chart. The script of the page replaces the picture by the
    interactive chart.

    Args:
        title: The name of the study.
        subtitle: The question of the study.
        setup: The setup of the study in one line, such as the number of rows, the rank and the batch size.
        chips: The number of runs in each state, for example "84 finished".
        sections: The sections. The first section stands above the table of contents.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    # `select_autoescape` decides by the end of the file name, and would not escape in *.html.jinja.
    loader = PackageLoader("orchestrator.analyze", "page")
    options: dict[str, Any] = {"undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=loader, autoescape=True, **options)
    environment.filters["paragraphs"] = paragraphs
    charts = {section.name: section.chart for section in sections if section.chart is not None}
    return environment.get_template("page.html.jinja").render(
        title=title,
        subtitle=subtitle,
        setup=setup,
        chips=chips,
        sections=sections,
        contents=_contents(sections),
        pictures={name: _picture(chart) for name, chart in charts.items()},
        **(_script_data(charts) if charts else {"library": "", "charts": ""}),
        program=PROGRAM,
    )


def _contents(sections: Sequence[Section]) -> list[tuple[str, str]]:
    """Return the table of contents: (name, title) of each section but the first.

    Consecutive verdicts share one entry. An entry has only the part of a title before ": ", unless several
    titles have the same part before it.
    """
    shown = [s for s, above in zip(sections[1:], sections, strict=False) if not (s.outcome and above.outcome)]
    titles = ["Verdicts" if s.outcome else s.title for s in shown]
    short = [title.partition(": ")[0] for title in titles]
    return [
        (s.name, head if short.count(head) == 1 else title)
        for s, head, title in zip(shown, short, titles, strict=True)
    ]


def _script_data(charts: Mapping[str, Chart]) -> dict[str, str]:
    """Return the data of the page's script, compressed with gzip and encoded in base64.

    Returns:
        `library`: the JavaScript of Vega, Vega-Lite and Vega-Embed. `charts`: JSON with the specifications of
        the charts for a wide and a narrow page, and with the light and the dark theme.
    """
    from orchestrator.analyze import chart_style

    widths = {"wide": chart_style.WIDE, "narrow": chart_style.PHONE}
    specifications = {
        name: {kind: chart_style.specification(chart, width) for kind, width in widths.items()}
        for name, chart in charts.items()
    }
    themes = {"light": chart_style.theme(False), "dark": chart_style.theme(True)}
    data = json.dumps({"charts": specifications, "themes": themes}, separators=(",", ":"))
    return {"library": _compressed(chart_style.vega_bundle()), "charts": _compressed(data)}


def _compressed(text: str) -> str:
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def _picture(chart: Chart) -> dict[str, str]:
    """Return the static SVG picture of a chart.

    One picture serves both color schemes. In the dark scheme, a style sheet in the SVG replaces the colors of
    the light theme. Attributes and invisible marks that only an interactive chart needs are removed.

    Returns:
        `uri`: the picture as a data URI. `width`, `height`: its size in pixels.
    """
    from orchestrator.analyze import chart_style

    svg = chart_style.to_svg(chart)
    svg = re.sub(r' (?:aria-[a-z]+|role|class|pointer-events)="[^"]*"', "", svg)
    svg = re.sub(r'<path [^>]*\bopacity="0"/>', "", svg)
    svg = re.sub(r"(\d\.\d\d)\d+", r"\1", svg)
    pairs = dict(zip(_colors(chart_style.theme(False)), _colors(chart_style.theme(True)), strict=True))
    # White text stands on a colored cell of a heat map. The cell has the same color in both themes, so that
    # the text stays white.
    rules = [
        f':not(text)[{part}="{light}"]{{{part}:{dark}}}'
        if light == "#ffffff"
        else f'[{part}="{light}"]{{{part}:{dark}}}'
        for light, dark in pairs.items()
        for part in ("fill", "stroke")
    ]
    style = f"<style>@media screen and (prefers-color-scheme: dark){{{''.join(rules)}}}</style>"
    head, rest = svg.split(">", 1)
    size = re.search(r'width="(?P<width>[\d.]+)" height="(?P<height>[\d.]+)"', head)
    uri = "data:image/svg+xml;base64," + base64.b64encode(f"{head}>{style}{rest}".encode()).decode()
    return {"uri": uri, **(size.groupdict() if size else {"width": "", "height": ""})}


def _colors(theme: Any) -> Iterator[str]:
    """Yield all colors of a theme. Both themes have their colors in the same order."""
    if isinstance(theme, str) and theme.startswith("#"):
        yield theme
    elif isinstance(theme, dict | list):
        for part in theme.values() if isinstance(theme, dict) else theme:
            yield from _colors(part)
