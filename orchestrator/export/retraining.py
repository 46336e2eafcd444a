"""Training of a lane a second time to get its adapter, in this process and without Ray."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from orchestrator.execution.progress import format_duration
from orchestrator.record.kept_adapters import file_name
from orchestrator.record.schema import Record, RecordState
from orchestrator.record.store import Store
from orchestrator.util.errors import StudyError, UsageError

if TYPE_CHECKING:
    import torch

    from orchestrator.finetune.engine.lane_source import Directive, Lease, LeaseGrant, Report

Device = Literal["auto", "cpu"]


@dataclass(frozen=True)
class RetrainedLane:
    """The result of training a lane a second time."""

    record: Record
    """The record of the new run, which is in no store."""
    file: Path
    """The file with the adapter."""
    is_equal: bool
    """Whether the run has the same loss curve and the same scores as the lane's record in the store."""


def describe_cost(record: Record) -> str:
    """Return a phrase with the time, the device and the number of steps that a lane took, from its record."""
    cost = record.cost
    seconds = cost.start_seconds + cost.train_seconds + cost.evaluate_seconds + cost.other_seconds
    return f"about {format_duration(seconds)} on {record.provenance.device}, {record.steps} steps"


def retrain(
    store: Store,
    scratch: Path,
    checkpoints: Path,
    record: Record,
    device: Device,
    is_forced: bool,
    notify: Callable[[str], None],
) -> RetrainedLane:
    """Train the lane of a record again, on a GPU if this machine has one.

    No record is written to the store. After an interruption, a call with the same `checkpoints` continues
    from the last checkpoint.

    Args:
        store: The store with the base model and the data; it is only read.
        scratch: An empty folder for the new record and the adapter.
        checkpoints: A folder for the checkpoints of this lane, which no other process uses.
        record: The record of the lane.
        device: "cpu" to train on the CPU although there is a GPU.
        is_forced: True to train on the CPU although the lane was trained on a GPU.
        notify: Called with one line for each evaluation.

    Raises:
        UsageError: The lane was trained on a GPU and there is none here, or by other numerics of the loop.
        StudyError: The lane did not finish, or its adapter could not be written.
    """
    from orchestrator.finetune.engine import loop
    from orchestrator.finetune.models import loading
    from orchestrator.record import provenance

    place = _choose_device(record, device, is_forced)
    current = type(record.configuration).loop_numerics
    if record.configuration.loop_numerics != current:
        raise UsageError(
            f"lane {record.fingerprint[:12]} was trained by version {record.configuration.loop_numerics} of "
            f"the loop's numerics, this program has {current}; its study's command trains it by this version."
        )
    temporary = Store(scratch)
    temporary.bases, temporary.data, temporary.calibration = store.bases, store.data, store.calibration
    temporary.checkpoints, temporary.lane_capacity = checkpoints, store.lane_capacity
    source = OneLane(record, notify)
    loop.run(
        source,
        temporary,
        lambda model, task: loading.load_base_model(model, store.bases, place, task),
        loop.LoopSettings(max_lanes=1, idle_seconds=0.0, adapters=temporary.adapters),
        provenance=provenance.current_provenance,
    )
    made = temporary.get(record.fingerprint)
    if made is None or made.state != "finished":
        reason = f"{made.state}: {made.reason}" if made is not None else "no result"
        raise StudyError(
            f"lane {record.fingerprint[:12]} did not finish when it was trained again ({reason})"
        )
    file = temporary.adapters / file_name(made)
    if not file.exists():
        raise StudyError(f"the adapter of {record.fingerprint[:12]} could not be written to {file.parent}")
    return RetrainedLane(made, file, _results(made) == _results(record))


def _choose_device(record: Record, device: Device, is_forced: bool) -> torch.device:
    """Return the device to train on: the GPU, if there is one and the user has not chosen the CPU.

    Raises:
        UsageError: It would be the CPU, but the lane was trained on a GPU, and `is_forced` is false.
    """
    import torch

    if device == "auto" and torch.cuda.is_available():
        return torch.device("cuda")
    if record.provenance.device != "cpu" and not is_forced:
        raise UsageError(
            f"lane {record.fingerprint[:12]}: its adapter was not kept, and training it again takes "
            f"{describe_cost(record)}; run this command on a machine with a GPU, or add --retrain to train "
            "it on this CPU."
        )
    torch.set_num_threads(1)  # as in a trainer, so that the numbers are the same
    return torch.device("cpu")


def _results(record: Record) -> Mapping[str, object]:
    """Return the results of a record that a second training must repeat, as JSON values (NaN equals NaN)."""
    return {key: value for key, value in record.to_json().items() if key in ("curve", "evaluations", "steps")}


class OneLane:
    """A lane source with one lane, which is never stopped; see `LaneSource`.

    Args:
        record: The record of the lane.
        notify: Called with one line for each evaluation, and with the lines of the loop.
    """

    def __init__(self, record: Record, notify: Callable[[str], None]) -> None:
        self._configuration = record.configuration
        self._notify = notify
        self._is_leased = False

    def lease(self, group_key: str | None, capacity: int, steps_taken: int) -> LeaseGrant:
        """Lease the lane at the first call, and nothing later."""
        from orchestrator.finetune.engine.lane_source import Lease, LeaseGrant

        leases: tuple[Lease, ...] = () if self._is_leased else (Lease(self._configuration, 1),)
        self._is_leased = True
        return LeaseGrant(leases, closed=True)

    def report(self, report: Report) -> Directive:
        """Show the scores, and let the lane continue."""
        from orchestrator.finetune.engine.lane_source import Directive

        score = report.scores.get(self._configuration.task.metric)
        shown = "" if score is None else f", validation {score:.4f}"
        steps = self._configuration.lr_schedule.steps
        self._notify(f"step {report.step} of {steps}: loss {report.train_loss:.4f}{shown}")
        return Directive.CONTINUE

    def exchange(self, steps_taken: int) -> Mapping[str, Directive]:
        """Return no directive: the lane continues."""
        return {}

    def return_lease(self, fingerprint: str, attempt: int) -> None:
        """Do nothing: a later call of `retrain` continues from the checkpoint."""

    def notify(self, line: str) -> None:
        """Show a line of the loop."""
        self._notify(line)

    def note_max_lanes(self, max_lanes: int) -> None:
        """Do nothing: there is one lane."""

    def note_progress(self) -> None:
        """Do nothing: no process watches this one."""

    def end_lease(self, fingerprint: str, attempt: int, state: RecordState) -> None:
        """Do nothing: the record has the state."""
