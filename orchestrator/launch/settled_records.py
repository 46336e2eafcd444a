"""The records of a store as a mapping that a design reads: of configurations that have ended."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from orchestrator.execution.rungs import scheduler_settings
from orchestrator.record.schema import MAX_FAILURES, Record
from orchestrator.record.store import Store


class SettledRecords(Mapping[str, Record]):
    """Fingerprint -> record of a configuration that a study does not train any further.

    That is a finished or diverged one, one that the study's early stopping has stopped, and one that failed
    too often to be tried again. Records are read when they are asked for, each once.

    Args:
        store: The records.
        scheduler: The study's early stopping, or "none".
    """

    def __init__(self, store: Store, scheduler: str) -> None:
        self._store, self._scheduler = store, scheduler
        self._settled: dict[str, Record] = {}

    def __getitem__(self, fingerprint: str) -> Record:
        if fingerprint not in self._settled:
            self._settled[fingerprint] = self._read(fingerprint)
        return self._settled[fingerprint]

    def _read(self, fingerprint: str) -> Record:
        record = self._store.get(fingerprint)
        if record is None:
            raise KeyError(fingerprint)
        if record.state == "failed":
            if self._store.count_failures(fingerprint) < MAX_FAILURES:
                raise KeyError(fingerprint)
            return record
        settings = scheduler_settings(self._scheduler, record.configuration)
        usable = self._store.get_reusable(fingerprint, settings)
        if usable is None:
            raise KeyError(fingerprint)
        return usable

    def __iter__(self) -> Iterator[str]:
        return iter(self._store.states())

    def __len__(self) -> int:
        return len(self._store.states())
