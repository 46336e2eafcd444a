"""Leases new lanes from the source, and decides which parked lanes make room for them."""

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
    """The facts about the lane group that decide how many lanes are leased and which ones make room."""

    fingerprints: tuple[str, ...] = ()
    """All lanes of the group."""
    group_key: str | None = None
    """The group key of these lanes; None when there is no lane."""
    free_slots: int = 1
    """Lanes that the group can take in addition."""
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
        """Return whether every lane of the group may make room."""
        return len(self.long_parked) == len(self.fingerprints)


@dataclass(frozen=True)
class LeasePlan:
    """What to do with a grant."""

    to_start: tuple[Lease, ...] = ()
    """The leases to train."""
    replaced: tuple[str, ...] = ()
    """Lanes that were leased again to this trainer: the newer lease replaces the lane."""
    evicted: tuple[str, ...] = ()
    """Parked lanes to save and give back."""


@dataclass(frozen=True)
class _LeaseOutcome:
    """The result of a lease request, which rank 0 broadcasts."""

    to_start: tuple[Lease, ...] = ()
    leaving: tuple[str, ...] = ()
    """Fingerprints of the lanes to remove before the new ones start."""
    closed: bool = False
    lease_again: bool = False
    """The first lane has set the group key: ask at once for more of it."""


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

    Returns:
        The plan. A lane is in `replaced` or in `evicted`, not in both.
    """
    granted = [lease.configuration.fingerprint for lease in grant.leases]
    to_start = tuple(lease for lease in grant.leases if lease.configuration.fingerprint not in already_final)
    # The source took this trainer for dead and has leased the lane again, to this same trainer.
    replaced = tuple(name for name in granted if name in occupancy.fingerprints)
    evictable = tuple(name for name in occupancy.long_parked if name not in replaced)
    is_same_group = all(lease.configuration.group_key == occupancy.group_key for lease in to_start)
    if is_same_group and not grant.requires_empty_group:
        evictable = evictable[: max(0, len(to_start) - len(replaced) - occupancy.free_slots)]
    return LeasePlan(to_start, replaced, evictable)


@dataclass
class LaneLeasing:
    """Fills the free slots of a trainer with lanes from the source."""

    active: ActiveLanes
    recovery: FailureRecovery
    closed: bool = False
    """Whether the source has said that no lane waits and none will come."""

    def lease_lanes(self) -> None:
        """Ask the source for lanes if there is room: at once after a lane has left, else by `polling.py`."""
        active, again = self.active, True
        while again and (active.count_free_slots() > 0 or active.slots.parked_at):
            outcome = active.process_group.broadcast_from_rank0(self._request_leases)
            self.closed = outcome.closed
            for name in outcome.leaving:
                active.remove(active.lanes[name])
            for lease in outcome.to_start:
                if active.count_free_slots() > 0:
                    self._start_lane(lease)
                else:  # a lane before this one ran out of memory, and the group was halved
                    active.process_group.broadcast_from_rank0(partial(self._decline_lease, lease))
            again = outcome.lease_again and bool(active.lanes)

    def _occupancy(self, now: float) -> GroupOccupancy:
        active = self.active
        return GroupOccupancy(
            tuple(active.lanes),
            active.group_key,
            active.count_free_slots(),
            tuple(active.slots.list_long_parked(now)),
        )

    def _request_leases(self) -> _LeaseOutcome:
        """Ask the source, plan, and give the leases of evicted lanes back. Rank 0 only."""
        active, now = self.active, time.monotonic()
        occupancy = self._occupancy(now)
        if occupancy.capacity <= 0 or not active.poll_interval.is_due(active.leased_at, now):
            return _LeaseOutcome(closed=self.closed)
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
        return _LeaseOutcome(plan.to_start, (*plan.replaced, *plan.evicted), grant.closed, lease_again)

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
        folder = active.recorder.store.checkpoints / lane.fingerprint
        found: list[Checkpoint] = []

        def find_newest() -> tuple[int, int] | None:
            """Rank 0 only. Returns attempt and step."""
            if (newest := checkpoint.read_newest(folder, active.recorder.warn, lane.fingerprint)) is None:
                return None
            found.append(newest)
            return newest.attempt, newest.step

        attempt_and_step = active.process_group.broadcast_from_rank0(find_newest)
        path = checkpoint.checkpoint_path(folder, *attempt_and_step) if attempt_and_step is not None else None
        added = self.recovery.run_isolating_failures(
            [lane], partial(self._add_lane, saved=next(iter(found), None), path=path)
        )
        group_key = lane.configuration.group_key
        if added and group_key not in active.slots.max_lanes_by_group_key:
            read_known_max = partial(active.recorder.read_max_lanes, group_key, active.slots.count)
            active.slots.max_lanes_by_group_key[group_key] = active.process_group.broadcast_from_rank0(
                read_known_max
            )

    def _add_lane(self, lanes: Sequence[Lane], saved: Checkpoint | None, path: Path | None) -> Sequence[None]:
        """Add one lane to the engine.

        Args:
            lanes: The lane, as a sequence of one.
            saved: Its newest checkpoint, which rank 0 has read.
            path: The file of that checkpoint, which the other ranks read.

        Returns:
            A list with one None: `run_isolating_failures` expects one result per lane.
        """
        (lane,) = lanes
        if any(
            other.configuration.group_key != lane.configuration.group_key
            for other in self.active.lanes.values()
        ):
            raise RuntimeError(
                f"leased a lane of group key {lane.configuration.group_key} into a lane group of another one"
            )
        if saved is None and path is not None:
            saved = checkpoint.read(path)
        self.active.engine.add_lane(lane, saved)
        if saved is not None:
            self.active.recorder.mark_restored(lane)
        return [None]

    def _decline_lease(self, lease: Lease) -> None:
        """Give a lease back for which there is no slot. Rank 0 only."""
        self.active.source.return_lease(lease.configuration.fingerprint, lease.attempt)
