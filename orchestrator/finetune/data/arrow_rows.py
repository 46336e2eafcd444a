"""Sequences whose items are built on access, and record batches of Arrow as such a sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, TypeVar, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

T = TypeVar("T")


class LazySequence(Sequence[T]):
    """A sequence that builds an item each time it is accessed.

    Args:
        length: The number of items.
        build_item: Builds the item at an index from 0 to `length - 1`.
    """

    def __init__(self, length: int, build_item: Callable[[int], T]) -> None:
        self._length, self._build_item = length, build_item

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...

    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        if isinstance(index, slice):
            return [self._build_item(number) for number in range(*index.indices(self._length))]
        number = index + self._length if index < 0 else index
        if not 0 <= number < self._length:
            raise IndexError(f"index {index} of {self._length} items")
        return self._build_item(number)


class ArrowSequence(LazySequence[T]):
    """The rows of record batches, each built from memory that is mapped from a file.

    Access takes the same time for every row. Columns hold text, bytes, numbers, or lists of numbers, which
    become tuples; every value may be None.

    Args:
        batches: The record batches, in order, of one schema.
        factory: Builds a row from the values of its columns, in the order of `columns`.
        columns: The names of the columns to read; by default all columns of the schema.
    """

    def __init__(
        self, batches: Sequence[Any], factory: Callable[..., T], columns: Sequence[str] | None = None
    ) -> None:
        self._factory, self._batches = factory, batches
        self._batch_starts = np.cumsum([0, *(batch.num_rows for batch in batches)])
        self._readers = [
            [_value_reader(batch.column(name)) for name in columns or batch.schema.names] for batch in batches
        ]
        super().__init__(int(self._batch_starts[-1]), self._read_row)

    def _read_row(self, number: int) -> T:
        chunk = int(np.searchsorted(self._batch_starts, number, side="right")) - 1
        row = number - int(self._batch_starts[chunk])
        return self._factory(*(read(row) for read in self._readers[chunk]))

    def max_value(self, column: str) -> int:
        """Return the largest number in the lists of a column, -1 if all lists are empty."""
        found = [pc.max(batch.column(column).values).as_py() for batch in self._batches]
        return max((number for number in found if number is not None), default=-1)

    def max_list_length(self, column: str) -> int:
        """Return the length of the longest list of a column, 0 if there is no list."""
        found = [pc.max(pc.list_value_length(batch.column(column))).as_py() for batch in self._batches]
        return max((length for length in found if length is not None), default=0)


def _value_reader(column: Any) -> Callable[[int], Any]:
    if not pa.types.is_large_list(column.type):
        return lambda row: column[row].as_py()
    # Views of the mapped file, without a copy.
    starts, values = column.offsets.to_numpy(), column.values.to_numpy()
    is_valid = column.is_valid().to_numpy(zero_copy_only=False) if column.null_count else None

    def read(row: int) -> tuple[Any, ...] | None:
        if is_valid is not None and not is_valid[row]:
            return None
        return tuple(values[starts[row] : starts[row + 1]].tolist())

    return read


def to_record_batch(values: Sequence[Any], schema: Any) -> Any:
    """Convert dataclass instances to a record batch.

    Args:
        values: Instances of one dataclass.
        schema: The Arrow schema. Column k holds field k of the dataclass; fields after the last column are
            not stored.

    Returns:
        The record batch, with one row per instance.

    Raises:
        pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, UnicodeError, OverflowError: A value does not fit the
            type of its column.
    """
    names = [field.name for field in fields(values[0])] if values else schema.names
    return pa.record_batch(
        [
            pa.array([getattr(value, name) for value in values], column.type)
            for name, column in zip(names, schema, strict=False)
        ],
        schema=schema,
    )
