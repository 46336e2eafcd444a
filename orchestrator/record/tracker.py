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

from orchestrator.record.run_values import record_version
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

    @classmethod
    def check(cls) -> None:
        """Check that the tracker can be used, before anything is trained.

        Raises:
            UsageError: A package or a setting is missing.
        """

    def is_outage(self, error: Exception) -> bool:
        """Return whether the same call may succeed later."""
        return isinstance(error, OSError)

    def start(self, study: StudyFile, tags: Mapping[str, str]) -> None:
        """Prepare the runs of a study, or connect again after an error. `tags` describe the study's run."""

    def log_progress(self, progress: LaneProgress) -> None:
        """Log the start or an evaluation of a lane in training. A resumed lane repeats its evaluations."""

    def log_record(self, record: Record, is_reused: bool) -> None:
        """Log the record of a lane that has ended. Each later run of the study logs it again.

        Args:
            record: The record.
            is_reused: Whether the store had the record before the study requested it.
        """

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


class LoggedRecords:
    """A text file of the records that a tracker has logged, with their versions. Later runs skip them.

    Args:
        path: The file. It lies in the folder of the tracker's files, so that it is deleted with them.
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


class TrackerWriter:
    """A queue and a thread that write a study's runs to a tracker.

    The queue has fingerprints only. A record is read when it is logged, so that a long outage does not fill
    the memory. The progress of a lane is logged after a delay of some seconds, while no record is queued. It
    is dropped when the lane has a record, so that a short lane needs one call instead of one for each
    evaluation. While the tracker does not answer, the writer tries again with growing pauses. No method
    raises an exception.

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
        self.reused = set(study.reused)
        """Fingerprints whose record the store had before the study requested it."""
        self._condition = threading.Condition()
        self._queue: dict[str, None] = {}  # an ordered set
        self._progress: dict[str, list[LaneProgress]] = {}
        """Fingerprint of a lane in training -> its start and evaluations that are not logged yet."""
        self._progress_due: dict[str, float] = {}
        """Fingerprint -> value of `time.monotonic` from which its progress may be logged."""
        self._current = ""
        """Fingerprint of the record that is being logged, or empty."""
        self._rejected: set[str] = set()
        """Fingerprints of records that the tracker has refused."""
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
        with self._condition:
            return len({*self._queue, *self._rejected, self._current} - {""})

    @property
    def view(self) -> str:
        """The command or the address that shows the study; empty if there is none yet."""
        return self._tracker.view if self._tracker is not None else ""

    def put(self, fingerprint: str) -> None:
        """Queue a record."""
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
            due = time.monotonic() + timeouts.TRACKER_PROGRESS_DELAY_SECONDS
            self._progress_due.setdefault(fingerprint, due)
            self._condition.notify()

    def begin_close(self, end: StudyEnd, timeout: float) -> None:
        """Tell the writer to log the queue, finish the study's runs and stop within `timeout` seconds."""
        with self._condition:
            self._end = end
            self._progress.clear()
            self._progress_due.clear()
            self._deadline = time.monotonic() + timeout
            self._condition.notify()

    def wait_closed(self) -> int:
        """Wait until the writer has stopped or its time is over. Return the number of pending records."""
        assert self._deadline is not None, "call begin_close before"
        self._thread.join(max(0.0, self._deadline - time.monotonic()))
        return self.pending_count

    def _run(self) -> None:
        pause, is_started = timeouts.MIN_TRACKER_RETRY_SECONDS, False
        while True:
            try:
                self._tracker = self._tracker or self._make_tracker()
                if not is_started:
                    self._tracker.start(self._study, self._tags)
                    is_started = True
                while (fingerprint := self._take_next()) is not None:
                    self._log_one(self._tracker, fingerprint)
                    if not self._queue:  # the next record in the queue would change the means again
                        self._tracker.flush()
                    pause = timeouts.MIN_TRACKER_RETRY_SECONDS
                self._tracker.finish(self._end)
                self.is_finished = True
                return
            except Exception as error:  # logging must never end a study
                is_started = False
                self._note_error(error)
            if not self._wait_before_retry(pause):
                return
            pause = min(2 * pause, timeouts.MAX_TRACKER_RETRY_SECONDS)

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

    def _log_one(self, tracker: Tracker, fingerprint: str) -> None:
        """Log the record that `_take_next` took from the queue, or, if it took none, the progress of a lane.

        A record that the tracker refuses is added to `_rejected`, so that it does not block the others.
        """
        if not self._current:
            self._log_progress(tracker, fingerprint)
            return
        try:
            record = self._store.get(fingerprint)
            if record is not None:
                tracker.log_record(self._study.rename(record), fingerprint in self.reused)
            self._rejected.discard(fingerprint)
        except Exception as error:
            if tracker.is_outage(error):
                self.put(fingerprint)
                raise
            self._note_error(error, fingerprint)
            self._rejected.add(fingerprint)
        finally:
            with self._condition:
                self._current = ""

    def _log_progress(self, tracker: Tracker, fingerprint: str) -> None:
        """Log the progress of a lane.

        If the tracker does not answer, the rest is queued again, unless a record of the lane is queued or the
        writer closes.
        """
        with self._condition:
            waiting = self._progress.pop(fingerprint, [])
            self._progress_due.pop(fingerprint, None)
        try:
            while waiting:
                tracker.log_progress(waiting[0])
                del waiting[0]
        except Exception as error:
            if not tracker.is_outage(error):  # not fatal: the lane's record may still be accepted
                self._note_error(error, fingerprint)
                return
            with self._condition:
                if fingerprint not in self._queue and self._deadline is None:
                    self._progress[fingerprint] = [*waiting, *self._progress.get(fingerprint, ())]
                    self._progress_due[fingerprint] = time.monotonic()
            raise

    def _note_error(self, error: Exception, fingerprint: str = "") -> None:
        text = f"{fingerprint[:12]}: {describe_error(error)}" if fingerprint else describe_error(error)
        is_first, self.error = not self.error, text
        if is_first and self._deadline is None:
            self._on_first_error(text)

    def _wait_before_retry(self, seconds: float) -> bool:
        """Wait at most `seconds`. Return whether another attempt is possible before the deadline."""
        with self._condition:
            if self._deadline is None:
                self._condition.wait_for(lambda: self._deadline is not None, seconds)
                return True
            left = self._deadline - time.monotonic()
        if self._tracker is None or not self._tracker.retries_at_end:
            return False
        seconds = min(seconds, timeouts.CLOSING_TRACKER_RETRY_SECONDS)  # not the long pause of an outage
        time.sleep(max(0.0, min(seconds, left)))
        return left > seconds


class TrackerWriters:
    """The writers of a study, by name of the tracker. One is "mlflow". Each call goes to all of them."""

    def __init__(self, writers: Mapping[str, TrackerWriter]) -> None:
        self.mlflow = writers["mlflow"]
        self.others = {name: writer for name, writer in writers.items() if name != "mlflow"}
        self._all = list(writers.values())

    def put(self, fingerprint: str) -> None:
        """Queue a record."""
        for writer in self._all:
            writer.put(fingerprint)

    def put_progress(self, progress: LaneProgress) -> None:
        """Queue the start or an evaluation of a lane that is in training."""
        for writer in self._all:
            writer.put_progress(progress)

    def mark_reused(self, fingerprint: str) -> None:
        """Mark a configuration whose record the store had before the study requested it."""
        for writer in self._all:
            writer.reused.add(fingerprint)

    def close(self, end: StudyEnd, timeout: float) -> None:
        """Wait until the writers have logged their queues and finished the study's runs.

        Args:
            end: How the study has ended.
            timeout: The longest time to wait for each writer, in seconds. Trackers other than MLflow get at
                most `TRACKER_FLUSH_SECONDS`, or `FAULTY_TRACKER_FLUSH_SECONDS` after an error. Records that
                they have not logged by then are logged when the study's command is run again.
        """
        self.mlflow.begin_close(end, timeout)
        for writer in self.others.values():
            longest = (
                timeouts.FAULTY_TRACKER_FLUSH_SECONDS if writer.error else timeouts.TRACKER_FLUSH_SECONDS
            )
            writer.begin_close(end, min(longest, timeout))
        for writer in self._all:
            writer.wait_closed()


def describe_error(error: Exception) -> str:
    """Return an error as one line of at most 300 characters without passwords."""
    cause: BaseException | None = error
    while cause is not None and not hasattr(cause, "orig"):  # SQLAlchemy's error has that of the database
        cause = cause.__cause__
    text = str(getattr(cause, "orig", None) or error) or type(error).__name__
    return " ".join(redact_secrets(text).split())[:300]
