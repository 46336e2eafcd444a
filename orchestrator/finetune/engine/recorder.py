"""What becomes of a lane, its checkpoints and its record, and what the loop needs of the store for that."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from safetensors import SafetensorError

from orchestrator.finetune.engine import checkpoint
from orchestrator.finetune.engine.engine import Engine
from orchestrator.finetune.engine.lane import Lane
from orchestrator.finetune.engine.lane_state import LaneState
from orchestrator.finetune.failures import Fault, StoreFullError, classify_error, is_file_not_found
from orchestrator.record import lane_capacity
from orchestrator.record.schema import Provenance, Record, RecordState

log = logging.getLogger(__name__)

FINAL_STATES = ("finished", "diverged")


class LaneStore(Protocol):
    """What the loop needs of the store."""

    checkpoints: Path
    adapters: Path
    calibration: Path
    data: Path
    lane_capacity: Path

    def put(self, record: Record) -> bool: ...

    def get(self, fingerprint: str) -> Record | None: ...

    def discard_checkpoints(self, fingerprint: str) -> None: ...


@dataclass
class LaneRecorder:
    """Rank 0's: writes what is to be kept of the lanes, as far as there is space for it.

    A checkpoint that cannot be written is left out: the lane trains on and is saved the next time. A record
    that finds no space is tried again for `patience` seconds; then StoreFull is raised.
    """

    store: LaneStore
    engine: Engine
    provenance: Callable[..., Provenance]
    """As in `loop.run`."""
    workers: int
    store_full_timeout_seconds: float
    notify: Callable[[str], None]
    """Shows a line to the people who watch the study."""
    saved_progress: dict[str, tuple[int, int]] = field(default_factory=dict)
    """What a lane's newest checkpoint holds: steps, evaluations."""
    has_warned: bool = False
    store_full_since: float | None = None

    def warn(self, line: str) -> None:
        """Write `line` to this process's log and show it to the people who watch the study."""
        log.warning("%s", line)
        self.notify(line)

    def mark_restored(self, lane: Lane) -> None:
        """It goes on from its newest checkpoint."""
        self.saved_progress[lane.fingerprint] = (lane.step, len(lane.evaluations))

    def forget(self, lane: Lane) -> None:
        self.saved_progress.pop(lane.fingerprint, None)

    def save_checkpoint(self, lane: Lane) -> None:
        """Unless its newest checkpoint says the same, or it has yet to begin."""
        if (
            lane.is_at_last_step
        ):  # its last scores count with their items, which are not saved: all are due again
            lane.evaluations = [e for e in lane.evaluations if e.step < lane.step]
        progress = (lane.step, len(lane.evaluations))
        if lane.state is LaneState.LEASED or self.saved_progress.get(lane.fingerprint) == progress:
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
            self.saved_progress[lane.fingerprint], self.has_warned = progress, False

    def _write_checkpoint(self, lane: Lane) -> None:
        folder = self.store.checkpoints / lane.fingerprint
        lane_checkpoint = lane.make_checkpoint(self.engine.lane_group.adapters.frozen(lane.fingerprint))
        try:
            checkpoint.write(folder, lane_checkpoint)
        except (OSError, SafetensorError) as error:
            if not is_file_not_found(error):
                raise
            # Whoever has ended this lane elsewhere removed the folder: once, and this lane hears of it soon.
            checkpoint.write(folder, lane_checkpoint)

    def write_record(
        self, lane: Lane, state: RecordState, reason: str = "", traceback_text: str = ""
    ) -> RecordState:
        """Writes the lane's record. Returns the state of the one that counts: somebody else's final one may
        have been there first."""
        if state == "stopped":
            self.save_checkpoint(lane)
        if not self._put(
            build_record(lane, state, self.engine, self.provenance, self.workers, reason, traceback_text)
        ):
            existing = self.store.get(lane.fingerprint)
            state = existing.state if existing is not None else state
        if state in FINAL_STATES:
            self.store.discard_checkpoints(lane.fingerprint)
        return state

    def find_final_state(self, fingerprint: str) -> RecordState | None:
        """The state of its final record, if it has one. Then its checkpoints go: whoever wrote the record, or
        trained the lane beside its writer, may have left some."""
        record = self.store.get(fingerprint)
        if record is None or record.state not in FINAL_STATES:
            return None
        self.store.discard_checkpoints(fingerprint)
        return record.state

    def write_max_lanes(self, group_key: str, max_lanes: int, failed_lanes: int) -> None:
        """No more than `lanes` of this shape at once from now on: `tried` found no memory."""
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
        """That there is memory for, if that is known; says so where it is less than the seat was `told`."""
        device_key = self.engine.device_key
        max_lanes = lane_capacity.read_max_lanes(self.store.lane_capacity, group_key, device_key)
        if max_lanes is not None and max_lanes < requested:
            path = lane_capacity.capacity_file(self.store.lane_capacity, group_key, device_key)
            self.warn(f"at most {max_lanes} lanes at once: more had no memory before (remove {path} to try)")
        return max_lanes

    def wait_for_space(self, reason: object) -> None:
        """Raises StoreFull when it has waited for long."""
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


def build_record(
    lane: Lane,
    state: RecordState,
    engine: Engine,
    provenance: Callable[..., Provenance],
    workers: int = 1,
    reason: str = "",
    traceback_text: str = "",
) -> Record:
    """`provenance` as in `loop.run`."""
    return Record(
        fingerprint=lane.fingerprint,
        configuration=lane.configuration,
        state=state,
        steps=lane.step,
        reason=reason,
        traceback=traceback_text,
        curve=tuple(lane.curve),
        evaluations=tuple(lane.evaluations),
        untrained=engine.lane_group.data.untrained if engine.has_lane_group else {},
        items=lane.items,
        cost=lane.cost,
        provenance=provenance(
            engine.device_name,
            pack_lanes=lane.peak_group_size,
            workers=workers,
            attempt=lane.lease.attempt,
            resumed_from=lane.resumed_from,
            started=lane.started,
            ended=time.time(),
        ),
        scheduler=lane.lease.scheduler if state == "stopped" else "",
        stopped_at=lane.last_reported_step if state == "stopped" else None,
    )
