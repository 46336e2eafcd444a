"""MLflow logging in a thread of the driver, so that a study never waits for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from orchestrator.record.mlflow.log import MlflowLogger, TrackingDamagedError, TrackingUnavailableError
from orchestrator.record.schema import Record
from orchestrator.record.store import Store
from orchestrator.record.study_file import StudyFile
from orchestrator.util import timeouts
from orchestrator.util.redaction import redact_secrets


class MlflowWriter:
    """Background writer of MLflow child runs.

    It queues fingerprints only and reads a record when its turn comes, so that a long outage does not fill
    the memory. While MLflow does not answer it tries again, with growing pauses. No method raises; records
    that are not logged when the writer closes are left to `python -m orchestrator sync`.

    Args:
        log: The logger.
        store: The store.
        study: The study whose records are logged.
        log_adapters: Also log the adapters that the store keeps.
        tags: Tags of the study's parent run.
    """

    def __init__(
        self,
        log: MlflowLogger,
        store: Store,
        study: StudyFile,
        *,
        log_adapters: bool = False,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        self._logger, self._store, self._study = log, store, study
        self._adapters, self._tags = store.adapters if log_adapters else None, dict(tags or {})
        self._reused = frozenset(study.reused)
        self._condition = threading.Condition()
        self._queue: dict[str, None] = {}  # an ordered set
        self._current = ""
        self._rejected: set[str] = set()
        self._deadline: float | None = None
        self._status = "FINISHED"
        self._report_files: Sequence[Path] = ()
        self.error = ""
        """The last error; it stays after the record has been logged."""
        self.is_damaged = False
        """True if `error` is about a damaged SQLite file."""
        self.is_finished = False
        """True when the study's parent run has ended."""
        self._thread = threading.Thread(target=self._run, name="mlflow-writer", daemon=True)
        self._thread.start()

    @property
    def pending_count(self) -> int:
        """Number of queued records that are not in MLflow yet."""
        with self._condition:
            return len({*self._queue, *self._rejected, self._current} - {""})

    def put(self, record: Record | str) -> None:
        """Queue a record, given itself or by its fingerprint."""
        with self._condition:
            self._queue[record if isinstance(record, str) else record.fingerprint] = None
            self._condition.notify()

    def mark_reused(self, fingerprint: str) -> None:
        """Mark a configuration that the store had before the study requested it."""
        self._reused |= {fingerprint}

    def close(self, timeout: float, status: str = "FINISHED", report_files: Sequence[Path] = ()) -> int:
        """Log the queue, end the study's parent run, and stop.

        Args:
            timeout: Seconds for all of that.
            status: Status of the parent run: FINISHED, FAILED or KILLED.
            report_files: Files to log as artifacts of the parent run.

        Returns:
            The number of records that are not logged.
        """
        with self._condition:
            self._status, self._report_files = status, report_files
            self._deadline = time.monotonic() + timeout
            self._condition.notify()
        self._thread.join(timeout)
        return self.pending_count

    def _run(self) -> None:
        pause, parent = timeouts.MIN_MLFLOW_RETRY_SECONDS, ""
        while True:
            try:
                parent = parent or self._logger.ensure_study(
                    self._study.name, self._study.question, {"command": self._study.command, **self._tags}
                )
                while (fingerprint := self._take_next()) is not None:
                    self._log_one(fingerprint)
                    pause = timeouts.MIN_MLFLOW_RETRY_SECONDS
                self._logger.finish_study(parent, self._status, self._report_files)
                self.is_finished = True
                return
            except TrackingUnavailableError as down:
                parent, self.error = "", str(down)
                self.is_damaged = isinstance(down, TrackingDamagedError)
            except Exception as error:  # logging must never end a study
                parent, self.error = "", redact_secrets(f"{type(error).__name__}: {error}")
            if not self._wait_before_retry(pause):
                return
            pause = min(2 * pause, timeouts.MAX_MLFLOW_RETRY_SECONDS)

    def _take_next(self) -> str | None:
        """Wait for a fingerprint and take it; None when the writer is closed and the queue is empty."""
        with self._condition:
            self._condition.wait_for(lambda: self._queue or self._deadline is not None)
            fingerprint = next(iter(self._queue), None)
            if fingerprint is not None:
                # Taken before the record is read: a newer state that is queued meanwhile gets its own turn.
                del self._queue[fingerprint]
                self._current = fingerprint
            return fingerprint

    def _log_one(self, fingerprint: str) -> None:
        """Log the current record. A record that MLflow refuses is put aside, so that the others go on."""
        try:
            record = self._store.get(fingerprint)
            if record is not None:
                self._logger.log_records(self._study.name, [record], self._reused, self._adapters)
            self._rejected.discard(fingerprint)
        except TrackingUnavailableError:
            self.put(fingerprint)
            raise
        except Exception as error:
            self.error = redact_secrets(f"{fingerprint[:12]}: {type(error).__name__}: {error}")
            self._rejected.add(fingerprint)
        finally:
            with self._condition:
                self._current = ""

    def _wait_before_retry(self, seconds: float) -> bool:
        """Wait, and return whether there is time for another attempt."""
        with self._condition:
            if self._deadline is None:
                self._condition.wait_for(lambda: self._deadline is not None, seconds)
                return True
            left = self._deadline - time.monotonic()
        seconds = min(seconds, timeouts.CLOSING_MLFLOW_RETRY_SECONDS)  # however long the outage was before
        time.sleep(max(0.0, min(seconds, left)))
        return left > seconds
