"""Write lanes' checkpoints, adapters and records to the store."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError

from orchestrator.finetune.engine import tensor_files
from orchestrator.finetune.engine.engine import Engine
from orchestrator.finetune.engine.lane import Lane, LaneState
from orchestrator.finetune.failures import Fault, StoreFullError, classify_error
from orchestrator.record.schema import FINAL_STATES, Record, RecordState, current_provenance
from orchestrator.record.store import Store, adapter_file_name
from orchestrator.util import timeouts

log = logging.getLogger(__name__)

MAX_WRITE_SHARE = 0.0025
"""Largest share of a trainer's time for regular checkpoints: network file systems charge for them."""


@dataclass
class LaneRecorder:
    """The writer of lanes' checkpoints, adapters and records to the store. Used on rank 0 only.

    If a checkpoint cannot be written, the lane trains on, and a later attempt saves it. An adapter that
    cannot be written is left out. If the disk is full, the adapter of the lane is deleted, and its record is
    written again, for up to STORE_FULL_SECONDS; then StoreFullError is raised.
    """

    store: Store
    engine: Engine
    notify: Callable[[str], None]
    """Shows a line to the users who watch the study."""
    adapters: Path | None = None
    """The folder for the adapters of finished lanes; None to write none."""
    write_seconds: float = 0.0
    """Duration of the last write of a checkpoint."""
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

    # -- checkpoints ------------------------------------------------------------------------------------

    def mark_saved(self, lane: Lane) -> None:
        """Note that the lane equals its newest checkpoint, so that it is not written again."""
        self.saved_progress[lane.fingerprint] = (lane.step, len(lane.evaluations))

    def is_due(self, lane: Lane) -> bool:
        """Return whether the interval has passed since the lane's start or last checkpoint.

        The interval is MIN_CHECKPOINT_SECONDS, or up to MAX_CHECKPOINT_SECONDS where writes would otherwise
        take more than MAX_WRITE_SHARE of the time. A lane's first checkpoint comes after the shortest
        interval: a study whose trainers die often makes progress.
        """
        interval = timeouts.MIN_CHECKPOINT_SECONDS
        if lane.fingerprint in self.saved_progress:
            needed = len(self.engine.lanes) * self.write_seconds / MAX_WRITE_SHARE
            interval = min(max(interval, needed), timeouts.MAX_CHECKPOINT_SECONDS)
        return time.monotonic() - lane.saved_at >= interval

    def save_due_checkpoint(self, lanes: Sequence[Lane]) -> None:
        """Save the lane with the oldest checkpoint among those that are due."""
        if due := [lane for lane in lanes if self.is_due(lane)]:
            self.save_checkpoint(min(due, key=lambda lane: lane.saved_at))

    def save_checkpoint(self, lane: Lane) -> None:
        """Write a checkpoint of the lane, unless its newest one is equal or the lane has not started.

        If it cannot be written, warn once until one is written again.

        Raises:
            Exception: Neither the disk nor a lack of memory is the cause of an error.
        """
        if lane.is_at_last_step:
            # A record needs the results per item with these scores, and a checkpoint does not hold them. The
            # lane is evaluated again when it resumes.
            lane.evaluations = [e for e in lane.evaluations if e.step < lane.step]
        progress = (lane.step, len(lane.evaluations))
        if self.saved_progress.get(lane.fingerprint) == progress or lane.state is LaneState.LEASED:
            return
        started = time.monotonic()
        try:
            checkpoint = lane.make_checkpoint(self.engine.lane_group.adapters.frozen(lane.fingerprint))
            tensor_files.write_checkpoint(self.store.checkpoints / lane.fingerprint, checkpoint)
        except Exception as error:
            refused = isinstance(error, (OSError, SafetensorError))
            if not refused and classify_error(error) not in (Fault.DISK, Fault.MEMORY):
                raise
            if not self.has_warned:
                self.warn(f"cannot save lanes in {self.store.checkpoints}: {error}; training goes on")
            self.has_warned = True
        else:
            self.saved_progress[lane.fingerprint] = progress
            self.write_seconds, self.has_warned = time.monotonic() - started, False

    # -- the end of a lane ------------------------------------------------------------------------------

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
        record = Record(
            fingerprint=lane.fingerprint,
            configuration=lane.configuration,
            state=state,
            steps=lane.step,
            reason=reason,
            traceback=traceback_text,
            curve=tuple(lane.curve),
            evaluations=tuple(lane.evaluations),
            baseline_scores=self.engine.untrained_scores,
            items=lane.items,
            cost=lane.cost,
            provenance=provenance,
            stopping_settings=lane.lease.scheduler if state == "stopped" else "",
            stopped_at=lane.last_reported_step if state == "stopped" else None,
        )
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
        self.store.discard_checkpoints(fingerprint)
        return record.state

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
            tensor_files.write_adapter(path, self.engine.lane_group.adapters, record.fingerprint)
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
