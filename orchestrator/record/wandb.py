"""Weights & Biases: one run for each lane, and one group of runs for each study."""

from __future__ import annotations

import hashlib
import math
import os
import shlex
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.record import run_values
from orchestrator.record.schema import LaneProgress, Record
from orchestrator.record.study_file import StudyFile
from orchestrator.record.tracker import LoggedRecords, StudyEnd, Tracker, describe_error
from orchestrator.study.configuration import Configuration
from orchestrator.util import timeouts
from orchestrator.util.errors import UsageError, require_package
from orchestrator.util.redaction import redact_secrets

if TYPE_CHECKING:
    from wandb import Run

DEFAULT_PROJECT = "lora-orchestrator"
"""The project, unless WANDB_PROJECT names another."""


class WandbTracker(Tracker):
    """The tracker `wandb`.

    The id of a lane's run is a hash of the study's name and the fingerprint, so a resumed study continues the
    same runs. W&B accepts the steps of a run in ascending order only. A run therefore has the steps of
    `run_values.select_live_steps`, whether they are logged during training or from the record.

    Args:
        folder: The study's folder. W&B's local files are in its subfolder `wandb`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._logged = LoggedRecords(folder / "wandb" / "logged-records.txt")
        self._study = ""
        self._view = ""
        self._runs: dict[str, Run] = {}
        """Fingerprint of a lane in training -> its open run."""
        self._next_steps: dict[str, int] = {}
        """Fingerprint of a lane in training -> the first step that its run still accepts."""

    @classmethod
    def check(cls) -> None:
        """Check that the package is installed, and that W&B has a key unless it is offline.

        Raises:
            UsageError: The package or the key is missing, or a setting of W&B is wrong.
        """
        require_package("--tracker wandb", "wandb", "wandb")
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
        self._next_steps.clear()

    def log_progress(self, progress: LaneProgress) -> None:
        """Create or continue the run of a lane in training, and log its new steps."""
        now = round(time.time() * 1000)
        self._log(progress.configuration, run_values.progress_values(progress, now, (0, now)))

    def log_record(self, record: Record, is_reused: bool) -> None:
        """Complete the run of a record, and end it. A record that was logged before is skipped."""
        if record in self._logged:
            return
        configuration = record.configuration
        evaluated = {evaluation.step for evaluation in record.evaluations} | {record.steps}
        steps = run_values.select_live_steps(record.curve, configuration.lr_schedule.steps, evaluated)
        self._log(configuration, run_values.record_values(record, steps))
        run = self._open_run(configuration)
        run.summary.update({**run_values.latest_values(record), "state": record.state})
        if record.reason:
            run.notes = redact_secrets(record.reason)
        self._end_run(record.fingerprint, 1 if record.state == "failed" else 0)
        self._logged.add(record)

    def finish(self, end: StudyEnd) -> None:
        """End the runs of lanes that are not finished; a later run of the study continues them."""
        for fingerprint in list(self._runs):
            self._end_run(fingerprint, 1)

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
        run = wandb.init(
            project=wandb.setup().settings.project or DEFAULT_PROJECT,
            group=self._study,
            id=run_id(self._study, fingerprint),
            name=run_values.run_name(configuration),
            config={**columns, "fingerprint": fingerprint, "study": self._study},
            dir=str(self._folder),
            resume="allow",
            reinit="create_new",
            # The driver's command line, packages and load do not describe the lane, and may contain a secret.
            settings=wandb.Settings(
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
            ),
        )
        self._runs[fingerprint] = run
        self._view = (run.url or "").partition("/runs/")[0]
        if run.offline:
            self._view = f"wandb sync {shlex.quote(str(self._folder / 'wandb'))}/offline-run-*"
        self._next_steps[fingerprint] = run.step
        return run

    def _log(self, configuration: Configuration, values: Iterable[run_values.Value]) -> None:
        """Log the values of the steps that the lane's run still accepts."""
        run, fingerprint = self._open_run(configuration), configuration.fingerprint
        by_step: dict[int, dict[str, float]] = defaultdict(dict)
        for value in values:
            shown = value.value if math.isfinite(value.value) else math.nan
            by_step[value.step] |= {value.key: shown, "_timestamp": value.timestamp / 1000}
        for step, row in sorted(by_step.items()):
            if step >= self._next_steps[fingerprint]:
                is_whole = step < configuration.lr_schedule.steps  # the record adds values to the last step
                run.log(row, step=step, commit=is_whole)
                self._next_steps[fingerprint] = step + is_whole

    def _end_run(self, fingerprint: str, exit_code: int) -> None:
        self._next_steps.pop(fingerprint)
        self._runs.pop(fingerprint).finish(exit_code)


def run_id(study: str, fingerprint: str) -> str:
    """Return the id of a lane's run in W&B."""
    return hashlib.sha256(f"{study}/{fingerprint}".encode()).hexdigest()[:16]
