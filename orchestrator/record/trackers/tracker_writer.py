"""A thread of the driver that writes to a tracker, so that a study never waits for it."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping

from orchestrator.record.schema import LaneProgress, Record
from orchestrator.record.store import Store
from orchestrator.record.study_file import StudyFile
from orchestrator.record.trackers.tracker import StudyEnd, Tracker, TrackingUnavailableError
from orchestrator.util import timeouts
from orchestrator.util.redaction import redact_secrets


class TrackerWriter:
    """Background writer of a study's runs to a tracker.

    The queue holds fingerprints only, and a record is read when its turn comes, so that a long outage does
    not fill the memory. The progress of a lane is logged some seconds later, while no record is queued, and
    dropped once the lane has a record: a short lane then costs the tracker one call in place of one for each
    of its evaluations. While the tracker does not answer, the writer tries again with growing pauses. No
    method raises an exception.

    Args:
        make_tracker: Returns the tracker. The writer's thread calls it, and calls it again after an error.
        store: The store.
        study: The study whose records are logged.
        tags: Tags of the study.
        retries_when_closing: Whether to try again after an error while the study ends. Otherwise an outage
            does not delay the end, and the records are left out.
        on_first_error: Called with the first error, in one line, by the writer's thread; not while the study
            ends, when `error` is read.
    """

    def __init__(
        self,
        make_tracker: Callable[[], Tracker],
        store: Store,
        study: StudyFile,
        tags: Mapping[str, str],
        *,
        retries_when_closing: bool,
        on_first_error: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._make_tracker, self._store, self._study, self._tags = make_tracker, store, study, tags
        self._tracker: Tracker | None = None
        self._retries_when_closing, self._on_first_error = retries_when_closing, on_first_error
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
        """Fingerprints of records that the tracker has refused."""
        self._deadline: float | None = None
        """Time of `time.monotonic` at which `close` gives up; None before `close`."""
        self._end = StudyEnd()
        self.error = ""
        """The last error. It is kept after the record has been logged."""
        self.outage: TrackingUnavailableError | None = None
        """The last error because of which the writer has waited or waits."""
        self.is_finished = False
        """True when everything has been written."""
        self._thread = threading.Thread(target=self._run, name=type(self).__name__, daemon=True)
        self._thread.start()

    @property
    def pending_count(self) -> int:
        """Number of records that were queued and are not logged yet, including refused ones."""
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
            due = time.monotonic() + timeouts.TRACKER_PROGRESS_DELAY_SECONDS
            self._progress_due.setdefault(fingerprint, due)
            self._condition.notify()

    def mark_reused(self, fingerprint: str) -> None:
        """Mark a configuration whose record the store had before the study requested it."""
        self._reused |= {fingerprint}

    def describe_view(self) -> str:
        """Return the command or the address that shows the study; empty if there is none, or no tracker."""
        try:
            return self._tracker.describe_view() if self._tracker is not None else ""
        except Exception as error:  # a tracker of another package; the study goes on
            self._note_error(f"{type(error).__name__}: {error}")
            return ""

    def begin_close(self, end: StudyEnd, timeout: float) -> None:
        """Tell the writer to log the queue, to end the study and to stop.

        Args:
            end: How the study has ended.
            timeout: Longest duration of all this in seconds.
        """
        with self._condition:
            self._end = end
            self._progress.clear()
            self._progress_due.clear()
            self._deadline = time.monotonic() + timeout
            self._condition.notify()

    def wait_closed(self) -> int:
        """Wait until the writer has stopped, or its time is over. Call `begin_close` before.

        Returns:
            The number of records that are not logged.
        """
        assert self._deadline is not None, "call begin_close before"
        self._thread.join(max(0.0, self._deadline - time.monotonic()))
        return self.pending_count

    def _run(self) -> None:
        pause, is_open = timeouts.MIN_TRACKER_RETRY_SECONDS, False
        while True:
            try:
                if self._tracker is None:
                    self._tracker = self._make_tracker()
                if not is_open:
                    self._tracker.open_study(self._study, self._tags)
                    is_open = True
                while (fingerprint := self._take_next()) is not None:
                    self._log_one(self._tracker, fingerprint)
                    if not self._queue:  # the next record in the queue would change the means again
                        self._tracker.flush()
                    pause = timeouts.MIN_TRACKER_RETRY_SECONDS
                self._tracker.close_study(self._end)
                self.is_finished = True
                return
            except TrackingUnavailableError as down:
                is_open, self.outage = False, down
                self._note_error(str(down))
            except Exception as error:  # logging must never end a study
                is_open = False
                self._note_error(f"{type(error).__name__}: {error}")
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
        """Log the record that `_take_next` took from the queue, or else the progress of a lane.

        A record that the tracker refuses goes to `_rejected`, so that it does not block the others.
        """
        if not self._current:
            self._log_progress(tracker, fingerprint)
            return
        try:
            record = self._store.get(fingerprint)
            if record is not None:
                tracker.log_record(self._study.rename(record), record.fingerprint in self._reused)
            self._rejected.discard(fingerprint)
        except TrackingUnavailableError:
            self.put(fingerprint)
            raise
        except Exception as error:
            self._note_error(f"{fingerprint[:12]}: {type(error).__name__}: {error}")
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
        except TrackingUnavailableError:
            with self._condition:
                if fingerprint not in self._queue and self._deadline is None:
                    self._progress[fingerprint] = [*waiting, *self._progress.get(fingerprint, ())]
                    self._progress_due[fingerprint] = time.monotonic()
            raise
        except Exception as error:  # not fatal: the lane's record may still be accepted
            self._note_error(f"{fingerprint[:12]}: {type(error).__name__}: {error}")

    def _note_error(self, text: str) -> None:
        is_first, self.error = not self.error, " ".join(redact_secrets(text).split())[:300]
        if is_first and self._deadline is None:
            self._on_first_error(self.error)

    def _wait_before_retry(self, seconds: float) -> bool:
        """Wait at most `seconds`. Return whether another attempt is possible before the deadline."""
        with self._condition:
            if self._deadline is None:
                self._condition.wait_for(lambda: self._deadline is not None, seconds)
                return True
            left = self._deadline - time.monotonic()
        if not self._retries_when_closing:
            return False
        seconds = min(seconds, timeouts.CLOSING_TRACKER_RETRY_SECONDS)  # not the long pause of an outage
        time.sleep(max(0.0, min(seconds, left)))
        return left > seconds
