"""MLflow logging in a thread of the driver, so that a study never waits for MLflow."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from orchestrator.record.mlflow.connection import TrackingDamagedError
from orchestrator.record.mlflow.log import MlflowLogger
from orchestrator.record.schema import LaneProgress, Record
from orchestrator.record.store import Store
from orchestrator.record.study_file import StudyFile
from orchestrator.record.trackers.tracker import StudyEnd, Tracker
from orchestrator.record.trackers.tracker_writer import TrackerWriter


class MlflowTracker(Tracker):
    """The tracker that logs a study to MLflow.

    Args:
        logger: The logger.
        study: The name of the study.
    """

    # Without `super().__init__`: MLflow has no files in the study's folder.
    def __init__(self, logger: MlflowLogger, study: str) -> None:
        self.logger, self._study = logger, study

    def open_study(self, study: StudyFile, tags: Mapping[str, str]) -> None:
        """Create or open the study's experiment and run."""
        self.logger.ensure_study(study.name, study.question, {"command": study.command, **tags})

    def log_progress(self, progress: LaneProgress) -> None:
        """Log the start or an evaluation to the lane's run."""
        self.logger.log_progress(self._study, progress)

    def log_record(self, record: Record, is_reused: bool) -> None:
        """Write the run of a record, if it is missing or differs."""
        reused = {record.fingerprint} if is_reused else frozenset()
        self.logger.log_records(self._study, [record], reused)

    def flush(self) -> None:
        """Write the mean scores over seeds, and the saved views."""
        self.logger.update_means(self._study)

    def close_study(self, end: StudyEnd) -> None:
        """Log the report and the logged models, and end the study's own run and all unfinished runs."""
        self.logger.finish_study(
            self._study, end.status, end.report_files, end.description, end.metrics, end.models
        )


class MlflowWriter(TrackerWriter):
    """Background writer of a study's MLflow runs.

    Records that are not logged when the writer closes are logged by `python -m orchestrator sync`.

    Args:
        log: The logger.
        store: The store.
        study: The study whose records are logged.
        tags: Tags of the study's own run.
    """

    def __init__(
        self,
        log: MlflowLogger,
        store: Store,
        study: StudyFile,
        *,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        self._logger = log
        make = partial(MlflowTracker, log, study.name)
        super().__init__(make, store, study, dict(tags or {}), retries_when_closing=True)

    @property
    def view_link(self) -> str:
        """Address of the study's ranked table; empty if MLflow has not answered yet."""
        return self._logger.view_link(self._study.name)

    @property
    def is_damaged(self) -> bool:
        """True if MLflow's SQLite file is damaged."""
        return isinstance(self.outage, TrackingDamagedError)
