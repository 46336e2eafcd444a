"""Read-only mapping of the records of ended configurations, as input of a design."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from orchestrator.execution.rungs import scheduler_settings
from orchestrator.record.schema import MAX_FAILURES, Record
from orchestrator.record.store import Store


class SettledRecords(Mapping[str, Record]):
    """Fingerprint -> record of a configuration that the study does not train any further.

    Such a configuration has finished, diverged, been stopped by the study's own early stopping, or failed too
    often to be tried again. Each record is read at its first use. It is kept without its curve and its
    results per item, which take most of the memory and which no design uses. Iteration and length cover all
    records of the store, also those that are not settled; no design uses them.

    Args:
        store: The records.
        scheduler: Early stopping of the study, or "none".
    """

    def __init__(self, store: Store, scheduler: str) -> None:
        self._store, self._scheduler = store, scheduler
        self._settled: dict[str, Record] = {}

    def __getitem__(self, fingerprint: str) -> Record:
        if fingerprint not in self._settled:
            self._settled[fingerprint] = replace(self._read(fingerprint), curve=(), items={})
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
