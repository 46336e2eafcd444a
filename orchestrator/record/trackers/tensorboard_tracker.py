"""TensorBoard: one folder of event files for each lane."""

from __future__ import annotations

import math
import shlex
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.record import run_values
from orchestrator.record.schema import LaneProgress, Record
from orchestrator.record.study_file import StudyFile
from orchestrator.record.trackers.logged_records import LoggedRecords
from orchestrator.record.trackers.tracker import StudyEnd, Tracker, TrackingUnavailableError
from orchestrator.study.configuration import Configuration
from orchestrator.util.extras import require_package
from variants.variant_names import short_name

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

FOLDER = "tensorboard"
"""Folder in the study's folder that `tensorboard --logdir` takes."""


class TensorBoardTracker(Tracker):
    """The tracker `tensorboard`.

    Event files can only be appended to. While a lane trains, its folder has a file with some steps; the
    record replaces this file by one with all steps, so that no step is there twice.

    Args:
        folder: The study's folder.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._files = folder / FOLDER
        self._logged = LoggedRecords(self._files / "logged-records.txt")
        self._live: dict[str, SummaryWriter] = {}
        """Fingerprint of a lane in training -> writer of its file."""
        self._latest: dict[str, tuple[int, int]] = {}
        """Fingerprint of a lane in training -> step and time in milliseconds of its last progress."""

    @classmethod
    def check(cls) -> None:
        """Check that the package is installed.

        Raises:
            UsageError: It is missing.
        """
        require_package("--tracker tensorboard", "tensorboard", "tensorboard")

    def open_study(self, study: StudyFile, tags: Mapping[str, str]) -> None:
        """Forget open files: after an error, the files of lanes in training are begun again."""
        self._live.clear()
        self._latest.clear()

    def log_progress(self, progress: LaneProgress) -> None:
        """Append the new steps of a lane in training to its file."""
        configuration = progress.configuration
        now, fingerprint = round(time.time() * 1000), configuration.fingerprint
        try:
            if fingerprint not in self._live:
                # A lane that continues from a checkpoint reports all its evaluations again.
                self._live[fingerprint] = self._new_file(configuration)
                self._latest[fingerprint] = -1, now
            last = self._latest[fingerprint]
            if progress.step > last[0]:
                _write(self._live[fingerprint], run_values.progress_values(progress, now, last))
                self._live[fingerprint].flush()
                self._latest[fingerprint] = progress.step, now
        except OSError as error:
            raise TrackingUnavailableError(str(error)) from error

    def log_record(self, record: Record, is_reused: bool) -> None:
        """Write the file of a record. A record that was logged before is skipped."""
        if record in self._logged:
            return
        try:
            self._close_live(record.fingerprint)
            file = self._new_file(record.configuration)
            _write(file, run_values.record_values(record, record.curve))
            _write_hyperparameters(file, record)
            file.add_text("record", _markdown(record, is_reused), record.steps)
            file.close()
            self._logged.add(record)
        except OSError as error:
            raise TrackingUnavailableError(str(error)) from error

    def describe_view(self) -> str:
        """Return the command that shows the study."""
        return f"tensorboard --logdir {shlex.quote(str(self._files))}"

    def close_study(self, end: StudyEnd) -> None:
        """Close the files of lanes that are not finished."""
        for fingerprint in list(self._live):
            self._close_live(fingerprint)

    def _close_live(self, fingerprint: str) -> None:
        if fingerprint in self._live:
            self._live.pop(fingerprint).close()

    def _new_file(self, configuration: Configuration) -> SummaryWriter:
        """Begin a lane's folder anew."""
        from torch.utils.tensorboard.writer import SummaryWriter

        folder = self._files / lane_folder(configuration)
        shutil.rmtree(folder, ignore_errors=True)
        return SummaryWriter(str(folder))


def lane_folder(configuration: Configuration) -> str:
    """Return the name of a lane's folder, which TensorBoard shows as the name of the run."""
    variant, rate = short_name(configuration.variant.name), configuration.optimizer.learning_rate
    name = f"{variant}-lr{rate:g}-seed{configuration.seed}-{configuration.fingerprint[:12]}"
    return name.replace("/", "_").replace(":", "_")


def _write(file: SummaryWriter, values: Iterable[run_values.Value]) -> None:
    for value in values:
        shown = value.value if math.isfinite(value.value) else math.nan
        file.add_scalar(value.key, shown, value.step, walltime=value.timestamp / 1000)


def _write_hyperparameters(file: SummaryWriter, record: Record) -> None:
    """Write the row of TensorBoard's tab HPARAMS: hyperparameters, and the final scores."""
    from torch.utils.tensorboard import summary

    make_summaries: Any = summary.hparams  # it has no types
    writer: Any = file

    columns = record.configuration.to_columns().items()
    settings = {k: v if isinstance(v, bool | int | float) else str(v) for k, v in columns if v is not None}
    scores = {key: value for key, value in run_values.latest_values(record).items() if "score" in key}
    # `SummaryWriter.add_hparams` would put them into a run of their own.
    for each in make_summaries(settings, scores):
        writer._get_file_writer().add_summary(each)


def _markdown(record: Record, is_reused: bool) -> str:
    origin = ", from an earlier study" if is_reused else ""
    lines = [
        f"{run_values.run_name(record.configuration)}: {record.state}{origin}",
        f"fingerprint `{record.fingerprint}`, commit `{record.provenance.commit}`",
        record.reason,
    ]
    return "\n\n".join(filter(None, lines))


TRACKER = TensorBoardTracker
