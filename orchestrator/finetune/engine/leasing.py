"""The leasing of lanes from the source, and the choice of parked lanes that make room for them."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from orchestrator.finetune.engine import checkpoint
from orchestrator.finetune.engine.active_lanes import NEVER, ActiveLanes
from orchestrator.finetune.engine.checkpoint import Checkpoint
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


@dataclass(frozen=True)
class LeasePlan:
    """The leases of a grant to train, and the lanes that leave for them."""

    to_start: tuple[Lease, ...] = ()
    """The leases to train."""
    evicted: tuple[str, ...] = ()
    """Fingerprints of parked lanes to save and give back."""


def plan_lease(
    occupancy: GroupOccupancy, grant: LeaseGrant, already_final: Collection[str] = ()
) -> LeasePlan:
    """Decide which leases of a grant are trained and which lanes leave for them.

    A grant of another group key, and one that requires an empty group, evicts every long-parked lane. Any
    other grant evicts only as many as it needs, the longest parked first.

    Args:
        occupancy: The lane group before the grant.
        grant: What the source has leased, at most `occupancy.capacity` lanes.
        already_final: Fingerprints in the grant that have a final record.
    """
    to_start = tuple(lease for lease in grant.leases if lease.configuration.fingerprint not in already_final)
    evicted = occupancy.long_parked
    is_same_group = all(lease.configuration.group_key == occupancy.group_key for lease in to_start)
    if is_same_group and not grant.requires_empty_group:
        evicted = evicted[: max(0, len(to_start) - occupancy.free_slots)]
    return LeasePlan(to_start, evicted)


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
            if active.rank_0_source is not None:
                active.rank_0_source.note_max_lanes(free + len(active.lanes))
            if free <= 0 and not active.slots.parked_at:
                return
            plan, self.closed, again = active.process_group.broadcast_from_rank0(self._request_leases)
            for name in plan.evicted:
                active.remove(active.lanes[name])
            for lease in plan.to_start:
                if active.count_free_slots() > 0:
                    self._start_lane(lease)
                else:  # a lane before this one ran out of memory, and the group was halved
                    active.process_group.broadcast_from_rank0(partial(active.return_lease, lease))
            again = again and bool(active.lanes)

    def _request_leases(self) -> tuple[LeasePlan, bool, bool]:
        """Request leases, plan, and give back the leases of evicted lanes. Rank 0 only.

        Returns:
            The plan; True if the source is closed; and True if the next request is due at once, because the
            first lane has set the group key.
        """
        active, now = self.active, time.monotonic()
        long_parked = tuple(active.slots.list_long_parked(now))
        occupancy = GroupOccupancy(
            tuple(active.lanes), active.group_key, active.count_free_slots(), long_parked
        )
        if occupancy.capacity <= 0 or not active.poll_interval.is_due(active.leased_at, now):
            return LeasePlan(), self.closed, False
        is_any_group_key = not occupancy.fingerprints
        grant = active.source.lease(occupancy.group_key, occupancy.capacity, active.steps_taken)
        active.leased_at = time.monotonic()
        active.poll_interval.record_answer(now, active.leased_at)
        if occupancy.fingerprints and not grant.leases and occupancy.is_all_parked:
            is_any_group_key = True
            grant = active.source.lease(None, 1, active.steps_taken)
        plan = plan_lease(occupancy, grant, self._end_final_leases(grant.leases))
        for name in plan.evicted:
            active.save_and_return_lease(active.lanes[name])
        lease_again = is_any_group_key and bool(plan.to_start)
        if lease_again:
            active.leased_at = NEVER
        return plan, grant.closed, lease_again

    def _end_final_leases(self, leases: Sequence[Lease]) -> set[str]:
        """End the leases whose configuration has a final record; return their fingerprints. Rank 0 only."""
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
        active.lanes[lane.fingerprint] = lane
        newest: list[Checkpoint] = []
        find_checkpoint = partial(self._find_checkpoint, lane.fingerprint, newest)
        path = active.process_group.broadcast_from_rank0(find_checkpoint)
        added = self.recovery.run_isolating_failures(
            [lane], partial(self._add_lane, path=path, newest=newest)
        )
        group_key = lane.configuration.group_key
        if added and group_key not in active.slots.max_lanes_by_group_key:
            active.slots.max_lanes_by_group_key[group_key] = active.process_group.broadcast_from_rank0(
                partial(
                    active.recorder.read_max_lanes, group_key, active.slots.count, active.slots.is_measured
                )
            )

    def _find_checkpoint(self, fingerprint: str, newest: list[Checkpoint]) -> Path | None:
        """Append the newest undamaged checkpoint to `newest` and return its file, if any. Rank 0 only."""
        folder, warn = self.active.recorder.store.checkpoints / fingerprint, self.active.recorder.warn
        if (found := checkpoint.read_newest(folder, warn, fingerprint)) is None:
            return None
        newest.append(found)
        return checkpoint.checkpoint_path(folder, found.attempt, found.step)

    def _add_lane(
        self, lanes: Sequence[Lane], path: Path | None, newest: Sequence[Checkpoint]
    ) -> Sequence[None]:
        """Add one lane to the engine.

        Args:
            lanes: The lane, as a sequence of one.
            path: The file of its newest checkpoint; None for a lane that starts.
            newest: That checkpoint, which rank 0 has read; empty on the other ranks, which read the file.

        Returns:
            A list with one None: `run_isolating_failures` expects one result per lane.
        """
        (lane,) = lanes
        group_key = lane.configuration.group_key
        if any(other.configuration.group_key != group_key for other in self.active.lanes.values()):
            raise RuntimeError(f"leased a lane of group key {group_key} into a lane group of another one")
        saved = None
        if path is not None:
            saved = newest[0] if newest else checkpoint.read(path)
        self.active.engine.add_lane(lane, saved)
        if saved is not None:
            self.active.recorder.mark_saved(lane)
        return [None]
