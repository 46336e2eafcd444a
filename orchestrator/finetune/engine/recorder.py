"""Writes the checkpoints and records of lanes, and the lane limits found by out-of-memory errors."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from safetensors import SafetensorError

from orchestrator.finetune.engine import checkpoint
from orchestrator.finetune.engine.engine import Engine
from orchestrator.finetune.engine.lane import Lane
from orchestrator.finetune.engine.lane_state import LaneState
from orchestrator.finetune.failures import Fault, StoreFullError, classify_error, is_file_not_found
from orchestrator.record import lane_capacity
from orchestrator.record.schema import FINAL_STATES, Provenance, Record, RecordState
from orchestrator.record.store import Store

log = logging.getLogger(__name__)


@dataclass
class LaneRecorder:
    """Writes checkpoints and records of lanes to the store. Used on rank 0 only.

    If a checkpoint cannot be written, the lane trains on and is saved the next time. If the disk is full, a
    record is tried again for `store_full_timeout_seconds`; then StoreFullError is raised.
    """

    store: Store
    engine: Engine
    provenance: Callable[..., Provenance]
    """Makes the provenance of a record, see `loop.run`."""
    store_full_timeout_seconds: float
    notify: Callable[[str], None]
    """Shows a line to the users who watch the study."""
    saved_progress: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Fingerprint -> steps and evaluations in the lane's newest checkpoint."""
    has_warned: bool = False
    """True if the last checkpoint could not be written."""
    store_full_since: float | None = None
    """The time since which the disk has been full."""

    def warn(self, line: str) -> None:
        """Write a line to this process's log and show it to the users who watch the study."""
        log.warning("%s", line)
        self.notify(line)

    def mark_saved(self, lane: Lane) -> None:
        """Note that the lane equals its newest checkpoint, so that it is not written again."""
        self.saved_progress[lane.fingerprint] = (lane.step, len(lane.evaluations))

    def save_checkpoint(self, lane: Lane) -> None:
        """Write a checkpoint of the lane, unless its newest one is equal or the lane has not started."""
        if lane.is_at_last_step:
            # The last scores need the outcome of each item, which a checkpoint does not hold: a lane that
            # resumes there is evaluated again.
            lane.evaluations = [e for e in lane.evaluations if e.step < lane.step]
        is_saved = self.saved_progress.get(lane.fingerprint) == (lane.step, len(lane.evaluations))
        if is_saved or lane.state is LaneState.LEASED:
            return
        try:
            self._write_checkpoint(lane)
        except Exception as error:
            refused = isinstance(error, (OSError, SafetensorError))
            if not refused and classify_error(error) not in (Fault.DISK, Fault.MEMORY):
                raise
            if not self.has_warned:
                self.warn(f"cannot save lanes in {self.store.checkpoints}: {error}; training goes on")
            self.has_warned = True
        else:
            self.mark_saved(lane)
            self.has_warned = False

    def _write_checkpoint(self, lane: Lane) -> None:
        folder = self.store.checkpoints / lane.fingerprint
        lane_checkpoint = lane.make_checkpoint(self.engine.lane_group.adapters.frozen(lane.fingerprint))
        try:
            checkpoint.write(folder, lane_checkpoint)
        except (OSError, SafetensorError) as error:
            if not is_file_not_found(error):
                raise
            # Another trainer has ended this lane and removed the folder, which happens once at most; this
            # trainer will receive DROP for the lane.
            checkpoint.write(folder, lane_checkpoint)

    def write_record(
        self, lane: Lane, state: RecordState, reason: str = "", traceback_text: str = ""
    ) -> RecordState:
        """Write the record of a lane that ends, and discard its checkpoints if the record is final.

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
        if not self._put(self._build_record(lane, state, reason, traceback_text)):
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
        self.store.discard_checkpoints(fingerprint)
        return record.state

    def write_max_lanes(self, group_key: str, max_lanes: int, failed_lanes: int) -> None:
        """Write to the store how many lanes fit into memory.

        Args:
            group_key: The lanes' group key.
            max_lanes: Lanes that may train at once from now on.
            failed_lanes: Lanes that ran out of memory.
        """
        try:
            path = lane_capacity.write_max_lanes(
                self.store.lane_capacity, group_key, self.engine.device_key, max_lanes, failed_lanes
            )
        except OSError as error:
            outcome = f"not remembered: {error}"
        else:
            outcome = f"remembered in {path}"
        self.warn(f"out of memory with {failed_lanes} lanes, now {max_lanes} at once; {outcome}")

    def read_max_lanes(self, group_key: str, requested: int) -> int | None:
        """Return the number of lanes that fit into memory, None if no trainer has found a limit.

        Args:
            group_key: The lanes' group key.
            requested: The number that the user chose; a warning says if fewer fit.
        """
        device_key = self.engine.device_key
        max_lanes = lane_capacity.read_max_lanes(self.store.lane_capacity, group_key, device_key)
        if max_lanes is not None and max_lanes < requested:
            path = lane_capacity.capacity_file(self.store.lane_capacity, group_key, device_key)
            self.warn(
                f"at most {max_lanes} lanes at once: more ran out of memory before (remove {path} to try)"
            )
        return max_lanes

    def wait_for_space(self, reason: object) -> None:
        """Sleep for a moment because the disk is full.

        Raises:
            StoreFullError: The disk has been full for `store_full_timeout_seconds`.
        """
        now = time.monotonic()
        if self.store_full_since is None:
            self.store_full_since = now
            self.warn(f"{reason}; waiting for space up to {self.store_full_timeout_seconds:g} s")
        if now - self.store_full_since > self.store_full_timeout_seconds:
            where = self.store.checkpoints.parent
            raise StoreFullError(f"no space left on {where}; free some, then run the command again")
        time.sleep(min(1.0, self.store_full_timeout_seconds / 4))

    def _put(self, record: Record) -> bool:
        while True:
            try:
                is_written = self.store.put(record)
            except OSError as error:
                if classify_error(error) is not Fault.DISK:
                    raise
                self.wait_for_space(error)
            else:
                self.store_full_since = None
                return is_written

    def _build_record(self, lane: Lane, state: RecordState, reason: str, traceback_text: str) -> Record:
        provenance = self.provenance(
            self.engine.device_name,
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
