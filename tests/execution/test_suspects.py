"""Halving a crashed lane group finds the faulty lanes, and all others finish, in any order of events."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from points import STEPS, configuration, record

from orchestrator.execution.broker.actor import Broker
from orchestrator.execution.broker.core import BrokerCore
from orchestrator.execution.broker.failure_policy import MAX_TRAINER_FAILURES, ExitKind
from orchestrator.execution.broker.lane_entry import HeldLane, LaneEntry
from orchestrator.finetune.engine.lane_source import Directive, LeaseGrant, Report
from orchestrator.record.schema import MAX_FAILURES, RecordState
from orchestrator.record.store import Store
from orchestrator.study.configuration import Configuration

POINTS = [configuration(rate=10.0**-n) for n in range(12)]


class Trainer:
    """A trainer that takes a step of one lane at a time. The test decides which lane, and when it crashes."""

    def __init__(self, name: str, lanes: int) -> None:
        self.name, self.places = name, lanes
        self.held: dict[str, HeldLane] = {}
        self.taken = 0

    def refill(self, core: BrokerCore) -> None:
        answers = core.exchange(self.name, self.held, self.taken, 0.0)
        assert set(answers.values()) <= {Directive.CONTINUE}
        group_key = next((point.group_key for _, point, _ in self.held.values()), None)
        grant = core.lease(self.name, group_key, self.places - len(self.held), 0.0)
        for lease in grant.leases:
            self.held[lease.configuration.fingerprint] = (lease.attempt, lease.configuration, None)

    def step(self, core: BrokerCore, fingerprint: str, saved: dict[str, int]) -> None:
        attempt, point, _ = self.held[fingerprint]
        saved[fingerprint] = step = saved.get(fingerprint, 0) + 1
        self.held[fingerprint] = (attempt, point, Report(fingerprint, attempt, step, {"loss": 1.0}))
        self.taken += 1
        core.exchange(self.name, self.held, self.taken, 0.0)
        if step == STEPS:
            del self.held[fingerprint]
            core.end_lease(self.name, fingerprint, attempt, "finished", 0.0)


@given(
    faulty=st.dictionaries(st.integers(0, len(POINTS) - 1), st.integers(1, STEPS), max_size=4),
    lanes=st.integers(1, 8),
    count=st.integers(1, 3),
    data=st.data(),
)
def test_faulty_lanes_fail_and_all_others_finish(
    faulty: dict[int, int], lanes: int, count: int, data: st.DataObject
) -> None:
    """`faulty` maps the index of a lane to the step at which the lane always crashes its trainer."""
    written: dict[str, str] = {}

    def write_failure(entry: LaneEntry, point: Configuration, why: str) -> RecordState:
        written[entry.fingerprint] = why
        return "failed"

    core = BrokerCore(write_failure=write_failure)
    for number, point in enumerate(POINTS):
        core.submit(f"t{number}", point, 0.0)
    crash_steps = {POINTS[number].fingerprint: step for number, step in faulty.items()}
    names = (f"trainer-{n}.x" for n in itertools.count())
    trainers = [Trainer(next(names), lanes) for _ in range(count)]
    saved: dict[str, int] = {}
    num_crashes, turns = 0, 0
    while any(core.next_report(point.fingerprint, STEPS, 0.0) is None for point in POINTS):
        turns += 1
        assert turns < 1000, "it comes to no end"
        trainer = data.draw(st.sampled_from(trainers))
        trainer.refill(core)
        suspects = [f for f in trainer.held if core.entries[f].max_group_size is not None]
        assert all(len(trainer.held) <= core.entries[f].max_group_size for f in suspects)  # type: ignore[operator]
        if not trainer.held:  # another trainer holds the remaining lanes
            trainer = next((one for one in trainers if one.held), trainer)
            if not trainer.held:
                continue
        fingerprint = data.draw(st.sampled_from(sorted(trainer.held)))
        if saved.get(fingerprint, 0) + 1 == crash_steps.get(fingerprint):
            core.trainer_exited(trainer.name.partition(".")[0], 0.0, ExitKind.CRASHED, "SIGABRT")
            num_crashes += 1
            assert not core.failure_policy.abort_reason, "the driver would end the study"
            trainers[trainers.index(trainer)] = Trainer(next(names), lanes)
        else:
            trainer.step(core, fingerprint, saved)
    ends = dict(core.ended_lanes)
    assert {f for f, state in ends.items() if state == "failed"} == set(crash_steps)
    assert len(ends) == len(core.ended_lanes) == len(POINTS)
    assert set(written) == set(crash_steps)
    assert all("while the lane trained alone: SIGABRT" in why for why in written.values())
    assert num_crashes <= len(crash_steps) * (lanes.bit_length() - 1 + MAX_FAILURES)
    assert not core.open_entries


def crashed(lanes: int, exit_kind: ExitKind = ExitKind.CRASHED) -> BrokerCore:
    """Return a broker whose only trainer has died with `lanes` lanes."""
    core = BrokerCore()
    for number, point in enumerate(POINTS[:lanes]):
        core.submit(f"t{number}", point, 0.0)
    core.lease("trainer-0.x", None, lanes, 0.0)
    core.remove_trainer("trainer-0.x", 0.0, exit_kind)
    return core


def names(grant: LeaseGrant) -> set[str]:
    return {lease.configuration.fingerprint for lease in grant.leases}


def test_the_broker_writes_the_record_of_a_lane_that_no_trainer_can(tmp_path: Path) -> None:
    """The methods of the broker are called without Ray."""
    broker = Broker(str(tmp_path), "none")
    point = POINTS[0]

    async def crash() -> Report | RecordState | None:
        waiting = asyncio.create_task(broker.next_report("t", point, 0, 30.0))
        await asyncio.sleep(0)
        for number in range(MAX_FAILURES):
            grant = await broker.lease(f"trainer-{number}.x", None, 1, {}, 0)
            assert len(grant.leases) == 1
            assert not waiting.done()
            await broker.trainer_exited(f"trainer-{number}", ExitKind.CRASHED, "killed by SIGABRT")
        return await waiting

    assert asyncio.run(crash()) == "failed"
    store = Store(tmp_path)
    record = store.get(point.fingerprint)
    assert record is not None
    assert record.state == "failed"
    assert record.reason == "the trainer's process died while the lane trained alone: killed by SIGABRT"
    assert store.count_failures(point.fingerprint) == MAX_FAILURES


def test_checkpoints_that_a_dead_trainer_left_beside_its_final_record_go(tmp_path: Path) -> None:
    point = POINTS[0]
    store = Store(tmp_path)
    store.put(record(point, "finished"))
    left = store.checkpoints / point.fingerprint / "1" / "step-00000002.safetensors"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"left")
    broker = Broker(str(tmp_path), "none")
    assert asyncio.run(broker.next_report("t", point, STEPS, 1.0)) == "finished"
    assert not (store.checkpoints / point.fingerprint).exists()


def test_a_trainer_that_crashes_on_everything_ends_the_study_before_all_is_spoilt() -> None:
    points = [configuration(rate=1e-3, seed=seed) for seed in range(60)]
    for lanes in (1, 4, 8):
        core = BrokerCore()
        for number, point in enumerate(points):
            core.submit(f"t{number}", point, 0.0)
        num_crashes = 0
        while not core.failure_policy.abort_reason:
            assert core.lease(f"trainer-{num_crashes}.x", None, lanes, 0.0).leases
            core.trainer_exited(f"trainer-{num_crashes}", 0.0, ExitKind.CRASHED, "SIGSEGV")
            num_crashes += 1
        assert len(core.ended_lanes) == 2 * MAX_TRAINER_FAILURES + 1
        assert num_crashes <= len(core.ended_lanes) * MAX_FAILURES + 2 * lanes, "halving costs some more"


def test_trainers_may_die_as_often_as_they_like_while_their_lanes_get_on() -> None:
    saved = {POINTS[0].fingerprint: 0}
    core = BrokerCore(checkpoint_step=saved.__getitem__)
    core.submit("t", POINTS[0], 0.0)
    for number in range(4 * MAX_TRAINER_FAILURES):
        saved[POINTS[0].fingerprint] += 5
        assert core.lease(f"trainer-{number}.x", None, 1, 0.0).leases
        core.trainer_exited(f"trainer-{number}", 0.0, ExitKind.FAILED, "its controller was killed")
        assert not core.failure_policy.abort_reason
    for number in range(MAX_TRAINER_FAILURES):
        assert not core.failure_policy.abort_reason
        core.lease(f"again-{number}.x", None, 1, 0.0)
        core.trainer_exited(f"again-{number}", 0.0, ExitKind.FAILED, "its controller was killed")
    assert core.failure_policy.abort_reason


def test_out_of_memory_halves_the_lane_group_and_marks_no_lane_faulty() -> None:
    core = BrokerCore()
    for number, point in enumerate(POINTS[:4]):
        core.submit(f"t{number}", point, 0.0)
    for number, lanes in enumerate((4, 2, 1)):
        assert len(core.lease(f"trainer-{number}.x", None, 4, 0.0).leases) == lanes
        core.trainer_exited(f"trainer-{number}", 0.0, ExitKind.OUT_OF_MEMORY)
    for number in range(MAX_TRAINER_FAILURES):
        assert core.entries[POINTS[0].fingerprint].solo_crashes == 0
        assert len(core.lease(f"alone-{number}.x", None, 4, 0.0).leases) == 1
        core.trainer_exited(f"alone-{number}", 0.0, ExitKind.OUT_OF_MEMORY)
    assert not core.ended_lanes
    assert core.failure_policy.abort_reason, "there is not even room for one"
