"""A trainer without lanes takes over lanes of another one."""

from __future__ import annotations

from collections.abc import Mapping

from hypothesis import given
from hypothesis import strategies as st
from points import STEPS, configuration

from orchestrator.execution.broker import BrokerCore, ExitKind
from orchestrator.execution.lane_entry import HeldLane
from orchestrator.finetune.engine.lane_source import Directive, Report
from orchestrator.study.configuration import Configuration
from orchestrator.util import timeouts

POINTS = [configuration(seed=seed) for seed in range(6)]
BEFORE = configuration(seed=6)
KEY = POINTS[0].group_key
LATER = timeouts.TAKEOVER_SECONDS


def busy(lanes: int, steps: Mapping[int, int] | None = None) -> tuple[BrokerCore, dict[str, HeldLane]]:
    """Return a broker whose trainer "busy" trains lanes; `steps` are those of some lanes."""
    core = BrokerCore()
    for number, point in enumerate(POINTS[:lanes]):
        core.submit(f"t{number}", point)
    held: dict[str, HeldLane] = {
        lease.configuration.fingerprint: (1, None) for lease in core.lease("busy", None, lanes, 0.0).leases
    }
    for number, step in (steps or {}).items():
        fingerprint = POINTS[number].fingerprint
        held[fingerprint] = 1, Report(fingerprint, 1, step, {"loss": 1.0})
    core.exchange("busy", held, 0, len(POINTS), 0.0)
    return core, held


def train_one(core: BrokerCore, max_lanes: int, point: Configuration = BEFORE) -> None:
    """Let the trainer "idle" train a lane, during which it can hold `max_lanes`."""
    core.submit("before", point)
    (lease,) = core.lease("idle", None, 1, 0.0).leases
    core.exchange("idle", {point.fingerprint: (lease.attempt, None)}, 1, max_lanes, 0.0)
    core.end_lease("idle", point.fingerprint, lease.attempt, "finished")


def take_over(core: BrokerCore, trainer: str = "idle") -> None:
    for now in (0.0, LATER):
        core.exchange(trainer, {}, 0, 3, now)
        grant = core.lease(trainer, None, 1, now)
        assert not grant.leases
        assert not grant.closed


def list_moving(core: BrokerCore, held: dict[str, HeldLane]) -> list[int]:
    """Return the numbers of the lanes that the trainer "busy" has to give back, and give them back."""
    moving = []
    for fingerprint, directive in core.exchange("busy", held, 0, len(POINTS), LATER).items():
        if directive is Directive.YIELD:
            moving.append(next(n for n, point in enumerate(POINTS) if point.fingerprint == fingerprint))
            core.return_lease("busy", fingerprint, held.pop(fingerprint)[0])
    return moving


def test_an_idle_trainer_gets_half_of_the_lanes_and_nobody_else_does_meanwhile() -> None:
    core, held = busy(5)
    train_one(core, 3)
    core.exchange("idle", {}, 0, 1, 0.0)  # an empty trainer does not know yet how many lanes fit
    core.lease("idle", None, 1, 0.0)
    core.lease("idle", None, 1, 0.9 * LATER)
    assert not list_moving(core, held), "it has not waited for long"
    core.lease("idle", None, 1, LATER)
    assert list_moving(core, held) == [3, 4], "the latest of those that have as many steps left"
    assert not core.lease("busy", KEY, 3, LATER).leases, "they are not for the trainer that gave them"
    assert not core.lease("other", None, 1, LATER).leases
    assert [lease.attempt for lease in core.lease("idle", None, 1, LATER).leases] == [2]
    assert not core.lease("busy", KEY, 3, LATER).leases
    core.exchange("idle", {POINTS[3].fingerprint: (2, None)}, 0, 2, LATER)
    assert [lease.configuration for lease in core.lease("idle", KEY, 1, LATER).leases] == [POINTS[4]]
    for _ in range(3):
        assert set(core.exchange("busy", held, 0, 6, LATER).values()) == {Directive.CONTINUE}


def test_a_lane_that_does_not_fit_or_whose_taker_has_gone_returns_to_its_trainer() -> None:
    core, held = busy(4)
    train_one(core, 3)
    take_over(core)
    assert list_moving(core, held) == [2, 3]
    assert len(core.lease("idle", None, 1, LATER).leases) == 1
    core.exchange("idle", {POINTS[2].fingerprint: (2, None)}, 0, 1, LATER)  # it holds one lane at most
    assert [lease.configuration for lease in core.lease("busy", KEY, 3, LATER).leases] == [POINTS[3]]
    core, held = busy(4)
    take_over(core)
    core.trainer_exited("idle", ExitKind.DONE, "")
    assert not list_moving(core, held)


def test_a_lane_that_is_nearly_finished_and_the_last_lane_of_a_trainer_stay() -> None:
    for steps, moves in ((STEPS // 2, [1]), (STEPS, [1])):
        core, held = busy(2, {0: steps})
        take_over(core)
        assert list_moving(core, held) == moves
    for steps, moves in ((STEPS - 1, [2]), (STEPS, [])):  # the third lane can move, or none
        core, held = busy(3, {0: STEPS, 1: STEPS, 2: steps})
        core.lease("idle", None, 1, 0.0)
        core.lease("idle", None, 1, LATER)
        assert list_moving(core, held) == moves


def test_no_more_lanes_move_than_fit_and_only_one_to_a_trainer_that_must_load_a_model_first() -> None:
    for max_lanes, moves in ((1, [5]), (2, [4, 5]), (6, [3, 4, 5])):
        core, held = busy(6)
        train_one(core, max_lanes)
        take_over(core)
        assert list_moving(core, held) == moves
    for point in (None, configuration("hira")):
        core, held = busy(6)
        if point:
            train_one(core, 6, point)
        take_over(core)
        assert list_moving(core, held) == [5]


@given(
    lanes=st.integers(1, 6),
    count=st.integers(2, 4),
    room=st.integers(1, 6),
    data=st.data(),
)
def test_every_step_is_taken_once_and_lanes_do_not_go_back_and_forth(
    lanes: int, count: int, room: int, data: st.DataObject
) -> None:
    core = BrokerCore()
    for number, point in enumerate(POINTS[:lanes]):
        core.submit(f"t{number}", point)
    trainers: list[dict[str, int]] = [{} for _ in range(count)]  # fingerprint -> attempt
    taken = dict.fromkeys((point.fingerprint for point in POINTS[:lanes]), 0)
    now, num_moves, turns = 0.0, 0, 0
    while core.open_entries:
        turns += 1
        assert turns < 2000, "it comes to no end"
        number = data.draw(st.integers(0, count - 1)) if turns < 60 else turns % count
        name, group = f"trainer-{number}", trainers[number]
        now += LATER / 2
        if len(group) < room:
            core.exchange(name, {f: (attempt, None) for f, attempt in group.items()}, 0, room, now)
            grant = core.lease(name, KEY if group else None, room - len(group) if group else 1, now)
            group |= {lease.configuration.fingerprint: lease.attempt for lease in grant.leases}
        for fingerprint in list(group):
            taken[fingerprint] += 1
            if taken[fingerprint] == STEPS:
                core.end_lease(name, fingerprint, group.pop(fingerprint), "finished")
        reports = {f: (attempt, Report(f, attempt, taken[f], {"loss": 1.0})) for f, attempt in group.items()}
        for fingerprint, directive in core.exchange(name, reports, 0, room, now).items():
            if directive is Directive.YIELD:
                num_moves += 1
                core.return_lease(name, fingerprint, group.pop(fingerprint))
    assert set(taken.values()) == {STEPS}
    assert num_moves <= 2 * lanes
