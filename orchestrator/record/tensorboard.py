"""TensorBoard: one folder of event files for each lane."""

from __future__ import annotations

import math
import shlex
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.record import run_values
from orchestrator.record.schema import LaneProgress, Record
from orchestrator.record.study_file import StudyFile
from orchestrator.record.tracker import LoggedRecords, StudyEnd, Tracker
from orchestrator.study.configuration import Configuration
from orchestrator.util.errors import require_package
from variants.variant_names import short_name

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

FOLDER = "tensorboard"
"""Subfolder of the study's folder, for `tensorboard --logdir`."""


class TensorBoardTracker(Tracker):
    """The tracker `tensorboard`.

    Event files can only be appended to. While a lane trains, its folder has a file with some of the steps.
    The lane's record replaces this file by one with all steps, so that no step appears twice.

    Args:
        folder: The study's folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / FOLDER
        self._logged = LoggedRecords(self._folder / "logged-records.txt")
        self._live: dict[str, tuple[SummaryWriter, int, int]] = {}
        """Fingerprint of a lane in training -> file, and step and Unix milliseconds of the last progress."""

    @classmethod
    def check(cls) -> None:
        """Check that the package is installed.

        Raises:
            UsageError: The package is missing.
        """
        require_package("--tracker tensorboard", "tensorboard", "tensorboard")

    def start(self, study: StudyFile, tags: Mapping[str, str]) -> None:
        """Forget open files. After an error, the lanes in training begin new files."""
        self._live.clear()

    def log_progress(self, progress: LaneProgress) -> None:
        """Append the new steps of a lane in training to its file."""
        configuration, now = progress.configuration, round(time.time() * 1000)
        if configuration.fingerprint not in self._live:
            # A lane that continues from a checkpoint reports all its evaluations again.
            self._live[configuration.fingerprint] = self._new_file(configuration), -1, now
        file, *last = self._live[configuration.fingerprint]
        if progress.step > last[0]:
            _write(file, run_values.progress_values(progress, now, (last[0], last[1])))
            file.flush()
            self._live[configuration.fingerprint] = file, progress.step, now

    def log_record(self, record: Record, is_reused: bool) -> None:
        """Write the file of a record. A record that was logged before is skipped."""
        if record in self._logged:
            return
        if live := self._live.pop(record.fingerprint, None):
            live[0].close()
        file = self._new_file(record.configuration)
        _write(file, run_values.record_values(record, record.curve))
        name = run_values.run_name(record.configuration)
        text = f"{name}: {record.state}\n\nfingerprint `{record.fingerprint}`\n\n{record.reason}"
        file.add_text("record", text, record.steps)
        file.close()
        self._logged.add(record)

    def finish(self, end: StudyEnd) -> None:
        """Close the files of lanes that are not finished."""
        for file, *_ in self._live.values():
            file.close()
        self._live.clear()

    @property
    def view(self) -> str:
        """The command that shows the study."""
        return f"tensorboard --logdir {shlex.quote(str(self._folder))}"

    def _new_file(self, configuration: Configuration) -> SummaryWriter:
        """Remove a lane's event files, and open a new one.

        TensorBoard shows the name of the lane's folder as the name of the run.
        """
        from torch.utils.tensorboard.writer import SummaryWriter

        variant, rate = short_name(configuration.variant.name), configuration.optimizer.learning_rate
        name = f"{variant}-lr{rate:g}-seed{configuration.seed}-{configuration.fingerprint[:12]}"
        folder = self._folder / name.replace("/", "_").replace(":", "_")
        shutil.rmtree(folder, ignore_errors=True)
        return SummaryWriter(str(folder))


def _write(file: SummaryWriter, values: Iterable[run_values.Value]) -> None:
    for value in values:
        shown = value.value if math.isfinite(value.value) else math.nan
        file.add_scalar(value.key, shown, value.step, walltime=value.timestamp / 1000)
