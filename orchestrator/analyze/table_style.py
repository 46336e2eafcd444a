"""Style of the tables in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

MIN_LABEL_WIDTH = 10


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
    table.add_column(first, overflow="fold", min_width=MIN_LABEL_WIDTH, vertical="top")
    for name in others:
        if name.startswith("<"):
            table.add_column(name[1:], overflow="fold")
        else:
            table.add_column(name, justify="right", no_wrap=True)
    return table
