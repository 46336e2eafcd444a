"""Trackers: programs and services that show the runs of a study beside its report.

MLflow is always one; `--tracker` adds W&B and TensorBoard. All that a tracker shows is derived from the
records in the store, so a failed tracker loses nothing. The driver writes to each tracker in a thread of its
own, so that training never waits for a tracker.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.record.schema import LaneProgress, Record
from orchestrator.record.store import Store
from orchestrator.record.study_file import StudyFile
from orchestrator.util import timeouts
from orchestrator.util.redaction import redact_secrets


@dataclass(frozen=True)
class StudyEnd:
    """How one run of a study has ended."""

    status: str = "FINISHED"
    """FINISHED, FAILED or KILLED."""
    report_files: tuple[Path, ...] = ()
    """Files of the report."""
    description: str = ""
    """Verdicts and best points in Markdown; empty without a new report."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Metrics of the whole study: name -> value."""


class Tracker:
    """The tracker of one study. Subclasses override the methods that they need.

    One thread makes all calls. After an outage, `start` is called again, and then the failed call. After any
    other error of `log_record`, only that record is left out.
    """

    retries_at_end = False
    """Whether the end of a study waits for a tracker that does not answer."""

    def is_outage(self, error: Exception) -> bool:
        """Return whether the same call may succeed later."""
        return isinstance(error, OSError)

    def start(self, study: StudyFile, tags: Mapping[str, str]) -> None:
        """Prepare the runs of a study, or connect again after an error. `tags` describe the study's run."""

    def log_progress(self, progress: LaneProgress) -> None:
        """Log the start or an evaluation of a lane in training. A resumed lane repeats its evaluations."""

    def log_record(self, record: Record) -> None:
        """Log the record of a lane that has ended. Each later run of the study logs it again."""

    def flush(self) -> None:
        """Write values that depend on several records. Called when no record is queued."""

    def finish(self, end: StudyEnd) -> None:
        """Finish the study's runs. Called when all records are logged, or when the time for it is over."""

    @property
    def view(self) -> str:
        """The command or the address that shows the study; empty if there is none yet."""
        return ""


MakeTracker = Callable[[Path], Tracker]
"""Function that makes the tracker of a study from the study's folder."""


class TrackerWriter:
    """A queue and a thread that write a study's runs to a tracker. No method raises an exception.

    The queue has fingerprints only. A record is read when it is logged, so that a long outage does not fill
    the memory. The progress of a lane is logged after a delay of some seconds, while no record is queued. It
    is dropped when the lane has a record, so that a short lane needs one call instead of one for each
    evaluation. While the tracker does not answer, the writer tries again after each pause.

    Args:
        make_tracker: Returns the tracker. The writer's thread calls it, and calls it again after an error.
        store: The store.
        study: The study whose records are logged.
        tags: Tags of the study.
        on_first_error: Called by the writer's thread with the first error, as one line. It is not called
            after `begin_close`; the caller then reads `error`.
    """

    def __init__(
        self,
        make_tracker: Callable[[], Tracker],
        store: Store,
        study: StudyFile,
        tags: Mapping[str, str],
        on_first_error: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._make_tracker, self._store, self._study, self._tags = make_tracker, store, study, tags
        self._tracker: Tracker | None = None
        self._on_first_error = on_first_error
        self._condition = threading.Condition()
        self._records: dict[str, None] = {}  # an ordered set
        """Fingerprints of the records that are queued."""
        self._missing: set[str] = set()
        """Fingerprints of the records that the tracker does not have yet, including refused ones."""
        self._progress: dict[str, tuple[float, list[LaneProgress]]] = {}
        """Fingerprint of a lane in training -> value of `time.monotonic` from which its progress is logged,
        and its start and evaluations that are not logged yet. The earliest time comes first."""
        self._deadline: float | None = None
        """Value of `time.monotonic` at which the writer gives up; None before `begin_close`."""
        self._end = StudyEnd()
        self.error = ""
        """The last error. It is kept after the record has been logged."""
        self.is_finished = False
        """True when everything has been written."""
        self._thread = threading.Thread(target=self._run, name="tracker", daemon=True)
        self._thread.start()

    @property
    def pending_count(self) -> int:
        """Number of records that were queued and are not logged yet, including refused ones."""
        return len(self._missing)

    @property
    def view(self) -> str:
        """The command or the address that shows the study; empty if there is none yet."""
        return self._tracker.view if self._tracker is not None else ""

    @property
    def retries_at_end(self) -> bool:
        """Whether the end of a study waits for the tracker if it does not answer."""
        return self._tracker is not None and self._tracker.retries_at_end

    def put(self, fingerprint: str) -> None:
        """Queue a record."""
        with self._condition:
            self._records[fingerprint] = None
            self._missing.add(fingerprint)
            self._progress.pop(fingerprint, None)
            self._condition.notify()

    def put_progress(self, progress: LaneProgress) -> None:
        """Queue the start or an evaluation of a lane that is in training."""
        due = time.monotonic() + timeouts.TRACKER_PROGRESS_DELAY_SECONDS
        with self._condition:
            self._progress.setdefault(progress.configuration.fingerprint, (due, []))[1].append(progress)
            self._condition.notify()

    def begin_close(self, end: StudyEnd, timeout: float) -> None:
        """Tell the writer to log the queue, finish the study's runs and stop within `timeout` seconds."""
        with self._condition:
            self._end = end
            self._progress.clear()
            self._deadline = time.monotonic() + timeout
            self._condition.notify()

    def wait_closed(self) -> None:
        """Wait until the writer has stopped or its time is over."""
        assert self._deadline is not None, "call begin_close before"
        self._thread.join(max(0.0, self._deadline - time.monotonic()))

    def _run(self) -> None:
        while True:
            try:
                self._tracker = self._tracker or self._make_tracker()
                self._tracker.start(self._study, self._tags)
                while fingerprint := self._wait_for_lane():
                    self._log(self._tracker, fingerprint)
                    if not self._records:  # the next record in the queue would change the means again
                        self._tracker.flush()
                self._tracker.finish(self._end)
                self.is_finished = True
                return
            except Exception as error:  # logging must never end a study
                self._note_error(error)
            if not self._wait_before_retry():
                return

    def _wait_for_lane(self) -> str:
        """Wait until a record is queued or the progress of a lane is due, and return the fingerprint.

        The text is empty when the writer is closed and no record is queued.
        """
        with self._condition:
            while not self._records and self._deadline is None:
                fingerprint, (due, _) = next(iter(self._progress.items()), ("", (math.inf, [])))
                if (left := due - time.monotonic()) <= 0:
                    return fingerprint
                self._condition.wait(None if math.isinf(left) else left)
            return next(iter(self._records), "")

    def _log(self, tracker: Tracker, fingerprint: str) -> None:
        """Log the queued record of a lane, or its progress if no record is queued.

        If the tracker does not answer, what is not logged stays queued. A record that the tracker refuses
        does not block the others.
        """
        with self._condition:
            is_record = fingerprint in self._records
            self._records.pop(fingerprint, None)  # before it is read: a newer one may be queued meanwhile
            _, waiting = self._progress.get(fingerprint, (0.0, []))
        is_logged = False
        try:
            if is_record and (record := self._store.get(fingerprint)) is not None:
                tracker.log_record(self._study.rename(record))
            while waiting:
                tracker.log_progress(waiting[0])
                del waiting[0]
            is_logged = is_record
        except Exception as error:
            if tracker.is_outage(error):
                if is_record:
                    self.put(fingerprint)
                raise
            self._note_error(error, fingerprint)
            waiting.clear()
        with self._condition:
            if is_logged and fingerprint not in self._records:
                self._missing.discard(fingerprint)
            if not waiting:
                self._progress.pop(fingerprint, None)

    def _note_error(self, error: Exception, fingerprint: str = "") -> None:
        text = f"{fingerprint[:12]}: {describe_error(error)}" if fingerprint else describe_error(error)
        is_first, self.error = not self.error, text
        if is_first and self._deadline is None:
            self._on_first_error(text)

    def _wait_before_retry(self) -> bool:
        """Wait for a moment. Return whether another attempt is possible before the deadline."""
        with self._condition:
            if self._deadline is None:
                self._condition.wait_for(lambda: self._deadline is not None, timeouts.TRACKER_RETRY_SECONDS)
                return True
        if not self.retries_at_end:
            return False
        time.sleep(timeouts.CLOSING_TRACKER_RETRY_SECONDS)
        return time.monotonic() < self._deadline


class TrackerWriters(dict[str, TrackerWriter]):
    """The writers of a study by name of the tracker; one is "mlflow". Each call goes to all of them."""

    def put(self, fingerprint: str) -> None:
        """Queue a record."""
        for writer in self.values():
            writer.put(fingerprint)

    def put_progress(self, progress: LaneProgress) -> None:
        """Queue the start or an evaluation of a lane that is in training."""
        for writer in self.values():
            writer.put_progress(progress)

    def close(self, end: StudyEnd, timeout: float) -> None:
        """Wait until the writers have logged their queues and finished the study's runs.

        Args:
            end: How the study has ended.
            timeout: The longest time to wait, in seconds. A tracker that has had an error and does not retry
                at the end gets at most `FAULTY_TRACKER_FLUSH_SECONDS`. Records that it has not logged by then
                are logged when the study's command is run again.
        """
        faulty = min(timeouts.FAULTY_TRACKER_FLUSH_SECONDS, timeout)
        for writer in self.values():
            writer.begin_close(end, faulty if writer.error and not writer.retries_at_end else timeout)
        for writer in self.values():
            writer.wait_closed()


def describe_error(error: Exception) -> str:
    """Return an error as one line of at most 300 characters without passwords."""
    cause: BaseException | None = error
    while cause is not None and not hasattr(cause, "orig"):  # SQLAlchemy's error has that of the database
        cause = cause.__cause__
    text = str(getattr(cause, "orig", None) or error) or type(error).__name__
    return " ".join(redact_secrets(text).split())[:300]
