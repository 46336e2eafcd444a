"""Which lanes a trainer takes, and which make room for others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted import Queue, Script, configuration, leases, numbers_of, solo, train

from orchestrator.finetune.engine.lane_source import Directive, Lease, LeaseGrant
from orchestrator.finetune.engine.leasing import GroupOccupancy
from orchestrator.finetune.engine.recovery import StoredLimits
from orchestrator.record.schema import Record
from orchestrator.record.store import Store
from orchestrator.study.configuration import Configuration

SMALL = [configuration(rank=2, seed=seed) for seed in range(8)]
LARGE = [configuration(rank=4, seed=seed) for seed in range(8)]


def held(lanes: list[Configuration], free_slots: int, parked: list[Configuration]) -> GroupOccupancy:
    return GroupOccupancy(
        tuple(lane.fingerprint for lane in lanes),
        lanes[0].group_key if lanes else None,
        free_slots,
        tuple(lane.fingerprint for lane in parked),
    )


def grant(lanes: list[Configuration], requires_empty_group: bool = False) -> LeaseGrant:
    return LeaseGrant(
        tuple(Lease(lane, attempt=2) for lane in lanes), requires_empty_group=requires_empty_group
    )


def names(lanes: list[Configuration]) -> tuple[str, ...]:
    return tuple(lane.fingerprint for lane in lanes)


@st.composite
def grants(draw: st.DrawFn) -> tuple[GroupOccupancy, LeaseGrant, set[str]]:
    """Draw a lane group, a grant that answers its request, and the granted lanes with a final record."""
    lanes = SMALL[: draw(st.integers(0, 4), label="lanes")]
    parked = draw(st.permutations(lanes).map(lambda order: order[: draw(st.integers(0, len(lanes)))]))
    occupancy = held(lanes, draw(st.integers(0, 4), label="free"), list(parked))
    is_other_group = not lanes or (occupancy.is_all_parked and draw(st.booleans(), label="other group"))
    requires_empty_group = occupancy.is_all_parked and draw(st.booleans(), label="empty group")
    leases = draw(
        st.lists(
            st.sampled_from(LARGE if is_other_group else SMALL[len(lanes) :]),
            unique_by=lambda lane: lane.fingerprint,
            max_size=max(0, occupancy.capacity),
        )
    )
    final = draw(st.sets(st.sampled_from(names(leases)))) if leases else set()
    return occupancy, grant(leases, requires_empty_group and bool(leases)), final


@given(grants())
def test_a_plan_loses_no_lane_and_exceeds_no_limit(case: tuple[GroupOccupancy, LeaseGrant, set[str]]) -> None:
    occupancy, granted, final = case
    starting = [lease for lease in granted.leases if lease.configuration.fingerprint not in final]
    evicted = occupancy.choose_evicted(granted, starting)
    to_start = [lease.configuration.fingerprint for lease in starting]
    assert set(evicted) <= set(occupancy.long_parked)
    staying = set(occupancy.fingerprints) - set(evicted)
    assert not staying & set(to_start)
    assert len(staying) + len(to_start) <= len(occupancy.fingerprints) + max(1, occupancy.free_slots)
    if occupancy.fingerprints:
        assert len(staying) + len(to_start) <= len(occupancy.fingerprints) + occupancy.free_slots
    group_keys = {lease.configuration.group_key for lease in starting}
    assert len(group_keys) <= 1
    if staying:
        assert group_keys <= {occupancy.group_key}


@given(grants())
def test_no_more_lanes_are_evicted_than_the_grant_needs(
    case: tuple[GroupOccupancy, LeaseGrant, set[str]],
) -> None:
    occupancy, granted, final = case
    starting = [lease for lease in granted.leases if lease.configuration.fingerprint not in final]
    evicted = occupancy.choose_evicted(granted, starting)
    is_same_group = all(lease.configuration.group_key == occupancy.group_key for lease in starting)
    if is_same_group and not granted.requires_empty_group:
        assert len(evicted) == max(0, len(starting) - occupancy.free_slots)
        assert evicted == occupancy.long_parked[: len(evicted)], "the longest parked leave first"


def numbers(store: Store, fingerprint: str) -> Record:
    record = store.get(fingerprint)
    assert record is not None
    return numbers_of(record)


@pytest.mark.parametrize("variant", ["lora", pytest.param("pissa", marks=pytest.mark.slow)])
def test_parked_lanes_make_room_and_resume(variant: str, store: Store, tmp_path: Path) -> None:
    five = [
        configuration(variant=variant, seed=seed, steps=9, evaluations=3, dropout=0.1) for seed in range(5)
    ]
    source = Queue(leases(five))
    train(source, store, lanes=2, spill_seconds=-1.0)
    assert source.spilled
    assert source.most == 2
    for one in five:
        assert numbers(store, one.fingerprint) == numbers_of(solo(one, tmp_path))
    assert source.taken == 5 * 9  # evicted lanes lose no step


def test_a_group_that_is_parked_as_a_whole_makes_room_for_another_group_key(
    store: Store, tmp_path: Path
) -> None:
    """Otherwise a scheduler that needs reports of lanes of the other group key would wait forever."""
    small, large = configuration(rank=2, steps=4), configuration(rank=4, steps=4)

    class Bracket(Queue):
        def exchange(self, steps_taken: int) -> Mapping[str, Directive]:
            directives = super().exchange(steps_taken)
            return (
                directives
                if {r.fingerprint for r in self.reports} == {small.fingerprint, large.fingerprint}
                else {}
            )

        def lease(self, group_key: str | None, capacity: int, steps_taken: int) -> LeaseGrant:
            if small.fingerprint in self.away and len(self.reports) < 2:
                self.away[small.fingerprint] = len(self.held)
            return super().lease(group_key, capacity, steps_taken)

    source = Bracket(leases([small, large]))
    train(source, store, lanes=4, spill_seconds=-1.0)
    assert source.spilled[0] == (small.fingerprint, 1)
    for one in (small, large):
        assert numbers(store, one.fingerprint) == numbers_of(solo(one, tmp_path))


def test_the_second_lease_of_a_lane_group_tells_the_limit_of_its_group_key(store: Store) -> None:
    lanes = [configuration(seed=seed, steps=2) for seed in range(3)]
    key = lanes[0].group_key
    device_key = f"cpu, {round(psutil.virtual_memory().total / 2**30)} GiB"
    StoredLimits(store.lane_capacity, key, device_key).write("training", 3)

    class Told(Script):
        max_lanes = 0
        told: ClassVar[list[tuple[str | None, int]]] = []

        def note_max_lanes(self, max_lanes: int) -> None:
            self.max_lanes = max_lanes

        def lease(self, group_key: str | None, capacity: int, steps_taken: int) -> LeaseGrant:
            self.told.append((group_key, self.max_lanes))
            return super().lease(group_key, capacity, steps_taken)

    source = Told(leases(lanes))
    train(source, store, lanes=8)
    assert source.told[:2] == [(None, 8), (key, 3)]
