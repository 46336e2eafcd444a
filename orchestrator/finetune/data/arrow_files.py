"""Arrow files that are written once, and their rows as sequences.

    <folder>/letters-3f9c0a1b2c3d4e5f.examples.arrow

The file name contains a hash of the cache key, which holds all that decides the content. The metadata of the
schema contains the key itself. The metadata of each record batch contains its SHA-256 digest, and the last
batch also states the number of batches. A file that is cut, damaged or of another key is made again.

The digest of a batch does not cover image files, so that opening a file need not read them. Each image file
has a digest in a column of its own, which is verified when the image is read.

Files use Arrow's IPC format, which is opened without running code. They are memory-mapped, so all workers on
a node share one copy of them in the page cache.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import ipc

from orchestrator.util import atomic_files
from orchestrator.util.atomic_files import KeyedFolder, canonical_json
from orchestrator.util.errors import UsageError

T = TypeVar("T")

TEXT, BYTES, INTEGER = pa.large_string(), pa.large_binary(), pa.int32()
INTEGER_LIST, FLOAT_LIST = pa.large_list(pa.int32()), pa.large_list(pa.float64())
RECORD_BATCH_ROWS = 4096
"""The number of rows in a record batch without image files."""
IMAGE_RECORD_BATCH_ROWS = 128
"""The number of rows in a record batch with image files, of up to a megabyte, which it keeps in memory."""

_DIGEST_KEY, _BATCH_COUNT_KEY = b"sha256", b"batches"
_CONVERSION_ERRORS = (pa.ArrowInvalid, pa.ArrowTypeError, UnicodeError, OverflowError)


@dataclass(frozen=True)
class ArrowFile(Generic[T]):
    """A file of one split of a task in a cache folder.

    Args:
        folder: The cache folder; it need not exist.
        suffix: The end of the file name: "examples" or "rows".
        cache_key: JSON values that decide the content of the file. "task" and "split" are among them.
        columns: The name and Arrow type of each column.
        make_view: Makes a sequence of values from the table in the file.
    """

    folder: Path
    suffix: str
    cache_key: Mapping[str, Any]
    columns: Mapping[str, Any]
    make_view: Callable[[pa.Table], Sequence[T]]

    @property
    def schema(self) -> Any:
        """The Arrow schema, with the cache key in its metadata."""
        return pa.schema(list(self.columns.items()), metadata={"about": canonical_json(dict(self.cache_key))})

    @property
    def path(self) -> Path:
        """The path of the file."""
        key_hash = hashlib.sha256(canonical_json(dict(self.cache_key))).hexdigest()[:16]
        return self.folder / f"{self.cache_key['task']}-{key_hash}.{self.suffix}.arrow"

    def read(self) -> Sequence[T] | None:
        """Return the values, None if the file does not exist or is not what was written."""
        table = _read_verified_table(self.path, self.schema)
        return None if table is None else self.make_view(table)

    def read_or_create(self, make_rows: Callable[[], Iterable[Mapping[str, Any]]]) -> Sequence[T]:
        """Return the values of the file, which is created first if necessary.

        One process creates the file while others wait. Where storage has no locks across nodes, two nodes may
        create it at once: each of their files is complete, and the first one is kept.

        Args:
            make_rows: Makes the rows to store, each with its values by column.

        Raises:
            UsageError: A value cannot be stored in its column.
        """

        def create() -> Sequence[T]:
            with self._write_temporary_file(make_rows()) as source:
                # An existing file is either damaged or the whole one of another node that was faster.
                if not atomic_files.link_if_absent(source, self.path) and self.read() is None:
                    with atomic_files.add_path_to_disk_errors(self.path):
                        os.replace(source, self.path)
            found = self.read()
            assert found is not None, f"{self.path} is not what was written there"
            return found

        return KeyedFolder(self.folder).get_or_create(self.cache_key["task"], self.read, create)

    @contextmanager
    def _write_temporary_file(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[Path]:
        """Yield a synced file with the rows, and remove it afterwards."""
        temporary_file = atomic_files.temporary_path(self.path)
        try:
            with temporary_file.open("xb") as file, ipc.new_file(file, self.schema) as writer:
                self._write_batches(writer, iter(rows))
            atomic_files.sync_file(temporary_file)
            yield temporary_file
        finally:
            temporary_file.unlink(missing_ok=True)

    def _write_batches(self, writer: Any, rows: Iterator[Mapping[str, Any]]) -> None:
        """Write rows as Arrow record batches.

        The metadata of each batch has the batch's digest. The metadata of the last one also has the number of
        batches, which shows a reader that the file is complete.
        """
        size = IMAGE_RECORD_BATCH_ROWS if BYTES in self.columns.values() else RECORD_BATCH_ROWS
        first_index, count = 0, 0
        chunk = list(islice(rows, size))
        while chunk or count == 0:
            batch, next_chunk = self._to_record_batch(chunk, first_index), list(islice(rows, size))
            count += 1
            metadata = {_DIGEST_KEY: _digest(batch)}
            if not next_chunk:
                metadata[_BATCH_COUNT_KEY] = str(count).encode()
            writer.write_batch(batch, custom_metadata=metadata)
            first_index, chunk = first_index + len(chunk), next_chunk

    def _to_record_batch(self, chunk: list[Mapping[str, Any]], first_index: int) -> pa.RecordBatch:
        """Return rows as a record batch; raise a UsageError about the first one that cannot be stored."""
        try:
            return pa.RecordBatch.from_pylist(chunk, self.schema)
        except _CONVERSION_ERRORS as error:
            if len(chunk) > 1:  # find the row
                for number, row in enumerate(chunk, first_index):
                    self._to_record_batch([row], number)
                raise
            what = f"{self.cache_key['split']} example {first_index} cannot be stored"
            reason = str(error).splitlines()[0]
            raise UsageError(f"Task {self.cache_key['task']!r}: {what}: {reason}") from None


def _read_verified_table(path: Path, schema: pa.Schema) -> pa.Table | None:
    """Return the table in a file, memory-mapped; None if it is missing, cut, damaged or of another schema."""
    try:
        file = ipc.open_file(pa.memory_map(str(path)))
        if not file.schema.equals(schema, check_metadata=True):
            return None
        batches, count = [], None
        for number in range(file.num_record_batches):
            batch, metadata = file.get_batch_with_custom_metadata(number)
            batch.validate(full=True)  # lengths, and that text is UTF-8
            if metadata is None or metadata.get(_DIGEST_KEY) != _digest(batch):
                return None
            batches.append(batch)
            count = metadata.get(_BATCH_COUNT_KEY)
    except (OSError, ValueError, pa.ArrowException):  # a damaged footer need not be UTF-8
        return None
    return pa.Table.from_batches(batches, schema) if count == str(len(batches)).encode() else None


def _digest(batch: Any) -> bytes:
    """Return the SHA-256 (hex) of a batch's IPC message without image files, equal for equal batches."""
    small = batch.select([field.name for field in batch.schema if field.type != BYTES])
    return hashlib.sha256(small.serialize()).hexdigest().encode()


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
