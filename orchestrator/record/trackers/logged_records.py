"""The list of the records that a tracker has logged, so that a later run of the study skips them."""

from __future__ import annotations

from pathlib import Path

from orchestrator.record.run_values import record_version
from orchestrator.record.schema import Record


class LoggedRecords:
    """A text file with one line for each logged record: its fingerprint and its version.

    Args:
        path: The file. It lies beside the tracker's files, so that deleting them deletes the list, too.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self._versions = dict(line.split(" ", 1) for line in lines if " " in line)

    def __contains__(self, record: Record) -> bool:
        """Return whether this version of the record has been logged."""
        return self._versions.get(record.fingerprint) == record_version(record)

    def add(self, record: Record) -> None:
        """Note that a record has been logged."""
        self._versions[record.fingerprint] = record_version(record)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            file.write(f"{record.fingerprint} {self._versions[record.fingerprint]}\n")
