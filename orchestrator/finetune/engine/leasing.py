"""The leasing of lanes from the source, and the choice of parked lanes that make room for them."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from orchestrator.finetune.engine import tensor_files
from orchestrator.finetune.engine.active_lanes import NEVER, ActiveLanes
from orchestrator.finetune.engine.lane import Lane
from orchestrator.finetune.engine.lane_source import Lease, LeaseGrant
from orchestrator.finetune.engine.recovery import FailureRecovery


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
class LaneLeasing:
    """A part of the loop that leases lanes from the source for the free slots of a trainer."""

    active: ActiveLanes
    recovery: FailureRecovery
    closed: bool = False
    """If true, the source has said that no lane waits and none will come."""

    def lease_lanes(self) -> None:
        """Lease lanes if there is room: at once after a lane has left, else at the poll interval."""
        active, again = self.active, True
        while again:
            free = active.count_free_slots()  # the first lane may change it
            active.source.note_max_lanes(free + len(active.lanes))
            if free <= 0 and not active.slots.parked_at:
                return
            to_start, again = self._request_leases()
            for lease in to_start:
                if active.count_free_slots() > 0:
                    self._start_lane(lease)
                else:  # a lane before this one ran out of memory, and the group was halved
                    active.return_lease(lease)
            again = again and bool(active.lanes)

    def _request_leases(self) -> tuple[Sequence[Lease], bool]:
        """Request leases, and give back the leases of the lanes that leave for them.

        Returns:
            The leases to start; and True if the next request is due at once, because the first lane sets the
            group key.
        """
        active, now = self.active, time.monotonic()
        long_parked = tuple(active.slots.list_long_parked(now))
        occupancy = GroupOccupancy(
            tuple(active.lanes), active.group_key, active.count_free_slots(), long_parked
        )
        if occupancy.capacity <= 0 or not active.is_request_due(active.leased_at, now):
            return (), False
        is_any_group_key = not occupancy.fingerprints
        grant = active.source.lease(occupancy.group_key, occupancy.capacity, active.steps_taken)
        active.leased_at = time.monotonic()
        active.latency = active.leased_at - now
        if occupancy.fingerprints and not grant.leases and occupancy.is_all_parked:
            is_any_group_key = True
            grant = active.source.lease(None, 1, active.steps_taken)
        self.closed = grant.closed
        final = self._end_final_leases(grant.leases)
        to_start = [lease for lease in grant.leases if lease.configuration.fingerprint not in final]
        for name in occupancy.choose_evicted(grant, to_start):
            active.give_back(active.lanes[name])
        lease_again = is_any_group_key and bool(to_start)
        if lease_again:
            active.leased_at = NEVER
        return to_start, lease_again

    def _end_final_leases(self, leases: Sequence[Lease]) -> Collection[str]:
        """End the leases whose configuration has a final record, and return their fingerprints."""
        final = set()
        for lease in leases:
            fingerprint = lease.configuration.fingerprint
            if (state := self.active.recorder.find_final_state(fingerprint)) is not None:
                self.active.source.end_lease(fingerprint, lease.attempt, state)
                self.active.leased_at = NEVER
                final.add(fingerprint)
        return final

    def _start_lane(self, lease: Lease) -> None:
        """Put a leased lane on the model, resumed from its newest checkpoint if there is one."""
        active, lane = self.active, Lane(lease)
        group_key = lane.configuration.group_key
        active.lanes[lane.fingerprint] = lane
        recorder, slots = active.recorder, active.slots
        checkpoints = recorder.store.checkpoints / lane.fingerprint
        checkpoint = tensor_files.find_newest(checkpoints, recorder.warn, lane.fingerprint)
        if not self.recovery.run_isolating_failures([lane], partial(self._add_lane, checkpoint=checkpoint)):
            return
        lane.enter_next_state()
        if ("training", group_key) not in slots.limits:
            found = recorder.read_limits(group_key, slots.count)
            tokens = active.engine.lane_group.count_tokens(lane.configuration) if slots.is_automatic else 0
            useful = slots.useful(tokens)
            slots.limits["training", group_key] = min(found.get("training", useful), useful)
            slots.limits["evaluation", group_key] = found.get("evaluation", slots.count)

    def _add_lane(self, fingerprints: Sequence[str], checkpoint: Path | None) -> Sequence[None]:
        """Add one lane to the engine; return a list with one None, its result.

        Args:
            fingerprints: The lane, as a sequence of one.
            checkpoint: The file of its newest checkpoint; None for a lane that starts.
        """
        lane = self.active.lanes[fingerprints[0]]
        group_key = lane.configuration.group_key
        if any(other.configuration.group_key != group_key for other in self.active.lanes.values()):
            raise RuntimeError(f"leased a lane of group key {group_key} into a lane group of another one")
        self.active.engine.add_lane(lane, checkpoint)
        if checkpoint is not None:
            self.active.recorder.mark_saved(lane)
        return [None]
