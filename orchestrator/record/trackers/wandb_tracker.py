"""Runs in Weights & Biases: one for each lane, in a group for each study."""

from __future__ import annotations

import hashlib
import math
import os
import shlex
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.record import run_values
from orchestrator.record.schema import LaneProgress, Record
from orchestrator.record.study_file import StudyFile
from orchestrator.record.trackers.logged_records import LoggedRecords
from orchestrator.record.trackers.tracker import StudyEnd, Tracker, TrackingUnavailableError
from orchestrator.study.configuration import Configuration
from orchestrator.util import timeouts
from orchestrator.util.errors import UsageError
from orchestrator.util.extras import require_package
from orchestrator.util.redaction import redact_secrets
from variants.variant_names import short_name

if TYPE_CHECKING:
    from wandb import Run

DEFAULT_PROJECT = "lora-orchestrator"
"""The project, unless WANDB_PROJECT names another."""


class WandbTracker(Tracker):
    """The tracker `wandb`.

    A lane's run has an id made from the study's name and the fingerprint, so a resumed study continues the
    same runs.

    W&B takes the steps of a run in ascending order only. A run therefore has the steps of
    `run_values.select_live_steps`, whether they were logged during the training or from the record, and the
    other steps of a finished lane's curve are not added. With a step metric of our own (`define_metric`) W&B
    would store them. But its maintainers say that such a metric must ascend, too (wandb/wandb#6554), so
    nothing promises that a chart sorts the steps, and on the axis "Step" they would lie behind the end of the
    training. MLflow, TensorBoard and `orchestrator.load` have the whole curve.

    Args:
        folder: The study's folder. W&B's local files are in its subfolder `wandb`.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._logged = LoggedRecords(folder / "wandb" / "logged-records.txt")
        self._study = ""
        self._view = ""
        self._has_failed = False
        self._runs: dict[str, Run] = {}
        """Fingerprint of a lane in training -> its open run."""
        self._next_steps: dict[str, int] = {}
        """Fingerprint of a lane in training -> the first step that its run still takes."""

    @classmethod
    def check(cls) -> None:
        """Check that the package is installed, and that W&B has a key unless it is offline.

        Raises:
            UsageError: One of the two is missing.
        """
        require_package("--tracker wandb", "wandb", "wandb")
        import wandb

        os.environ.setdefault("WANDB_SILENT", "true")  # the study says what a user needs to know
        with _one_line_errors():
            is_online = wandb.setup().settings.mode in ("online", "shared", "run")
            if is_online and not wandb.login(prompt=False, verify=False):
                raise UsageError(
                    "--tracker wandb: W&B has no API key here; set WANDB_API_KEY, run `wandb login`, or set "
                    "WANDB_MODE=offline and upload later with `wandb sync`."
                )

    def open_study(self, study: StudyFile, tags: Mapping[str, str]) -> None:
        """Keep the study's name, which is the group of its runs. After an error, begin with a new service."""
        self._study = study.name
        if self._has_failed:
            import wandb

            wandb.teardown()  # W&B's service refuses the id of a run whose creation has failed
            self._has_failed = False
        self._runs.clear()
        self._next_steps.clear()

    def log_progress(self, progress: LaneProgress) -> None:
        """Create or continue the run of a lane in training, and log its new steps."""
        now = round(time.time() * 1000)
        with self._convert_errors():
            run = self._open_run(progress.configuration)
            self._log(progress.configuration, run, run_values.progress_values(progress, now, (0, now)))

    def log_record(self, record: Record, is_reused: bool) -> None:
        """Complete the run of a record, and end it. A record that was logged before is skipped."""
        if record in self._logged:
            return
        configuration = record.configuration
        with self._convert_errors():
            run = self._open_run(configuration)
            evaluated = {evaluation.step for evaluation in record.evaluations} | {record.steps}
            steps = run_values.select_live_steps(record.curve, configuration.lr_schedule.steps, evaluated)
            self._log(configuration, run, run_values.record_values(record, steps))
            reused = {"reused_from_commit": record.provenance.commit} if is_reused else {}
            run.summary.update({**run_values.latest_values(record), "state": record.state, **reused})
            if record.reason:
                run.notes = redact_secrets(record.reason)
            self._end_run(configuration.fingerprint, 1 if record.state == "failed" else 0)
        self._logged.add(record)

    def describe_view(self) -> str:
        """Return the address of the project, or the command that uploads offline runs."""
        return self._view

    def close_study(self, end: StudyEnd) -> None:
        """End the runs of lanes that are not finished; a later run of the study continues them."""
        with self._convert_errors():
            for fingerprint in list(self._runs):
                self._end_run(fingerprint, 1)

    def _open_run(self, configuration: Configuration) -> Run:
        """Return the open run of a lane. It is created, or continued if W&B has it from an earlier driver."""
        import wandb

        fingerprint = configuration.fingerprint
        if fingerprint in self._runs:
            return self._runs[fingerprint]
        settings = wandb.Settings(
            console="off",
            silent=True,
            disable_code=True,
            disable_git=True,
            save_code=False,
            # The driver's command line, packages and load say nothing about the lane, and may hold a secret.
            x_disable_meta=True,
            x_disable_stats=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
            init_timeout=timeouts.TRACKER_ANSWER_SECONDS,
            finish_timeout=timeouts.TRACKER_ANSWER_SECONDS,
            finish_timeout_raises=True,
        )
        variant, task = short_name(configuration.variant.name), configuration.task.name
        columns = {k: v for k, v in configuration.to_columns().items() if v is not None}
        run = wandb.init(
            project=wandb.setup().settings.project or DEFAULT_PROJECT,
            group=self._study,
            id=run_id(self._study, fingerprint),
            name=run_values.run_name(configuration),
            tags=[tag[:64] for tag in (variant, task)],  # W&B's limit
            config={**columns, "fingerprint": fingerprint, "study": self._study},
            dir=str(self.folder),
            resume="allow",
            reinit="create_new",
            settings=settings,
        )
        self._runs[fingerprint] = run
        if run.offline:
            self._view = f"wandb sync {shlex.quote(str(self.folder / 'wandb'))}/offline-run-*"
        else:
            self._view = (run.url or "").partition("/runs/")[0]
        self._next_steps[fingerprint] = run.step
        return run

    def _log(self, configuration: Configuration, run: Run, values: Iterable[run_values.Value]) -> None:
        """Log the values of the steps that the run still takes."""
        by_step: dict[int, dict[str, float]] = defaultdict(dict)
        for value in values:
            shown = value.value if math.isfinite(value.value) else math.nan
            by_step[value.step] |= {value.key: shown, "_timestamp": value.timestamp / 1000}
        for step, row in sorted(by_step.items()):
            if step >= self._next_steps[configuration.fingerprint]:
                # The record adds values to the last step.
                is_whole = step < configuration.lr_schedule.steps
                run.log(row, step=step, commit=is_whole)
                self._next_steps[configuration.fingerprint] = step + is_whole

    def _end_run(self, fingerprint: str, exit_code: int) -> None:
        self._next_steps.pop(fingerprint)
        self._runs.pop(fingerprint).finish(exit_code)

    @contextmanager
    def _convert_errors(self) -> Iterator[None]:
        import wandb

        try:
            yield
        except (wandb.Error, OSError) as error:  # a TimeoutError is an OSError
            self._has_failed = True
            line = (str(error) or type(error).__name__).splitlines()[0]
            raise TrackingUnavailableError(redact_secrets(line)) from error


def run_id(study: str, fingerprint: str) -> str:
    """Return the id of a lane's run in W&B."""
    return hashlib.sha256(f"{study}/{fingerprint}".encode()).hexdigest()[:16]


@contextmanager
def _one_line_errors() -> Iterator[None]:
    import wandb

    try:
        yield
    except (wandb.Error, ValueError) as error:  # such as a key or a mode of the wrong form
        line = " ".join(redact_secrets(str(error)).split())
        raise UsageError(f"--tracker wandb: {line}") from None


TRACKER = WandbTracker
