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
from orchestrator.finetune.engine.engine import Workshop
from orchestrator.finetune.engine.lane import Lane
from orchestrator.finetune.engine.lane_state import Phase
from orchestrator.finetune.failures import Fault, StoreFull, fault_of, is_gone
from orchestrator.record import lane_capacity
from orchestrator.record.schema import Provenance, Record, State

log = logging.getLogger(__name__)

FINAL = ("finished", "diverged")


class Keeper(Protocol):
    """What the loop needs of the store."""

    checkpoints: Path
    adapters: Path
    evidence: Path
    data: Path
    limits: Path

    def put(self, record: Record) -> bool: ...

    def get(self, fingerprint: str) -> Record | None: ...

    def discard_checkpoints(self, fingerprint: str) -> None: ...


@dataclass
class Books:
    """Rank 0's: writes what is to be kept of the lanes, as far as there is space for it.

    A checkpoint that cannot be written is left out: the lane trains on and is saved the next time. A record
    that finds no space is tried again for `patience` seconds; then StoreFull is raised.
    """

    store: Keeper
    workshop: Workshop
    provenance: Callable[..., Provenance]
    """As in `loop.run`."""
    workers: int
    patience: float
    say: Callable[[str], None]
    """Shows a line to the people who watch the study."""
    saved: dict[str, tuple[int, int]] = field(default_factory=dict)
    """What a lane's newest checkpoint holds: steps, evaluations."""
    warned: bool = False
    full_since: float | None = None

    def warn(self, line: str) -> None:
        """Write `line` to this process's log and show it to the people who watch the study."""
        log.warning("%s", line)
        self.say(line)

    def opened(self, lane: Lane) -> None:
        """It goes on from its newest checkpoint."""
        self.saved[lane.name] = (lane.step, len(lane.evaluations))

    def left(self, lane: Lane) -> None:
        self.saved.pop(lane.name, None)

    def save(self, lane: Lane) -> None:
        """Unless its newest checkpoint says the same, or it has yet to begin."""
        if lane.at_end:  # its last scores count with their items, which are not saved: all are due again
            lane.evaluations = [e for e in lane.evaluations if e.step < lane.step]
        what = (lane.step, len(lane.evaluations))
        if lane.phase is Phase.LEASED or self.saved.get(lane.name) == what:
            return
        try:
            self._write(lane)
        except Exception as error:
            refused = isinstance(error, (OSError, SafetensorError))
            if not refused and fault_of(error) not in (Fault.DISK, Fault.MEMORY):
                raise
            if not self.warned:
                self.warn(f"cannot save lanes in {self.store.checkpoints}: {error}; training goes on")
            self.warned = True
        else:
            self.saved[lane.name], self.warned = what, False

    def _write(self, lane: Lane) -> None:
        folder = self.store.checkpoints / lane.name
        saved = lane.checkpoint(self.workshop.current.adapters.frozen(lane.name))
        try:
            checkpoint.write(folder, saved)
        except (OSError, SafetensorError) as error:
            if not is_gone(error):
                raise
            # Whoever has ended this lane elsewhere removed the folder: once, and this lane hears of it soon.
            checkpoint.write(folder, saved)

    def record(self, lane: Lane, state: State, reason: str = "", trace: str = "") -> State:
        """Writes the lane's record. Returns the state of the one that counts: somebody else's final one may
        have been there first."""
        if state == "stopped":
            self.save(lane)
        if not self._put(record_of(lane, state, self.workshop, self.provenance, self.workers, reason, trace)):
            first = self.store.get(lane.name)
            state = first.state if first is not None else state
        if state in FINAL:
            self.store.discard_checkpoints(lane.name)
        return state

    def known(self, fingerprint: str) -> State | None:
        """The state of its final record, if it has one. Then its checkpoints go: whoever wrote the record, or
        trained the lane beside its writer, may have left some."""
        record = self.store.get(fingerprint)
        if record is None or record.state not in FINAL:
            return None
        self.store.discard_checkpoints(fingerprint)
        return record.state

    def remember(self, shape: str, lanes: int, tried: int) -> None:
        """No more than `lanes` of this shape at once from now on: `tried` found no memory."""
        try:
            path = lane_capacity.remember(self.store.limits, shape, self.workshop.place, lanes, tried)
        except OSError as error:
            kept = f"not remembered: {error}"
        else:
            kept = f"remembered in {path}"
        self.warn(f"out of memory with {tried} lanes, now {lanes} at once; {kept}")

    def most_lanes(self, shape: str, told: int) -> int | None:
        """That there is memory for, if that is known; says so where it is less than the seat was `told`."""
        place = self.workshop.place
        most = lane_capacity.most_lanes(self.store.limits, shape, place)
        if most is not None and most < told:
            path = lane_capacity.file_of(self.store.limits, shape, place)
            self.warn(f"at most {most} lanes at once: more had no memory before (remove {path} to try)")
        return most

    def wait_for_space(self, why: object) -> None:
        """Raises StoreFull when it has waited for long."""
        now = time.monotonic()
        if self.full_since is None:
            self.full_since = now
            self.warn(f"{why}; waiting for space up to {self.patience:g} s")
        if now - self.full_since > self.patience:
            where = self.store.checkpoints.parent
            raise StoreFull(f"no space left on {where}; free some, then run the command again")
        time.sleep(min(1.0, self.patience / 4))

    def _put(self, record: Record) -> bool:
        while True:
            try:
                won = self.store.put(record)
            except OSError as error:
                if fault_of(error) is not Fault.DISK:
                    raise
                self.wait_for_space(error)
            else:
                self.full_since = None
                return won


def record_of(
    lane: Lane,
    state: State,
    workshop: Workshop,
    provenance: Callable[..., Provenance],
    workers: int = 1,
    reason: str = "",
    trace: str = "",
) -> Record:
    """`provenance` as in `loop.run`."""
    return Record(
        fingerprint=lane.name,
        configuration=lane.configuration,
        state=state,
        steps=lane.step,
        reason=reason,
        traceback=trace,
        curve=tuple(lane.curve),
        evaluations=tuple(lane.evaluations),
        untrained=workshop.current.data.untrained if workshop.is_open else {},
        items=lane.items,
        cost=lane.cost,
        provenance=provenance(
            workshop.device,
            pack_lanes=lane.pack_lanes,
            workers=workers,
            attempt=lane.lease.attempt,
            resumed_from=lane.resumed_from,
            started=lane.started,
            ended=time.time(),
        ),
        scheduler=lane.lease.scheduler if state == "stopped" else "",
        stopped_at=lane.told if state == "stopped" else None,
    )
