"""Values in an Arrow file as a sequence: each is made when it is asked for, from memory that is mapped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

T = TypeVar("T")


class ArrowSequence(Sequence[T]):
    """`of(**columns)` of each row of `batches`, whose columns (those named, or all) are text, bytes,
    numbers, or lists of numbers (which become tuples); any of them may be None. Finding a row takes the same
    time wherever it is."""

    def __init__(
        self, batches: Sequence[Any], factory: Callable[..., T], columns: Sequence[str] | None = None
    ) -> None:
        self._factory, self._batches = factory, batches
        self._batch_starts = np.cumsum([0, *(batch.num_rows for batch in batches)])
        self._readers = [
            {name: _reader(batch.column(name)) for name in columns or batch.schema.names} for batch in batches
        ]

    def __len__(self) -> int:
        return int(self._batch_starts[-1])

    def max_value(self, column: str) -> int:
        """Return the largest number in the lists of a column, -1 where they are all empty."""
        found = [pc.max(batch.column(column).values).as_py() for batch in self._batches]
        return max((number for number in found if number is not None), default=-1)

    def max_list_length(self, column: str) -> int:
        """Return the length of the longest list of a column, 0 where there is none."""
        found = [pc.max(pc.list_value_length(batch.column(column))).as_py() for batch in self._batches]
        return max((length for length in found if length is not None), default=0)

    @overload
    def __getitem__(self, place: int) -> T: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[T]: ...

    def __getitem__(self, place: int | slice) -> T | Sequence[T]:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        number = place + len(self) if place < 0 else place
        if not 0 <= number < len(self):
            raise IndexError(f"row {place} of {len(self)}")
        chunk = int(np.searchsorted(self._batch_starts, number, side="right")) - 1
        row = number - int(self._batch_starts[chunk])
        return self._factory(**{name: read(row) for name, read in self._readers[chunk].items()})


def _reader(column: Any) -> Callable[[int], Any]:
    if not pa.types.is_large_list(column.type):
        return lambda row: column[row].as_py()
    # Views of the mapped file, without a copy.
    starts, values = column.offsets.to_numpy(), column.values.to_numpy()
    if column.null_count:
        is_valid = column.is_valid().to_numpy(zero_copy_only=False)
        return lambda row: _cut(starts, values, row) if is_valid[row] else None
    return lambda row: _cut(starts, values, row)


def _cut(starts: np.ndarray, values: np.ndarray, row: int) -> tuple[Any, ...]:
    return tuple(values[starts[row] : starts[row + 1]].tolist())


def to_record_batch(values: Sequence[object], schema: Any) -> Any:
    """A record batch of the fields that the schema names. Raises what pyarrow does for a value that is none
    of its column's."""
    return pa.record_batch(
        [pa.array([getattr(value, field.name) for value in values], field.type) for field in schema],
        schema=schema,
    )
