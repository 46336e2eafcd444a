"""The trackers beside MLflow: Weights & Biases and TensorBoard. Each has one run for each lane."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.record import run_values
from orchestrator.record.schema import LaneProgress, Record
from orchestrator.record.study_file import StudyFile
from orchestrator.record.tracker import StudyEnd, Tracker, describe_error
from orchestrator.study.configuration import Configuration
from orchestrator.util import timeouts
from orchestrator.util.errors import UsageError, require_package
from variants.variant_settings import short_name

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter
    from wandb import Run

DEFAULT_PROJECT = "lora-orchestrator"
"""The project in W&B, unless WANDB_PROJECT names another."""


class _OptionalTracker(Tracker, ABC):
    """A tracker whose package is an optional dependency. It logs each version of a record once.

    A text file lists the records that have been logged. It is in the folder of the tracker's files, and is
    deleted with them.

    Args:
        folder: The study's folder. The tracker's files are in a subfolder with the name of the package.
    """

    package = ""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / self.package
        self._list = self._folder / "logged-records.txt"
        lines = self._list.read_text().splitlines() if self._list.exists() else []
        self._logged = dict(line.split(" ", 1) for line in lines if " " in line)
        """Fingerprint -> version of the record."""

    @classmethod
    def check(cls) -> None:
        """Check that the package is installed.

        Raises:
            UsageError: The package is missing.
        """
        require_package(f"--tracker {cls.package}", cls.package, cls.package)

    def log_record(self, record: Record) -> None:
        """Log a record, unless it was logged before."""
        version = run_values.record_version(record)
        if self._logged.get(record.fingerprint) == version:
            return
        self._log_new(record)
        self._logged[record.fingerprint] = version
        self._folder.mkdir(parents=True, exist_ok=True)
        with self._list.open("a") as file:
            file.write(f"{record.fingerprint} {version}\n")

    @abstractmethod
    def _log_new(self, record: Record) -> None:
        """Log a record for the first time."""


class WandbTracker(_OptionalTracker):
    """The tracker `wandb`: one run for each lane, and one group of runs for each study.

    The id of a lane's run is a hash of the study's name and the fingerprint, so a resumed study continues the
    same runs. W&B accepts the steps of a run in ascending order only. A run therefore has the steps of
    `run_values.select_live_steps`, whether they are logged during training or from the record.
    """

    package = "wandb"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._study = ""
        self._view = ""
        self._runs: dict[str, Run] = {}
        """Fingerprint of a lane in training -> its open run."""

    @classmethod
    def check(cls) -> None:
        """Check that the package is installed, and that W&B has a key unless it is offline.

        Raises:
            UsageError: The package or the key is missing, or a setting of W&B is wrong.
        """
        super().check()
        import wandb

        os.environ.setdefault("WANDB_SILENT", "true")  # the study says what a user needs to know
        try:
            is_online = wandb.setup().settings.mode in ("online", "shared", "run")
            has_key = not is_online or wandb.login(prompt=False, verify=False)
        except (wandb.Error, ValueError) as error:  # such as a key or a mode of the wrong form
            raise UsageError(f"--tracker wandb: {describe_error(error)}") from None
        if not has_key:
            raise UsageError(
                "--tracker wandb: W&B has no API key here; set WANDB_API_KEY, run `wandb login`, or set "
                "WANDB_MODE=offline and upload later with `wandb sync`."
            )

    def is_outage(self, error: Exception) -> bool:
        """Return whether the same call may succeed later."""
        import wandb

        return isinstance(error, wandb.Error | OSError)

    def start(self, study: StudyFile, tags: Mapping[str, str]) -> None:
        """Set the group of the runs to the study's name. After an error, restart W&B's service."""
        if self._study:
            import wandb

            wandb.teardown()  # the service would refuse the id of a run whose creation has failed
        self._study = study.name
        self._runs.clear()

    def log_progress(self, progress: LaneProgress) -> None:
        """Create or continue the run of a lane in training, and log its new steps."""
        now = round(time.time() * 1000)
        self._log(progress.configuration, run_values.progress_values(progress, now, (0, now)))

    def _log_new(self, record: Record) -> None:
        """Complete the run of a record, and end it."""
        configuration = record.configuration
        evaluated = {evaluation.step for evaluation in record.evaluations} | {record.steps}
        steps = run_values.select_live_steps(record.curve, configuration.lr_schedule.steps, evaluated)
        run = self._log(configuration, run_values.record_values(record, steps))
        run.summary.update({**run_values.latest_values(record), "state": record.state})
        if record.reason:
            run.notes = record.reason
        self._runs.pop(record.fingerprint).finish(1 if record.state == "failed" else 0)

    def finish(self, end: StudyEnd) -> None:
        """End the runs of the lanes still in training. A later run of the study continues them."""
        while self._runs:
            self._runs.popitem()[1].finish(1)

    @property
    def view(self) -> str:
        """The address of the project, or the command that uploads offline runs."""
        return self._view

    def _open_run(self, configuration: Configuration) -> Run:
        """Return the open run of a lane. It is created, or resumed if an earlier driver has created it."""
        import wandb

        fingerprint = configuration.fingerprint
        if fingerprint in self._runs:
            return self._runs[fingerprint]
        columns = {k: v for k, v in configuration.to_columns().items() if v is not None}
        # The driver's command line, packages and load do not describe the lane, and may contain a secret.
        settings = wandb.Settings(
            console="off",
            silent=True,
            disable_code=True,
            disable_git=True,
            save_code=False,
            x_disable_meta=True,
            x_disable_stats=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
            init_timeout=timeouts.TRACKER_ANSWER_SECONDS,
            finish_timeout=timeouts.TRACKER_ANSWER_SECONDS,
            finish_timeout_raises=True,
        )
        run = wandb.init(
            project=wandb.setup().settings.project or DEFAULT_PROJECT,
            group=self._study,
            id=run_id(self._study, fingerprint),
            name=run_values.run_name(configuration),
            config={**columns, "fingerprint": fingerprint, "study": self._study},
            dir=str(self._folder.parent),
            resume="allow",
            reinit="create_new",
            settings=settings,
        )
        self._runs[fingerprint] = run
        self._view = (run.url or "").partition("/runs/")[0]
        if run.offline:
            self._view = f"wandb sync {shlex.quote(str(self._folder))}/offline-run-*"
        return run

    def _log(self, configuration: Configuration, values: Iterable[run_values.Value]) -> Run:
        """Log the values of the steps that the lane's run still accepts, and return the run."""
        run = self._open_run(configuration)
        by_step: dict[int, dict[str, float]] = defaultdict(dict)
        for value in values:
            by_step[value.step] |= {value.key: value.value, "_timestamp": value.timestamp / 1000}
        for step, row in sorted(by_step.items()):
            if step >= run.step:  # the record adds values to the last step, which therefore stays open
                run.log(row, step=step, commit=step < configuration.lr_schedule.steps)
        return run


def run_id(study: str, fingerprint: str) -> str:
    """Return the id of a lane's run in W&B."""
    return hashlib.sha256(f"{study}/{fingerprint}".encode()).hexdigest()[:16]


class TensorBoardTracker(_OptionalTracker):
    """The tracker `tensorboard`: one folder of event files for each lane.

    Event files can only be appended to. While a lane trains, its folder has a file with some of the steps.
    The lane's record replaces this file by one with all steps, so that no step appears twice.
    """

    package = "tensorboard"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._live: dict[str, tuple[SummaryWriter, int, int]] = {}
        """Fingerprint of a lane in training -> file, and step and Unix milliseconds of the last progress."""

    def start(self, study: StudyFile, tags: Mapping[str, str]) -> None:
        """Prepare the tracker to log. After an error, every lane in training gets a new event file."""
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

    def _log_new(self, record: Record) -> None:
        """Write the file of a record."""
        if live := self._live.pop(record.fingerprint, None):
            live[0].close()
        file = self._new_file(record.configuration)
        _write(file, run_values.record_values(record, record.curve))
        name = run_values.run_name(record.configuration)
        text = f"{name}: {record.state}\n\nfingerprint `{record.fingerprint}`\n\n{record.reason}"
        file.add_text("record", text, record.steps)
        file.close()

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
        file.add_scalar(value.key, value.value, value.step, walltime=value.timestamp / 1000)
