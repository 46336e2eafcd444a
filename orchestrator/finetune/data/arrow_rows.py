"""Rows of an Arrow table as a sequence whose items are built on access."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, overload

import pyarrow as pa
import pyarrow.compute as pc

T = TypeVar("T")


class ArrowSequence(Sequence[T]):
    """The rows of a table, each built on every access from memory that is mapped from a file.

    Columns hold text, bytes, numbers, or lists of numbers, which become tuples; every value may be None.

    Args:
        table: The table.
        factory: Builds a row from the values of its columns, in the order of the table's columns.
    """

    def __init__(self, table: pa.Table, factory: Callable[..., T]) -> None:
        self._table, self._columns, self._factory = table, table.columns, factory

    def __len__(self) -> int:
        return int(self._table.num_rows)

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...

    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        found = range(len(self))[index]
        return self._build(found) if isinstance(found, int) else [self._build(row) for row in found]

    def _build(self, row: int) -> T:
        return self._factory(*(_to_python(column[row]) for column in self._columns))

    def max_value(self, column: str) -> int:
        """Return the largest number in the lists of a column, -1 if all lists are empty."""
        largest = pc.max(pc.list_flatten(self._table[column])).as_py()
        return -1 if largest is None else largest

    def max_list_length(self, column: str) -> int:
        """Return the length of the longest list of a column, 0 if there is no list."""
        return pc.max(pc.list_value_length(self._table[column])).as_py() or 0


def _to_python(value: Any) -> Any:
    if isinstance(value, pa.LargeListScalar) and value.is_valid:
        return tuple(value.values.to_numpy().tolist())  # much faster than `as_py`
    return value.as_py()
