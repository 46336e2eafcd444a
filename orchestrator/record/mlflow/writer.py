"""Logs to MLflow beside the study: a thread of the driver that nothing waits for."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from orchestrator.record.mlflow.log import MlflowLog, TrackingDamaged, TrackingDown
from orchestrator.record.schema import Record
from orchestrator.record.store import Store
from orchestrator.record.study_file import StudyFile
from orchestrator.util.redaction import without_secrets

_FIRST_PAUSE, _LONGEST_PAUSE, _CLOSING_PAUSE = 0.5, 30.0, 1.0


class Writer:
    """Takes records (or their fingerprints: they are read from the store when their turn comes, so that a
    long outage fills no memory) and makes their MLflow children. While MLflow does not answer it tries again,
    with growing pauses. No method raises; what is not logged by `close` is left to
    `python -m orchestrator sync`."""

    def __init__(
        self,
        log: MlflowLog,
        store: Store,
        study: StudyFile,
        *,
        adapters: bool = False,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        self._log, self._store, self._study = log, store, study
        self._adapters, self._tags = adapters, dict(tags or {})
        self._reused = frozenset(study.reused)
        self._news = threading.Condition()
        self._waiting: dict[str, None] = {}  # a set in order
        self._at_work = ""
        self._refused: set[str] = set()
        self._deadline: float | None = None
        self._status = "FINISHED"
        self._report: Sequence[Path] = ()
        self.error = ""
        """Why something is delayed; kept when it has since been logged."""
        self.damaged = False
        """Whether `error` is about a damaged SQLite file."""
        self.ended = False
        """Whether the study's own run has been ended."""
        self._thread = threading.Thread(target=self._run, name="mlflow-writer", daemon=True)
        self._thread.start()

    @property
    def delayed(self) -> int:
        """How many of those put are not in MLflow yet."""
        with self._news:
            return len({*self._waiting, *self._refused, self._at_work} - {""})

    def put(self, record: Record | str) -> None:
        with self._news:
            self._waiting[record if isinstance(record, str) else record.fingerprint] = None
            self._news.notify()

    def reuse(self, fingerprint: str) -> None:
        """The study has come to ask for it, and it was known already."""
        self._reused |= {fingerprint}

    def close(self, timeout: float, status: str = "FINISHED", report: Sequence[Path] = ()) -> int:
        """Gives the writer `timeout` seconds to log what waits and to end the study's parent run with
        `status` (FINISHED, FAILED, KILLED) and the files of `report`. Returns the number of records that are
        not logged."""
        with self._news:
            self._status, self._report = status, report
            self._deadline = time.monotonic() + timeout
            self._news.notify()
        self._thread.join(timeout)
        return self.delayed

    def _run(self) -> None:
        pause, parent = _FIRST_PAUSE, ""
        while True:
            try:
                parent = parent or self._log.ensure_study(
                    self._study.name, self._study.question, {"command": self._study.command, **self._tags}
                )
                while (fingerprint := self._next()) is not None:
                    self._log_one(fingerprint)
                    pause = _FIRST_PAUSE
                self._log.finish_study(parent, self._status, self._report)
                self.ended = True
                return
            except TrackingDown as down:
                parent, self.error = "", str(down)
                self.damaged = isinstance(down, TrackingDamaged)
            except Exception as error:  # ours is a side show: nothing in it may end a study
                parent, self.error = "", without_secrets(f"{type(error).__name__}: {error}")
            if not self._pause(pause):
                return
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _next(self) -> str | None:
        """Waits for a fingerprint and takes it; None when closed and none is left."""
        with self._news:
            self._news.wait_for(lambda: self._waiting or self._deadline is not None)
            fingerprint = next(iter(self._waiting), None)
            if fingerprint is not None:
                # Taken before it is read: one that is put meanwhile, in a newer state, has its own turn.
                del self._waiting[fingerprint]
                self._at_work = fingerprint
            return fingerprint

    def _log_one(self, fingerprint: str) -> None:
        """Logs the record as the store has it now. One that MLflow refuses is set aside: it must not keep the
        others waiting."""
        artifacts = {fingerprint: self._store.adapters / fingerprint} if self._adapters else None
        try:
            record = self._store.get(fingerprint)
            if record is not None:
                self._log.log_records(self._study.name, [record], self._reused, artifacts)
            self._refused.discard(fingerprint)
        except TrackingDown:
            self.put(fingerprint)
            raise
        except Exception as error:
            self.error = without_secrets(f"{fingerprint[:12]}: {type(error).__name__}: {error}")
            self._refused.add(fingerprint)
        finally:
            with self._news:
                self._at_work = ""

    def _pause(self, seconds: float) -> bool:
        """False when the time that `close` allowed is over."""
        with self._news:
            if self._deadline is None:
                self._news.wait_for(lambda: self._deadline is not None, seconds)
                return True
            left = self._deadline - time.monotonic()
        seconds = min(seconds, _CLOSING_PAUSE)  # however long the outage was before
        time.sleep(max(0.0, min(seconds, left)))
        return left > seconds
