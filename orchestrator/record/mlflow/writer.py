"""MLflow logging in a thread of the driver, so that a study never waits for MLflow."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from orchestrator.record.mlflow.connection import TrackingDamagedError, TrackingUnavailableError
from orchestrator.record.mlflow.log import MlflowLogger
from orchestrator.record.schema import LaneProgress, Record
from orchestrator.record.store import Store
from orchestrator.record.study_file import StudyFile
from orchestrator.util import timeouts
from orchestrator.util.redaction import redact_secrets


class MlflowWriter:
    """Background writer of a study's MLflow runs.

    The queue holds fingerprints only, and a record is read when its turn comes, so that a long outage does
    not fill the memory. The progress of a lane is logged some seconds later, while no record is queued, and
    dropped once the lane has a record: a short lane then costs MLflow one call in place of one for each of
    its evaluations. While MLflow does not answer, the writer tries again with growing pauses. No method
    raises an exception. Records that are not logged when the writer closes are logged by
    `python -m orchestrator sync`.

    Args:
        log: The logger.
        store: The store.
        study: The study whose records are logged.
        log_adapters: Whether to log the adapters in the store too.
        tags: Tags of the study's own run.
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
        self._progress: dict[str, list[LaneProgress]] = {}
        """Fingerprint of a lane in training -> its start and evaluations that are not logged yet."""
        self._progress_due: dict[str, float] = {}
        """Fingerprint -> the time of `time.monotonic` from which on its progress is logged."""
        self._current = ""
        """Fingerprint of the record that is being logged, or empty."""
        self._rejected: set[str] = set()
        """Fingerprints of records that MLflow has refused."""
        self._deadline: float | None = None
        """Time of `time.monotonic` at which `close` gives up; None before `close`."""
        self._finish = partial(log.finish_study, study.name)
        self.error = ""
        """The last error. It is kept after the record has been logged."""
        self.is_damaged = False
        """True if `error` is about a damaged SQLite file."""
        self.is_finished = False
        """True when the study's own run has ended."""
        self._thread = threading.Thread(target=self._run, name="mlflow-writer", daemon=True)
        self._thread.start()

    @property
    def pending_count(self) -> int:
        """Number of records that were queued and are not in MLflow yet, including refused ones."""
        with self._condition:
            return len({*self._queue, *self._rejected, self._current} - {""})

    def put(self, record: Record | str) -> None:
        """Queue a record, given itself or by its fingerprint."""
        fingerprint = record if isinstance(record, str) else record.fingerprint
        with self._condition:
            self._queue[fingerprint] = None
            self._progress.pop(fingerprint, None)
            self._progress_due.pop(fingerprint, None)
            self._condition.notify()

    def put_progress(self, progress: LaneProgress) -> None:
        """Queue the start or an evaluation of a lane that is in training."""
        with self._condition:
            fingerprint = progress.configuration.fingerprint
            self._progress.setdefault(fingerprint, []).append(progress)
            due = time.monotonic() + timeouts.MLFLOW_PROGRESS_DELAY_SECONDS
            self._progress_due.setdefault(fingerprint, due)
            self._condition.notify()

    @property
    def view_link(self) -> str:
        """Address of the study's ranked table; empty if MLflow has not answered yet."""
        return self._logger.view_link(self._study.name)

    def mark_reused(self, fingerprint: str) -> None:
        """Mark a configuration whose record the store had before the study requested it."""
        self._reused |= {fingerprint}

    def close(
        self,
        timeout: float,
        status: str = "FINISHED",
        report_files: Sequence[Path] = (),
        description: str = "",
        metrics: Mapping[str, float] | None = None,
    ) -> int:
        """Log the queue, end the study's own run, and stop.

        Args:
            timeout: Longest duration of the whole call in seconds.
            status: Status of the study's run: FINISHED, FAILED or KILLED.
            report_files: Files to log as artifacts of the study's run.
            description: Verdicts and best points in Markdown; empty: the description stays as it is.
            metrics: Name -> value of the metrics of the study's run, logged together with a description.

        Returns:
            The number of records that are not logged.
        """
        with self._condition:
            self._finish = partial(
                self._logger.finish_study, self._study.name, status, report_files, description, metrics
            )
            self._progress.clear()
            self._progress_due.clear()
            self._deadline = time.monotonic() + timeout
            self._condition.notify()
        self._thread.join(timeout)
        return self.pending_count

    def _run(self) -> None:
        pause, is_open = timeouts.MIN_MLFLOW_RETRY_SECONDS, False
        study, tags = self._study, {"command": self._study.command, **self._tags}
        while True:
            try:
                if not is_open:
                    self._logger.ensure_study(study.name, study.question, tags)
                    is_open = True
                while (fingerprint := self._take_next()) is not None:
                    self._log_one(fingerprint)
                    if not self._queue:  # the next record in the queue would change the means again
                        self._logger.update_means(study.name)
                    pause = timeouts.MIN_MLFLOW_RETRY_SECONDS
                self._finish()
                self.is_finished = True
                return
            except TrackingUnavailableError as down:
                is_open, self.error = False, str(down)
                self.is_damaged = isinstance(down, TrackingDamagedError)
            except Exception as error:  # logging must never end a study
                is_open, self.error = False, redact_secrets(f"{type(error).__name__}: {error}")
            if not self._wait_before_retry(pause):
                return
            pause = min(2 * pause, timeouts.MAX_MLFLOW_RETRY_SECONDS)

    def _take_next(self) -> str | None:
        """Wait for the next fingerprint; None when the writer is closed and the queue is empty.

        The fingerprint is that of a record or, if no record waits, of a lane in training.
        """
        with self._condition:
            while not self._queue and self._deadline is None:
                left = min(self._progress_due.values(), default=math.inf) - time.monotonic()
                if left <= 0:
                    return min(self._progress_due, key=self._progress_due.__getitem__)
                self._condition.wait(None if math.isinf(left) else left)
            fingerprint = next(iter(self._queue), None)
            if fingerprint is not None:
                # Removed before the record is read, so that a newer record can be queued meanwhile.
                del self._queue[fingerprint]
                self._current = fingerprint
            return fingerprint

    def _log_one(self, fingerprint: str) -> None:
        """Log the record that `_take_next` took from the queue, or else the progress of a lane.

        A record that MLflow refuses goes to `_rejected`, so that it does not block the others.
        """
        if not self._current:
            self._log_progress(fingerprint)
            return
        try:
            record = self._store.get(fingerprint)
            if record is not None:
                record = self._study.rename(record)
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

    def _log_progress(self, fingerprint: str) -> None:
        """Log the progress of a lane.

        If MLflow does not answer, the rest is queued again, unless a record of the lane is queued or the
        writer closes.
        """
        with self._condition:
            waiting = self._progress.pop(fingerprint, [])
            self._progress_due.pop(fingerprint, None)
        try:
            while waiting:
                self._logger.log_progress(self._study.name, waiting[0])
                del waiting[0]
        except TrackingUnavailableError:
            with self._condition:
                if fingerprint not in self._queue and self._deadline is None:
                    self._progress[fingerprint] = [*waiting, *self._progress.get(fingerprint, ())]
                    self._progress_due[fingerprint] = time.monotonic()
            raise
        except Exception as error:  # not fatal: MLflow may still accept the lane's record
            self.error = redact_secrets(f"{fingerprint[:12]}: {type(error).__name__}: {error}")

    def _wait_before_retry(self, seconds: float) -> bool:
        """Wait at most `seconds`. Return whether another attempt is possible before the deadline."""
        with self._condition:
            if self._deadline is None:
                self._condition.wait_for(lambda: self._deadline is not None, seconds)
                return True
            left = self._deadline - time.monotonic()
        seconds = min(seconds, timeouts.CLOSING_MLFLOW_RETRY_SECONDS)  # not the long pause of an outage
        time.sleep(max(0.0, min(seconds, left)))
        return left > seconds
