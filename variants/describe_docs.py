"""The tables of docs/variants.md, which are made from the catalogue and the taxonomy."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path

from variants.describe import Description, describe_all, paper_link
from variants.describe_text import AXES, checked_text, format_count, format_form, format_value
from variants.export_forms import ExportForms
from variants.taxonomy import Method, read_methods
from variants.traits import Start
from variants.variant_names import USER_AXIS

DOCS_FILE = Path(__file__).parents[1] / "docs" / "variants.md"
"""The page in a checkout of the repository; an installed package does not have it."""


def render(text: str) -> str:
    """Return the page with its tables made anew.

    A table is between the lines `<!-- NAME: ... -->` and `<!-- end of NAME -->`; all other text stays.

    Args:
        text: The page.

    Raises:
        ValueError: The page lacks the markers of a table.
    """
    entries = [each for each in describe_all() if each.axis != USER_AXIS]
    tables = {
        "catalogue": catalogue_tables(entries),
        "exports": exports_table(entries),
        "taxonomy": taxonomy_table(read_methods()),
    }
    for name, table in tables.items():
        pattern = re.compile(rf"(<!-- {name}:[^\n]*-->\n).*?(<!-- end of {name} -->)", re.DOTALL)
        if len(pattern.findall(text)) != 1:
            raise ValueError(f"the page must have the markers of the table {name!r} once")
        text = pattern.sub(partial(_filled, table), text)
    return text


def _filled(table: str, found: re.Match[str]) -> str:
    return f"{found[1]}\n{table}\n\n{found[2]}"


def write_docs() -> str:
    """Write the tables of the page again, and return a line that says what was done.

    Raises:
        ValueError: There is no such page here, or it lacks the markers of a table.
    """
    if not DOCS_FILE.is_file():
        raise ValueError("--write-docs works in a checkout of the repository, which has docs/variants.md")
    before = DOCS_FILE.read_text()
    after = render(before)
    DOCS_FILE.write_text(after)
    return f"docs/variants.md: {'nothing has changed' if after == before else 'the tables are written again'}"


def catalogue_tables(entries: Sequence[Description]) -> str:
    """Return a table of the entries for each axis."""
    header = (
        "variant", "what it does", "values", "initialization", "lanes", "merges",
        "checked against", "own hyperparameters",
    )  # fmt: skip
    parts = []
    for axis, group in groupby(entries, lambda each: each.axis):
        parts.append(f"### {axis.capitalize()}: {AXES[axis]}\n\n{_table(header, map(_entry_cells, group))}")
    return "\n\n".join(parts)


def _entry_cells(each: Description) -> tuple[str, ...]:
    count = "" if each.parameter_count is None else format_count(each.parameter_count)
    mark = {Start.OTHER: " (W' is not W)", Start.ROUNDED: " (W' is W up to rounding)"}
    return (
        f"`{each.name}`" + _link(each.paper),
        each.summary.rstrip("."),
        count,
        each.initialization.rstrip(".") + mark.get(Start(each.start), ""),
        each.batching,
        "yes" if each.exports.merged.possible else "no",
        checked_text(each),
        ", ".join(f"`{own.name}` {format_value(own.default)}" for own in each.hyperparameters),
    )


def taxonomy_table(methods: Sequence[Method]) -> str:
    """Return the table of all methods of the taxonomy."""
    rows = (
        (
            f"{each.axis.replace('_', ' ')}: {each.leaf.replace('_', ' ')}",
            each.title + _link(each.paper),
            "trained" if each.evaluated else "code" if each.survey_code else "",
            f"`{each.variant}`" if each.variant else each.reason,
        )
        for each in methods
    )
    return _table(("axis: leaf", "method", "survey", "entry, or why there is none"), rows)


def exports_table(entries: Iterable[Description]) -> str:
    """Return the table of the forms in which lanes can be exported, with a row for all variants alike."""
    names: dict[ExportForms, list[str]] = {}
    for each in entries:
        names.setdefault(each.exports, []).append(f"`{each.name}`")
    rows = (
        (", ".join(group), *map(format_form, (forms.peft, forms.vllm, forms.merged)))
        for forms, group in names.items()
    )
    return _table(("variants", "PEFT and AutoPeft", "vLLM", "merged"), rows)


def _link(paper: str) -> str:
    """Return a link to a paper in brackets; its venue if there is no address; nothing without a paper."""
    link, number = paper_link(paper), paper.rpartition(" ")[2]
    return f" ([{number}]({link}))" if link else f" ({paper})" if paper else ""


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
