"""The background writers of a study's runs: MLflow's, and one for each tracker that --tracker names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from orchestrator.launch.study_context import StudyContext
from orchestrator.record.mlflow.log import MlflowLogger
from orchestrator.record.mlflow.writer import MlflowWriter
from orchestrator.record.provenance import current_commit
from orchestrator.record.schema import LaneProgress, Record
from orchestrator.record.study_file import StudyFile
from orchestrator.record.trackers.tracker import StudyEnd
from orchestrator.record.trackers.tracker_writer import TrackerWriter
from orchestrator.util import timeouts


@dataclass(frozen=True)
class StudyWriters:
    """The writers of a study to MLflow and to the other trackers. Each call goes to all of them."""

    mlflow: MlflowWriter
    others: Mapping[str, TrackerWriter] = field(default_factory=dict)
    """Name of a tracker -> its writer."""

    def put(self, record: Record | str) -> None:
        """Queue a record, given itself or by its fingerprint."""
        for writer in self._all:
            writer.put(record)

    def put_progress(self, progress: LaneProgress) -> None:
        """Queue the start or an evaluation of a lane that is in training."""
        for writer in self._all:
            writer.put_progress(progress)

    def mark_reused(self, fingerprint: str) -> None:
        """Mark a configuration whose record the store had before the study requested it."""
        for writer in self._all:
            writer.mark_reused(fingerprint)

    def close(self, end: StudyEnd, timeout: float) -> None:
        """Wait until the writers have written what is queued and have ended the study.

        Args:
            end: How the study has ended.
            timeout: The longest time to wait for each writer, in seconds. Trackers other than MLflow get at
                most `TRACKER_FLUSH_SECONDS`, or `FAULTY_TRACKER_FLUSH_SECONDS` after an error. When the
                study's command is run again, it writes what they lack.
        """
        self.mlflow.begin_close(end, timeout)
        for writer in self.others.values():
            longest = (
                timeouts.FAULTY_TRACKER_FLUSH_SECONDS if writer.error else timeouts.TRACKER_FLUSH_SECONDS
            )
            writer.begin_close(end, min(longest, timeout))
        for writer in self._all:
            writer.wait_closed()

    @property
    def _all(self) -> list[TrackerWriter]:
        return [self.mlflow, *self.others.values()]


def start_writers(context: StudyContext, study: StudyFile, notify: Callable[[str], None]) -> StudyWriters:
    """Start the writers of a study.

    Args:
        context: The run.
        study: The study.
        notify: Prints a line. It is called, by a writer's thread, with the first error of each tracker that
            --tracker names; the end of the study says what they lack.
    """

    def report_error(name: str, error: str) -> None:
        notify(f"--tracker {name}: {error}; the study goes on, and its end says what is missing there")

    tags = {"commit": current_commit()}
    mlflow = MlflowWriter(
        MlflowLogger(context.tracking_uri),
        context.store,
        study,
        tags=tags,
    )
    others = {
        name: TrackerWriter(
            partial(tracker, context.folder),
            context.store,
            study,
            tags,
            retries_when_closing=False,
            on_first_error=partial(report_error, name),
        )
        for name, tracker in context.trackers.items()
    }
    return StudyWriters(mlflow, others)
