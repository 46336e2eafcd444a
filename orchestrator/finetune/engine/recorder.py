"""The storage of lanes' checkpoints, adapters and records, and of the number of lanes that memory holds."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError

from orchestrator.finetune.engine import adapter_file
from orchestrator.finetune.engine.checkpoint import Checkpoint
from orchestrator.finetune.engine.checkpoint_writer import CheckpointSchedule, CheckpointWriter, WriteResult
from orchestrator.finetune.engine.engine import Engine
from orchestrator.finetune.engine.lane import Lane
from orchestrator.finetune.engine.lane_state import LaneState
from orchestrator.finetune.engine.slots import MeasuredLanes
from orchestrator.finetune.failures import Fault, StoreFullError, classify_error
from orchestrator.record.lane_capacity import LaneCapacity
from orchestrator.record.schema import FINAL_STATES, Record, RecordState, current_provenance
from orchestrator.record.store import Store, adapter_file_name
from orchestrator.util import timeouts

log = logging.getLogger(__name__)


@dataclass
class LaneRecorder:
    """The writer of lanes' checkpoints, adapters and records to the store. Used on rank 0 only.

    Checkpoints of lanes that train on are written in the background. If a checkpoint cannot be written, the
    lane trains on, and a later attempt saves it. An adapter that cannot be written is left out. If the disk
    is full, the adapter of the lane is deleted, and its record is written again, for up to
    STORE_FULL_SECONDS; then StoreFullError is raised.
    """

    store: Store
    engine: Engine
    notify: Callable[[str], None]
    """Shows a line to the users who watch the study."""
    adapters: Path | None = None
    """The folder for the adapters of finished lanes; None to write none."""
    checkpoint_schedule: CheckpointSchedule = field(default_factory=CheckpointSchedule)
    """Gets the duration of each write."""
    saved_progress: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Fingerprint -> steps and evaluations in the lane's newest checkpoint."""
    has_warned: bool = False
    """True if the last checkpoint could not be written."""
    store_full_since: float | None = None
    """The time since which the disk has been full."""

    def __post_init__(self) -> None:
        self.writer = CheckpointWriter(self.store.checkpoints)

    def warn(self, line: str) -> None:
        """Write a line to this process's log and show it to the users who watch the study."""
        log.warning("%s", line)
        self.notify(line)

    def mark_saved(self, lane: Lane) -> None:
        """Note that the lane equals its newest checkpoint, so that it is not written again."""
        self.saved_progress[lane.fingerprint] = (lane.step, len(lane.evaluations))

    def is_saved(self, lane: Lane) -> bool:
        """Return whether the lane equals its newest checkpoint, or has nothing to save yet."""
        is_saved = self.saved_progress.get(lane.fingerprint) == (lane.step, len(lane.evaluations))
        return is_saved or lane.state is LaneState.LEASED

    def was_saved_here(self, lane: Lane) -> bool:
        """Return whether this trainer has written a checkpoint of the lane since it leased it."""
        resumed_at = lane.resumed_from[-1] if lane.resumed_from else 0
        return self.saved_progress.get(lane.fingerprint, (0, 0))[0] > resumed_at

    def start_checkpoint(self, lane: Lane) -> None:
        """Copy the lane and start to write its checkpoint in the background, unless a write is running.

        The outcome is noted by `note_finished_write`, or when the lane leaves.
        """
        self.note_finished_write()
        _drop_last_scores(lane)
        if self.is_saved(lane) or self.writer.is_busy:
            return
        try:
            self.writer.start(self._make_checkpoint(lane))
        except Exception as error:
            self._note_failed_write(error)

    def save_checkpoint(self, lane: Lane) -> None:
        """Write a checkpoint of the lane, unless its newest one is equal or the lane has not started."""
        self.finish_write()
        _drop_last_scores(lane)
        if not self.is_saved(lane):
            self._note_result(self.writer.write(self._make_checkpoint(lane)))

    def finish_write(self, fingerprint: str = "") -> None:
        """Wait for the write that runs in the background; afterwards no checkpoint appears.

        Args:
            fingerprint: The lane whose write is waited for; empty for any.
        """
        self._note_result(self.writer.take_result(fingerprint))

    def note_finished_write(self) -> None:
        """Note the outcome of the write in the background if it has ended."""
        self._note_result(self.writer.take_result(wait=False))

    def close(self) -> None:
        """Wait for the last write. Its error is logged, since another error may have ended the loop."""
        try:
            self.finish_write()
        except Exception:
            log.exception("the last checkpoint could not be written")
        self.writer.close()

    def _make_checkpoint(self, lane: Lane) -> Checkpoint:
        return lane.make_checkpoint(self.engine.lane_group.adapters.frozen(lane.fingerprint))

    def _note_result(self, result: WriteResult | None) -> None:
        """Note the progress and duration of a write that has ended, or its error; do nothing for None."""
        if result is None:
            return
        if result.error is not None:
            self._note_failed_write(result.error)
            return
        self.saved_progress[result.fingerprint] = result.progress
        self.checkpoint_schedule.write_seconds = result.seconds
        self.has_warned = False

    def _note_failed_write(self, error: Exception) -> None:
        """Warn that a checkpoint could not be written, once until one is written again.

        Raises:
            Exception: The error, if neither the disk nor a lack of memory is its cause.
        """
        refused = isinstance(error, (OSError, SafetensorError))
        if not refused and classify_error(error) not in (Fault.DISK, Fault.MEMORY):
            raise error
        if not self.has_warned:
            self.warn(f"cannot save lanes in {self.store.checkpoints}: {error}; training goes on")
        self.has_warned = True
        self.checkpoint_schedule.write_seconds = 0.0

    def write_record(
        self, lane: Lane, state: RecordState, reason: str = "", traceback_text: str = ""
    ) -> RecordState:
        """Write the record of a lane that ends, and discard its checkpoints if the record is final.

        The adapter of a finished lane is written before its record. If the process ends between the two, the
        lane has no record, is trained on from its checkpoint, and writes both.

        Args:
            lane: The lane.
            state: Its final state.
            reason: Why it ended, in one line.
            traceback_text: The traceback of a failed lane.

        Returns:
            The state of the record in the store, which another trainer may have written first.

        Raises:
            StoreFullError: The disk has stayed full for too long.
        """
        if state == "stopped":
            self.save_checkpoint(lane)
        self.finish_write(lane.fingerprint)
        record = self._build_record(lane, state, reason, traceback_text)
        if not self._put(record, self._write_adapter(record)):
            existing = self.store.get(lane.fingerprint)
            state = existing.state if existing is not None else state
        if state in FINAL_STATES:
            self.store.discard_checkpoints(lane.fingerprint)
        return state

    def find_final_state(self, fingerprint: str) -> RecordState | None:
        """Return the state of the configuration's final record, or None; discard leftover checkpoints.

        A trainer that died after it wrote the record, or that trained the same configuration, may have left
        checkpoints.
        """
        record = self.store.get(fingerprint)
        if record is None or record.state not in FINAL_STATES:
            return None
        self.finish_write(fingerprint)
        self.store.discard_checkpoints(fingerprint)
        return record.state

    def write_max_lanes(self, group_key: str, max_lanes: int, failed_lanes: int) -> None:
        """Write to the store how many lanes fit into memory.

        Args:
            group_key: The lanes' group key.
            max_lanes: Lanes that may train at once from now on.
            failed_lanes: Lanes that ran out of memory.
        """
        capacity = self._capacity(group_key)
        try:
            capacity.write_max_lanes(max_lanes)
        except OSError as error:
            outcome = f"not remembered: {error}"
        else:
            outcome = f"remembered in {capacity.path}"
        self.warn(f"out of memory with {failed_lanes} lanes, now {max_lanes} at once; {outcome}")

    def write_measured_lanes(self, group_key: str, measured: MeasuredLanes) -> None:
        """Write to the store how many lanes this trainer chose by measurement.

        Args:
            group_key: The lanes' group key.
            measured: The number, and its reasons.
        """
        try:
            self._capacity(group_key).write_measured(measured.lanes)
        except OSError as error:
            self.warn(f"the number of lanes is not remembered: {error}")
        self.notify(f"{measured.lanes} lanes at once on {self.engine.device_key}: {measured}")

    def read_max_lanes(self, group_key: str, requested: int, is_measured: bool = False) -> int | None:
        """Return the number of lanes that fit into memory, None if no trainer has found a limit.

        Args:
            group_key: The lanes' group key.
            requested: The largest number to use; a warning says if fewer fit.
            is_measured: If true, the number that a trainer chose by measurement is a limit as well.
        """
        capacity = self._capacity(group_key)
        max_lanes, measured = capacity.lanes, capacity.measured if is_measured else None
        if measured is not None and measured <= (max_lanes or measured):
            return measured
        if max_lanes is not None and max_lanes < requested:
            self.warn(
                f"at most {max_lanes} lanes at once: more ran out of memory before "
                f"(remove {capacity.path} to try)"
            )
        return max_lanes

    def _capacity(self, group_key: str) -> LaneCapacity:
        return LaneCapacity(self.store.lane_capacity, group_key, self.engine.device_key)

    def wait_for_space(self, reason: object) -> None:
        """Sleep for a moment because the disk is full.

        Raises:
            StoreFullError: The disk has been full for STORE_FULL_SECONDS.
        """
        now = time.monotonic()
        if self.store_full_since is None:
            self.store_full_since = now
            self.warn(f"{reason}; waiting for space up to {timeouts.STORE_FULL_SECONDS:g} s")
        if now - self.store_full_since > timeouts.STORE_FULL_SECONDS:
            where = self.store.checkpoints.parent
            raise StoreFullError(f"no space left on {where}; free some, then run the command again")
        time.sleep(min(1.0, timeouts.STORE_FULL_SECONDS / 4))

    def _write_adapter(self, record: Record) -> Path | None:
        """Write the adapter of a finished lane if the study keeps it.

        An error gives a warning only, unless the device is lost: an adapter can be made by training the lane
        again, but a record must not be lost.

        Returns:
            The file; None if no adapter was written.
        """
        if self.adapters is None or record.state != "finished":
            return None
        if self.store.get_reusable(record.fingerprint) is not None:  # another trainer has recorded the lane
            return None
        path = self.adapters / adapter_file_name(record.fingerprint)
        try:
            adapter_file.write(path, self.engine.lane_group.adapters, record.fingerprint)
        except Exception as error:  # of any class: the record is written in any case
            if classify_error(error) is Fault.DEVICE:
                raise
            self.warn(f"the adapter of {record.fingerprint[:12]} is not kept: {error}")
            return None
        return path

    def _put(self, record: Record, adapter: Path | None) -> bool:
        """Write a record, waiting for space if the disk is full.

        Args:
            record: The record.
            adapter: The file of the lane's adapter. If the disk is full, it is removed to make space.

        Returns:
            Whether the record was written: False if the store has a final one already.
        """
        while True:
            try:
                is_written = self.store.put(record)
            except OSError as error:
                if classify_error(error) is not Fault.DISK:
                    raise
                if adapter is None:
                    self.wait_for_space(error)
                else:
                    adapter.unlink(missing_ok=True)
                    adapter = None
                    self.warn(f"the adapter of {record.fingerprint[:12]} is not kept: {error}")
                continue
            self.store_full_since = None
            return is_written

    def _build_record(self, lane: Lane, state: RecordState, reason: str, traceback_text: str) -> Record:
        """Return the record of a lane that ends; see `write_record`."""
        provenance = current_provenance(
            self.engine.device_name,
            kernels=self.engine.kernels,
            lane_group_size=lane.peak_group_size,
            workers=self.engine.process_group.world_size,
            attempt=lane.lease.attempt,
            resumed_from=lane.resumed_from,
            started=lane.started,
            ended=time.time(),
        )
        return Record(
            fingerprint=lane.fingerprint,
            configuration=lane.configuration,
            state=state,
            steps=lane.step,
            reason=reason,
            traceback=traceback_text,
            curve=tuple(lane.curve),
            evaluations=tuple(lane.evaluations),
            baseline_scores=self.engine.lane_group.data.untrained if self.engine.has_lane_group else {},
            items=lane.items,
            cost=lane.cost,
            provenance=provenance,
            stopping_settings=lane.lease.scheduler if state == "stopped" else "",
            stopped_at=lane.last_reported_step if state == "stopped" else None,
        )


def _drop_last_scores(lane: Lane) -> None:
    """Drop the last step's scores of a lane that is saved at its last step.

    A record needs the results per item with these scores, and a checkpoint does not hold them. The lane is
    evaluated again when it resumes.
    """
    if lane.is_at_last_step:
        lane.evaluations = [e for e in lane.evaluations if e.step < lane.step]
