"""The lanes that a trainer holds, from their lease to their end.

This module decides how many lanes a trainer holds, asks the broker for new ones, and hands lanes back. Only
rank 0 uses it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from orchestrator.finetune.engine.engine import Engine
from orchestrator.finetune.engine.lane import Lane, LaneState
from orchestrator.finetune.engine.lane_source import Directive, LaneSource, Lease, LeaseGrant
from orchestrator.finetune.engine.recorder import LaneRecorder
from orchestrator.record.schema import RecordState
from orchestrator.util import timeouts

Work = Literal["training", "evaluation"]

NEVER = -float("inf")
"""A time before all others, on any clock."""
LATENCY_FACTOR = 20.0
"""Smallest ratio of the interval between requests to the latency of the last answer. It limits the share of
time that a trainer waits for answers: all trainers ask one broker."""
MAX_SLOWDOWN = 20.0
"""Largest ratio of the interval between requests to SOURCE_POLL_SECONDS. It limits the delay of a stop."""
MIN_USEFUL_LANES = 2
"""Number of lanes that a trainer holds if they fit, however many tokens they have."""
SATURATING_TOKENS = 9_000
"""Number of tokens in one forward pass up to which more lanes save time on a GPU, because lanes share the
time in which the host launches kernels. For Qwen3-0.6B and 2,000 tokens a lane, the default study's steps are
predicted to take 41.9, 28.2 and 20.8 hours of an H200 with 1, 2 and 4 lanes (24.8, 17.0 and 12.6 with fused
kernels); 8 lanes save nothing more. The number leaves room for rows that are a little longer."""


@dataclass
class LaneSlots:
    """The slots of a trainer: the limit of all lanes, the limits of group keys, and the parked lanes."""

    count: int
    """The largest number of lanes."""
    is_automatic: bool = False
    """If true, lanes are added only while this raises the throughput; see `SATURATING_TOKENS`."""
    limits: dict[tuple[Work, str], int] = field(default_factory=dict)
    """(work, group key) -> lanes of this group key that fit into memory, as far as this trainer knows.

    An evaluation needs other memory than training: answers are generated with a cache of all their tokens."""
    parked_at: dict[str, float] = field(default_factory=dict)
    """Fingerprint -> time since which the lane has been parked, in the order of parking."""

    def limit(self, work: Work, group_key: str | None) -> int:
        """Return how many lanes of a group key may do this work at once."""
        return min(self.count, self.limits.get((work, group_key or ""), self.count))

    def count_useful(self, tokens: int) -> int:
        """Return with how many lanes, at most `count`, the trainer takes the most steps a second.

        Memory may hold fewer.

        Args:
            tokens: Mean number of tokens in a micro-batch of one lane. Used only with `is_automatic`.
        """
        enough = max(MIN_USEFUL_LANES, SATURATING_TOKENS // max(1, tokens))
        return min(self.count, enough) if self.is_automatic else self.count


@dataclass(frozen=True)
class GroupOccupancy:
    """The occupancy of a lane group, from which the leases and the lanes that make room are decided."""

    fingerprints: tuple[str, ...] = ()
    """The lanes of the group."""
    group_key: str | None = None
    """The group key of these lanes; None when there is no lane."""
    free_slots: int = 1
    """The number of lanes that the group can take in addition."""
    long_parked: tuple[str, ...] = ()
    """The lanes that may make room, the longest parked first."""

    @property
    def capacity(self) -> int:
        """The number of lanes to ask for.

        An empty group asks for one lane: the group key of the first lane decides how many fit.
        """
        return self.free_slots + len(self.long_parked) if self.fingerprints else 1

    @property
    def is_all_parked(self) -> bool:
        """Whether every lane of the group may make room."""
        return len(self.long_parked) == len(self.fingerprints)

    def choose_evicted(self, grant: LeaseGrant, to_start: Sequence[Lease]) -> tuple[str, ...]:
        """Return the lanes that leave for the leases of a grant.

        A grant of another group key, and one that requires an empty group, evicts every long-parked lane. Any
        other grant evicts only as many as it needs, the longest parked first.

        Args:
            grant: What the source has leased, at most `capacity` lanes.
            to_start: Its leases without those that have a final record.
        """
        is_same_group = all(lease.configuration.group_key == self.group_key for lease in to_start)
        if is_same_group and not grant.requires_empty_group:
            return self.long_parked[: max(0, len(to_start) - self.free_slots)]
        return self.long_parked


@dataclass
class ActiveLanes:
    """The lanes that this trainer holds, with the objects that act on them."""

    source: LaneSource
    engine: Engine
    recorder: LaneRecorder
    slots: LaneSlots
    closed: bool = False
    """If true, the source has said that no lane waits and none will come."""
    latency: float = 0.0
    """Seconds that the source took for its last answer."""
    steps_taken: int = 0
    """Optimizer steps of all lanes since the loop began."""
    leased_at: float = NEVER
    """The time of the last lease request; `NEVER` makes the next request due at once."""

    @property
    def lanes(self) -> dict[str, Lane]:
        """Fingerprint -> lane, in the order in which they were leased."""
        return self.engine.lanes

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
        """Return whether the source may be asked again. All times are seconds of `time.monotonic`."""
        shortest = timeouts.SOURCE_POLL_SECONDS
        interval = max(shortest, min(LATENCY_FACTOR * self.latency, MAX_SLOWDOWN * shortest))
        return now - last_answered_at >= interval

    def request_leases(self) -> tuple[Sequence[Lease], bool]:
        """Request leases from the source, if a request is due, and give back parked lanes that make room.

        Returns:
            The leases to start; and whether to request again at once. That is so after the first lane of a
            group, whose group key decides how many more lanes fit.
        """
        now, parked = time.monotonic(), self.slots.parked_at
        long_parked = tuple(name for name, since in parked.items() if now - since > timeouts.SPILL_SECONDS)
        occupancy = GroupOccupancy(tuple(self.lanes), self.group_key, self.count_free_slots(), long_parked)
        if occupancy.capacity <= 0 or not self.is_request_due(self.leased_at, now):
            return (), False
        is_any_group_key = not occupancy.fingerprints
        grant = self.source.lease(occupancy.group_key, occupancy.capacity, self.steps_taken)
        self.leased_at = time.monotonic()
        self.latency = self.leased_at - now
        if occupancy.fingerprints and not grant.leases and occupancy.is_all_parked:
            is_any_group_key = True
            grant = self.source.lease(None, 1, self.steps_taken)
        self.closed = grant.closed
        to_start = [lease for lease in grant.leases if not self._end_if_recorded(lease)]
        for name in occupancy.choose_evicted(grant, to_start):
            self.give_back(self.lanes[name])
        lease_again = is_any_group_key and bool(to_start)
        if lease_again:
            self.leased_at = NEVER
        return to_start, lease_again

    def _end_if_recorded(self, lease: Lease) -> bool:
        """End a lease whose configuration has a final record already; return whether it has one."""
        fingerprint = lease.configuration.fingerprint
        state = self.recorder.find_final_state(fingerprint)
        if state is not None:
            self.source.end_lease(fingerprint, lease.attempt, state)
            self.leased_at = NEVER
        return state is not None

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
        """Remove the lane from the model. Its slot is free from then on."""
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
        self.source.return_lease(lane.fingerprint, lane.lease.attempt)
        self.remove(lane)
