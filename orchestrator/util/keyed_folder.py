"""A folder of results that are computed once under a key and then shared by all processes and nodes.

<folder>/<key>.json        an entry: a small JSON object with its key and a SHA-256 checksum
<folder>/.<name>.lock      held by the process that computes the results called <name>
<folder>/.<name>-x1y2z3    its work folder, removed at the end
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from orchestrator.util import atomic_files, timeouts
from orchestrator.util.atomic_files import canonical_json
from orchestrator.util.errors import UsageError, quote_value

T = TypeVar("T")


@dataclass(frozen=True)
class KeyedFolder:
    """A folder of results by key.

    Args:
        path: The folder; it need not exist.
        description: What an entry is, with its article, for error messages.
        remedy: What a user can do about an entry that cannot be read, for error messages.
    """

    path: Path
    description: str = "an entry"
    remedy: str = "remove it: it is written again when it is needed"

    def read_entry(self, key: str, field: str) -> str | None:
        """Return one field of an entry, None if there is no entry.

        Args:
            key: The key that the entry was written under.
            field: The field of its JSON object.

        Raises:
            UsageError: The entry cannot be read, belongs to another key, or has no such field.
        """
        entry = self.read_fields(key)
        if entry is None:
            return None
        if field not in entry:
            path = self._entry_path(key)
            raise UsageError(f"{path}: not {self.description} ({field} is missing); {self.remedy}")
        return entry[field]

    def read_fields(self, key: str) -> dict[str, str] | None:
        """Return the fields of an entry without its key, None if there is no entry.

        Args:
            key: The key that the entry was written under.

        Raises:
            UsageError: The entry cannot be read, or belongs to another key.
        """
        path = self._entry_path(key)
        entry = atomic_files.read_json(path, dict[str, str], self.description, self.remedy)
        if entry is not None and (own := entry.pop("key", "")) != key:
            raise UsageError(f"{path}: its key is {quote_value(own)}; {self.remedy}")
        return entry

    def write_entry(self, key: str, data: Mapping[str, str], field: str, replace: bool = False) -> str:
        """Write an entry unless there is one, and return one field of the entry that is then there.

        If several processes write under one key at once, one of them wins and all return its value.

        Args:
            key: The key to write under.
            data: The fields of the entry.
            field: The field to return.
            replace: Whether to replace an entry that is already there.

        Raises:
            UsageError: As in `read_entry`, for an entry that is already there.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        content = atomic_files.add_checksum(canonical_json({**data, "key": key}).decode())
        if replace:
            atomic_files.write_atomically(self._entry_path(key), content)
            return data[field]
        with atomic_files.temporary_file(self._entry_path(key), content) as source:
            atomic_files.link_if_absent(source, self._entry_path(key))
        value = self.read_entry(key, field)
        assert value is not None, f"{self._entry_path(key)} has just been written"
        return value

    def get_or_create(self, name: str, read: Callable[[], T | None], create: Callable[[], T]) -> T:
        """Return what `read` finds, or else what `create` makes while other processes wait.

        Where storage has no locks across nodes, two nodes may call `create` at once: it must leave a whole
        result in either case.

        Args:
            name: The name of the lock. Results with one name are created one after another.
            read: Returns the result, None if there is none.
            create: Makes the result and stores it where `read` finds it.
        """
        from filelock import FileLock

        if (found := read()) is not None:
            return found
        self.path.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path / f".{name}.lock"):
            found = read()
            return create() if found is None else found

    @contextmanager
    def work_folder(self, name: str) -> Iterator[Path]:
        """Yield an empty folder in this folder and remove it afterwards.

        Work folders of this name that a killed process left behind are removed, too.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        for abandoned in self.path.glob(f".{name}-*"):
            if time.time() - abandoned.stat().st_mtime > timeouts.ABANDONED_FOLDER_SECONDS:
                shutil.rmtree(abandoned, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(dir=self.path, prefix=f".{name}-"))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _entry_path(self, key: str) -> Path:
        return self.path / f"{key}.json"
