"""The lanes that a trainer trains, and the ways in which one of them leaves."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

from orchestrator.finetune.engine.engine import Engine
from orchestrator.finetune.engine.lane import Lane
from orchestrator.finetune.engine.lane_source import Directive, LaneSource, Lease
from orchestrator.finetune.engine.lane_state import LaneState
from orchestrator.finetune.engine.recorder import LaneRecorder
from orchestrator.finetune.engine.slots import LaneSlots
from orchestrator.finetune.process_group import ProcessGroup
from orchestrator.record.schema import RecordState
from orchestrator.util import timeouts

NEVER = -float("inf")
"""A time before all others, on any clock."""
LATENCY_FACTOR = 20.0
"""Smallest ratio of the interval between requests to the latency of the last answer. It limits the share of
time that a trainer waits for answers."""
MAX_SLOWDOWN = 20.0
"""Largest ratio of the interval between requests to SOURCE_POLL_SECONDS. It limits the delay of a stop."""


@dataclass
class PollInterval:
    """The interval between two requests to the source; times in seconds.

    It grows with the latency of the answers: all trainers ask one broker.
    """

    last_latency: float = 0.0
    """The latency of the last answer."""

    def record_answer(self, sent_at: float, now: float) -> None:
        """Note that a request sent at `sent_at` was answered at `now`."""
        self.last_latency = now - sent_at

    def is_due(self, last_answered_at: float, now: float) -> bool:
        """Return whether a new request is due."""
        shortest = timeouts.SOURCE_POLL_SECONDS
        backoff = min(LATENCY_FACTOR * self.last_latency, MAX_SLOWDOWN * shortest)
        return now - last_answered_at >= max(shortest, backoff)


@dataclass
class ActiveLanes:
    """The lanes that this trainer holds, with the objects that act on them.

    Every worker of the trainer has an instance, and all instances hold the same lanes. A method whose
    docstring says "Rank 0 only" runs inside `ProcessGroup.broadcast_from_rank0`.
    """

    rank_0_source: LaneSource | None
    """The source of lanes; None on the other ranks."""
    engine: Engine
    recorder: LaneRecorder
    process_group: ProcessGroup
    slots: LaneSlots
    poll_interval: PollInterval = field(default_factory=PollInterval)
    lanes: dict[str, Lane] = field(default_factory=dict)
    """Fingerprint -> lane, in the order in which they were leased."""
    steps_taken: int = 0
    """Optimizer steps of all lanes since the loop began."""
    leased_at: float = NEVER
    """The time of the last lease request; `NEVER` makes the next request due at once."""

    @property
    def source(self) -> LaneSource:
        """The source of lanes. Rank 0 only."""
        assert self.rank_0_source is not None, "only rank 0 uses the source"
        return self.rank_0_source

    @property
    def group_key(self) -> str | None:
        """The group key of the lanes; None when there is no lane."""
        return next((lane.configuration.group_key for lane in self.lanes.values()), None)

    def count_free_slots(self) -> int:
        """Return how many more lanes this trainer can hold."""
        return min(self.slots.limit(self.group_key), self.engine.max_lanes) - len(self.lanes)

    def in_state(self, state: LaneState) -> list[Lane]:
        """Return the lanes in `state`, in the order in which they were leased."""
        return [lane for lane in self.lanes.values() if lane.state is state]

    def end(self, lane: Lane, state: RecordState, reason: str = "", traceback_text: str = "") -> None:
        """Write the lane's record, report its end to the source, and remove it.

        Args:
            lane: The lane.
            state: The state of its record.
            reason: Why it ended, in one line.
            traceback_text: The traceback of a failed lane.
        """
        self.process_group.broadcast_from_rank0(
            partial(self._record_end, lane, state, reason, traceback_text)
        )
        self.remove(lane)

    def remove(self, lane: Lane) -> None:
        """Take the lane off the model; its slot can be leased again at once."""
        lane.transition_to(LaneState.ENDED)
        self.recorder.finish_write(lane.fingerprint)
        del self.lanes[lane.fingerprint]
        self.slots.parked_at.pop(lane.fingerprint, None)
        self.recorder.saved_progress.pop(lane.fingerprint, None)
        self.engine.remove_lane(lane.fingerprint)
        self.leased_at = NEVER

    def save_and_return_lease(self, lane: Lane) -> None:
        """Save the lane's checkpoint and give its lease back to the source. Rank 0 only.

        The next trainer that leases the configuration resumes here. If the checkpoint cannot be written, it
        resumes from the one before, at most one checkpoint interval earlier.
        """
        self.recorder.save_checkpoint(lane)
        self.return_lease(lane.lease)

    def return_lease(self, lease: Lease) -> None:
        """Give a lease back to the source without saving its lane. Rank 0 only."""
        self.recorder.finish_write(lease.configuration.fingerprint)
        self.source.return_lease(lease.configuration.fingerprint, lease.attempt)

    def _record_end(self, lane: Lane, state: RecordState, reason: str, traceback_text: str) -> None:
        """Write the record, then send the last report of a finished lane, then end the lease. Rank 0 only."""
        state = self.recorder.write_record(lane, state, reason, traceback_text)
        directives = (
            [self.source.report(report) for report in lane.pending_reports] if state == "finished" else []
        )
        if Directive.DROP not in directives:
            self.source.end_lease(lane.fingerprint, lane.lease.attempt, state)
