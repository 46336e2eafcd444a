"""The interface of a tracker: a program or service that shows the runs of a study beside its report.

MLflow is one; `--tracker` adds others. The records in the store are authoritative. What a tracker shows is
derived from them, so a tracker that fails loses nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.record.schema import LaneProgress, Record
from orchestrator.record.study_file import StudyFile


class TrackingUnavailableError(Exception):
    """A tracker does not answer; the same call may succeed later. The records are in the store."""


@dataclass(frozen=True)
class StudyEnd:
    """How one run of a study has ended."""

    status: str = "FINISHED"
    """FINISHED, FAILED or KILLED."""
    report_files: tuple[Path, ...] = ()
    """Files of the report."""
    description: str = ""
    """Verdicts and best points in Markdown; empty: there is no new report."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Name -> value of the metrics of the study as a whole."""
    models: Mapping[str, Mapping[str, str]] | None = None
    """Fingerprint -> tags of each adapter that the study keeps; None if that is unknown."""


class Tracker:
    """A tracker of one study. A subclass overrides what it needs.

    One thread of the driver makes all calls, one after another (`TrackerWriter`). A method that raises
    TrackingUnavailableError is called again later, after another `open_study`. Any other error of
    `log_record` rejects that record alone.

    Args:
        folder: The study's folder, for files of the tracker.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def check(cls) -> None:
        """Check that the tracker can be used. The command's thread calls this before anything is trained.

        Raises:
            UsageError: A package or a setting is missing.
        """

    def open_study(self, study: StudyFile, tags: Mapping[str, str]) -> None:
        """Begin to write a study, or continue after an error.

        Args:
            study: The study.
            tags: Tags of the study, such as the commit.
        """

    def log_progress(self, progress: LaneProgress) -> None:
        """Show the start or an evaluation of a lane in training. After a resumption it is repeated."""

    def log_record(self, record: Record, is_reused: bool) -> None:
        """Show the record of a lane that has ended. Each later run of the study repeats it.

        Args:
            record: The record.
            is_reused: Whether the store had the record before the study requested it.
        """

    def flush(self) -> None:
        """Write what depends on several records. Called when no record waits."""

    def describe_view(self) -> str:
        """Return the command or the address that shows the study; empty if there is none."""
        return ""

    def close_study(self, end: StudyEnd) -> None:
        """End the writing: all records have been logged, or a limit of time has been reached."""
