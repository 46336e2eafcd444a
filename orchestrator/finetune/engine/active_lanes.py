"""The lanes that a trainer trains, and the ways in which one of them leaves. Used on rank 0 only."""

from __future__ import annotations

from dataclasses import dataclass, field

from orchestrator.finetune.engine.engine import Engine
from orchestrator.finetune.engine.lane import Lane, LaneState
from orchestrator.finetune.engine.lane_source import Directive, LaneSource, Lease
from orchestrator.finetune.engine.recorder import LaneRecorder
from orchestrator.finetune.engine.slots import LaneSlots
from orchestrator.record.schema import RecordState
from orchestrator.util import timeouts

NEVER = -float("inf")
"""A time before all others, on any clock."""
LATENCY_FACTOR = 20.0
"""Smallest ratio of the interval between requests to the latency of the last answer. It limits the share of
time that a trainer waits for answers: all trainers ask one broker."""
MAX_SLOWDOWN = 20.0
"""Largest ratio of the interval between requests to SOURCE_POLL_SECONDS. It limits the delay of a stop."""


@dataclass
class ActiveLanes:
    """The lanes that this trainer holds, with the objects that act on them."""

    source: LaneSource
    engine: Engine
    recorder: LaneRecorder
    slots: LaneSlots
    latency: float = 0.0
    """Seconds that the source took for its last answer."""
    steps_taken: int = 0
    """Optimizer steps of all lanes since the loop began."""
    leased_at: float = NEVER
    """The time of the last lease request; `NEVER` makes the next request due at once."""
    lanes: dict[str, Lane] = field(init=False)
    """Fingerprint -> lane, in the order in which they were leased."""

    def __post_init__(self) -> None:
        self.lanes = self.engine.lanes

    @property
    def group_key(self) -> str | None:
        """The group key of the lanes; None when there is no lane."""
        return next((lane.configuration.group_key for lane in self.lanes.values()), None)

    def count_free_slots(self) -> int:
        """Return how many more lanes this trainer can hold."""
        return min(self.slots.limit("training", self.group_key), self.engine.max_lanes) - len(self.lanes)

    def in_state(self, *states: LaneState) -> list[Lane]:
        """Return the lanes in one of the states, in the order in which they were leased."""
        return [lane for lane in self.lanes.values() if lane.state in states]

    def is_request_due(self, last_answered_at: float, now: float) -> bool:
        """Return whether the source may be asked again; times in seconds of `time.monotonic`."""
        shortest = timeouts.SOURCE_POLL_SECONDS
        interval = max(shortest, min(LATENCY_FACTOR * self.latency, MAX_SLOWDOWN * shortest))
        return now - last_answered_at >= interval

    def end(self, lane: Lane, state: RecordState, reason: str = "", traceback_text: str = "") -> None:
        """Write the lane's record, report its end to the source, and remove it.

        Args:
            lane: The lane.
            state: The state of its record.
            reason: Why it ended, in one line.
            traceback_text: The traceback of a failed lane.
        """
        state = self.recorder.write_record(lane, state, reason, traceback_text)
        directives = (
            [self.source.report(report) for report in lane.pending_reports] if state == "finished" else []
        )
        if Directive.DROP not in directives:
            self.source.end_lease(lane.fingerprint, lane.lease.attempt, state)
        self.remove(lane)

    def remove(self, lane: Lane) -> None:
        """Take the lane off the model; its slot can be leased again at once."""
        lane.transition_to(LaneState.ENDED)
        self.slots.parked_at.pop(lane.fingerprint, None)
        self.recorder.saved_progress.pop(lane.fingerprint, None)
        self.engine.remove_lane(lane.fingerprint)
        self.leased_at = NEVER

    def give_back(self, lane: Lane, save: bool = True) -> None:
        """Give the lane's lease back to the source, and remove the lane.

        The next trainer that leases the configuration resumes from its newest checkpoint.

        Args:
            lane: The lane.
            save: Whether to save a checkpoint first. If that cannot be written, the one before counts.
        """
        if save:
            self.recorder.save_checkpoint(lane)
        self.return_lease(lane.lease)
        self.remove(lane)

    def return_lease(self, lease: Lease) -> None:
        """Give a lease back to the source."""
        self.source.return_lease(lease.configuration.fingerprint, lease.attempt)
