"""The plan for a grant: the leases to train and the lanes that make room. These tests train no lane."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st
from scripted import configuration

from orchestrator.finetune.engine.lane_source import Lease, LeaseGrant
from orchestrator.finetune.engine.leasing import GroupOccupancy, LeasePlan, plan_lease
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
            st.sampled_from(LARGE if is_other_group else SMALL),
            unique_by=lambda lane: lane.fingerprint,
            max_size=max(0, occupancy.capacity),
        )
    )
    final = draw(st.sets(st.sampled_from(names(leases)))) if leases else set()
    return occupancy, grant(leases, requires_empty_group and bool(leases)), final


@given(grants())
def test_a_plan_loses_no_lane_and_exceeds_no_limit(case: tuple[GroupOccupancy, LeaseGrant, set[str]]) -> None:
    occupancy, granted, final = case
    plan = plan_lease(occupancy, granted, final)
    leased = [lease.configuration.fingerprint for lease in granted.leases]
    to_start = [lease.configuration.fingerprint for lease in plan.to_start]
    assert to_start == [name for name in leased if name not in final]
    assert set(plan.replaced) == set(leased) & set(occupancy.fingerprints)
    assert not set(plan.replaced) & set(plan.evicted)
    assert set(plan.evicted) <= set(occupancy.long_parked)
    staying = set(occupancy.fingerprints) - set(plan.replaced) - set(plan.evicted)
    assert not staying & set(to_start)
    assert len(staying) + len(to_start) <= len(occupancy.fingerprints) + max(1, occupancy.free_slots)
    if occupancy.fingerprints:
        assert len(staying) + len(to_start) <= len(occupancy.fingerprints) + occupancy.free_slots
    group_keys = {lease.configuration.group_key for lease in plan.to_start}
    assert len(group_keys) <= 1
    if staying:
        assert group_keys <= {occupancy.group_key}


@given(grants())
def test_no_more_lanes_are_evicted_than_the_grant_needs(
    case: tuple[GroupOccupancy, LeaseGrant, set[str]],
) -> None:
    occupancy, granted, final = case
    plan = plan_lease(occupancy, granted, final)
    is_same_group = all(lease.configuration.group_key == occupancy.group_key for lease in plan.to_start)
    if is_same_group and not granted.requires_empty_group:
        needed = len(plan.to_start) - len(plan.replaced) - occupancy.free_slots
        assert len(plan.evicted) == max(0, needed)
        evictable = [name for name in occupancy.long_parked if name not in plan.replaced]
        assert list(plan.evicted) == evictable[: len(plan.evicted)], "the longest parked leave first"


def test_an_empty_group_asks_for_one_lane_and_a_parked_one_for_its_lanes_as_well() -> None:
    assert GroupOccupancy().capacity == 1
    assert held(SMALL[:3], 2, []).capacity == 2
    assert held(SMALL[:3], 2, SMALL[1:3]).capacity == 4


def test_a_lane_that_is_leased_again_is_replaced() -> None:
    plan = plan_lease(held(SMALL[:2], 0, []), grant(SMALL[:1]))
    assert plan == LeasePlan((Lease(SMALL[0], 2),), replaced=names(SMALL[:1]))


def test_a_grant_of_another_group_evicts_all_parked_lanes() -> None:
    occupancy = held(SMALL[:2], 4, SMALL[:2])
    assert plan_lease(occupancy, grant(LARGE[:1])).evicted == names(SMALL[:2])
    assert plan_lease(occupancy, grant(SMALL[2:3], requires_empty_group=True)).evicted == names(SMALL[:2])
    assert plan_lease(occupancy, grant(SMALL[2:3])).evicted == ()


def test_a_lane_with_a_final_record_is_not_trained_again() -> None:
    occupancy = replace(held(SMALL[:1], 0, SMALL[:1]), free_slots=0)
    plan = plan_lease(occupancy, grant(SMALL[1:2]), already_final=names(SMALL[1:2]))
    assert plan == LeasePlan()
