"""The look of the terminal's tables, at most 80 columns wide."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

MIN_LABEL_WIDTH = 10


def new_table(title: str, columns: Sequence[str]) -> Table:
    """Return an empty table.

    Args:
        title: A line above it: the task, the model, and what the rows are.
        columns: The headers, which may have several lines. The first column holds the labels of the rows. A
            header that starts with "<" is that of a column of words, set flush left and wrapped where it is
            too long; the others hold numbers, which are never broken.
    """
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left", padding=(0, 1, 0, 0))
    first, *others = columns
    table.add_column(first, overflow="fold", min_width=MIN_LABEL_WIDTH, vertical="top")
    for name in others:
        if name.startswith("<"):
            table.add_column(name[1:], overflow="fold")
        else:
            table.add_column(name, justify="right", no_wrap=True)
    return table
