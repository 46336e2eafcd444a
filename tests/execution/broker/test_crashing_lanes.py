"""The lanes of a crashed trainer train alone, which finds those that crash trainers; all others finish."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from points import STEPS, configuration, record

from orchestrator.execution.broker import (
    MAX_FAILURES_PER_TRAINER,
    BrokerCore,
    ExitKind,
    LaneRecords,
)
from orchestrator.execution.broker_actor import Broker
from orchestrator.execution.lane_entry import HeldLane, LaneEntry
from orchestrator.finetune.engine.lane_source import Directive, LeaseGrant, Report
from orchestrator.record.schema import MAX_FAILURES, RecordState
from orchestrator.record.store import Store
from orchestrator.util import timeouts

POINTS = [configuration(rate=10.0**-n) for n in range(12)]
KEY = POINTS[0].group_key


class FakeStore(LaneRecords):
    """Checkpoints, and the reasons of failed records."""

    def __init__(self) -> None:
        self.saved: dict[str, int] = {}
        self.reasons: dict[str, str] = {}

    def newest_checkpoint(self, fingerprint: str) -> tuple[int, int]:
        return 0, self.saved.get(fingerprint, 0)

    def write_failure(self, entry: LaneEntry, reason: str) -> RecordState:
        self.reasons[entry.fingerprint] = reason
        return "failed"


class Trainer:
    """A trainer that takes a step of one lane at a time. The test decides which lane, and when it crashes."""

    def __init__(self, name: str, lanes: int) -> None:
        self.name, self.places = name, lanes
        self.held: dict[str, HeldLane] = {}

    def refill(self, core: BrokerCore) -> None:
        answers = core.exchange(self.name, self.held, 0, self.places, 0.0)
        assert set(answers.values()) <= {Directive.CONTINUE}
        grant = core.lease(self.name, KEY if self.held else None, self.places - len(self.held), 0.0)
        for lease in grant.leases:
            self.held[lease.configuration.fingerprint] = (lease.attempt, None)

    def step(self, core: BrokerCore, fingerprint: str, saved: dict[str, int]) -> None:
        attempt, _ = self.held[fingerprint]
        saved[fingerprint] = step = saved.get(fingerprint, 0) + 1
        self.held[fingerprint] = (attempt, Report(fingerprint, attempt, step, {"loss": 1.0}))
        core.exchange(self.name, self.held, 0, self.places, 0.0)
        if step == STEPS:
            del self.held[fingerprint]
            core.end_lease(self.name, fingerprint, attempt, "finished")


def submitted(count: int, store: LaneRecords | None = None) -> BrokerCore:
    core = BrokerCore(store)
    for number, point in enumerate(POINTS[:count]):
        core.submit(f"t{number}", point)
    return core


def names(grant: LeaseGrant) -> list[str]:
    return [lease.configuration.fingerprint for lease in grant.leases]


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
    store = FakeStore()
    core = submitted(len(POINTS), store)
    crash_steps = {POINTS[number].fingerprint: step for number, step in faulty.items()}
    trainer_names = (f"trainer-{n}" for n in itertools.count())
    trainers = [Trainer(next(trainer_names), lanes) for _ in range(count)]
    num_crashes, turns = 0, 0
    while core.open_entries:
        turns += 1
        assert turns < 1000, "it comes to no end"
        trainer = data.draw(st.sampled_from(trainers))
        trainer.refill(core)
        assert len(trainer.held) <= 1 or not any(core.entries[f].alone for f in trainer.held)
        if not trainer.held:  # another trainer holds the remaining lanes
            trainer = next(one for one in trainers if one.held)
        fingerprint = data.draw(st.sampled_from(sorted(trainer.held)))
        if store.saved.get(fingerprint, 0) + 1 == crash_steps.get(fingerprint):
            assert core.trainer_exited(trainer.name, ExitKind.CRASHED, "SIGABRT") == len(trainer.held)
            num_crashes += 1
            assert not core.abort_reason, "the driver would end the study"
            trainers[trainers.index(trainer)] = Trainer(next(trainer_names), lanes)
        else:
            trainer.step(core, fingerprint, store.saved)
    failed = {f for f, entry in core.entries.items() if entry.state == "failed"}
    assert failed == set(store.reasons) == set(crash_steps)
    assert all("while the lane trained alone: SIGABRT" in why for why in store.reasons.values())
    assert num_crashes <= len(crash_steps) * (1 + MAX_FAILURES)


def test_the_lanes_of_a_crashed_trainer_train_alone_until_they_get_further() -> None:
    store = FakeStore()
    core = submitted(4, store)
    crashed = names(core.lease("0", None, 3, 0.0))
    core.trainer_exited("0", ExitKind.CRASHED, "SIGSEGV")
    assert names(core.lease("1", None, 3, 0.0)) == crashed[:1]
    assert not names(core.lease("1", KEY, 2, 0.0)), "nothing joins it"
    assert names(core.lease("2", None, 3, 0.0)) == crashed[1:2]
    report = Report(crashed[0], 2, 1, {"loss": 1.0})
    core.exchange("1", {crashed[0]: (2, report)}, 1, 3, 0.0)
    assert names(core.lease("1", KEY, 2, 0.0)) == [POINTS[3].fingerprint], "the third still must be alone"
    store.saved[crashed[1]] = 7
    core.trainer_exited("2", ExitKind.LOST, "")
    assert names(core.lease("1", KEY, 2, 0.0)) == [crashed[1]], "it has a newer checkpoint"


def test_a_lane_that_crashes_alone_goes_behind_the_others_and_fails_with_the_third_crash() -> None:
    core = submitted(2, store := FakeStore())
    first, second = names(core.lease("0", None, 2, 0.0))
    core.trainer_exited("0", ExitKind.CRASHED, "SIGSEGV")
    for number, expected in enumerate((first, second, first, second, first), start=1):
        assert not store.reasons
        assert names(core.lease(str(number), None, 2, 0.0)) == [expected]
        core.trainer_exited(str(number), ExitKind.CRASHED, f"crash {number}")
    assert store.reasons == {first: "the trainer's process died while the lane trained alone: crash 5"}


def test_the_broker_writes_the_record_of_a_lane_that_no_trainer_can(tmp_path: Path) -> None:
    """The methods of the broker are called without Ray."""
    broker = Broker(str(tmp_path), "none")
    point = POINTS[0]

    async def crash() -> Report | RecordState | None:
        waiting = asyncio.create_task(broker.next_report("t", point, 0, 30.0))
        await asyncio.sleep(0)
        for number in range(MAX_FAILURES):
            grant = await broker.lease(f"trainer-{number}", None, 1, {}, 0, 1)
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
    for lanes in (1, 4, 8):
        core = BrokerCore()
        for seed in range(60):
            core.submit(f"t{seed}", configuration(seed=seed))
        num_crashes = 0
        while not core.abort_reason:
            assert core.lease(f"trainer-{num_crashes}", None, lanes, 0.0).leases
            core.trainer_exited(f"trainer-{num_crashes}", ExitKind.CRASHED, "SIGSEGV")
            num_crashes += 1
        num_failed = sum(entry.state == "failed" for entry in core.entries.values())
        assert num_failed == 2 * MAX_FAILURES_PER_TRAINER + 1


def test_trainers_may_die_as_often_as_they_like_while_their_lanes_get_on() -> None:
    for kind in (ExitKind.FAILED, ExitKind.CRASHED):
        core = submitted(1, store := FakeStore())
        for number in range(20):
            core.exchange(f"trainer-{number}", {}, 1, 1, 0.0)
            assert core.lease(f"trainer-{number}", None, 1, 0.0).leases
            store.saved[POINTS[0].fingerprint] = number + 1
            core.trainer_exited(f"trainer-{number}", kind, "its controller was killed")
        assert not core.abort_reason
        assert not store.reasons


def test_failures_in_a_row_end_the_study_and_lost_nodes_and_trainers_without_a_step_do_not() -> None:
    for kind, steps, is_fault in (
        (ExitKind.DONE, 1, False),
        (ExitKind.LOST, 1, False),
        (ExitKind.FAILED, 1, True),
        (ExitKind.CRASHED, 1, True),
        (ExitKind.FAILED, 0, False),
        (ExitKind.CRASHED, 0, False),
    ):
        core = submitted(1)
        core.exchange("a", {}, 0, 1, 0.0)
        for number in range(MAX_FAILURES_PER_TRAINER * (1 + 2) + 1):
            assert not core.abort_reason
            core.exchange(f"trainer-{number}", {}, steps, 1, 0.0)
            core.trainer_exited(f"trainer-{number}", kind, "")
        assert bool(core.abort_reason) == is_fault


def test_a_lane_that_hangs_its_trainer_fails_and_the_lanes_beside_it_train_alone_once() -> None:
    core, limit = submitted(3, store := FakeStore()), 2 * timeouts.TRAINER_SILENT_SECONDS
    bad, now = POINTS[0].fingerprint, 0.0
    assert len(core.lease("0", None, 3, now).leases) == 3
    for number in range(1, 2 + MAX_FAILURES):
        core.tick(now)
        while now < number * limit:
            now += timeouts.TRAINER_SILENT_SECONDS / 4
            core.tick(now)
        assert core.trainer_exited(str(number - 1), ExitKind.FAILED, "it hung, and was ended") == 0
        name = str(number)
        while (alone := names(core.lease(name, None, 3, now))) and alone != [bad]:
            assert len(alone) == 1
            core.end_lease(name, alone[0], core.entries[alone[0]].attempt, "finished")
    assert store.reasons == {bad: "the trainer's process died while the lane trained alone: it hung"}
    assert sorted(str(entry.state) for entry in core.entries.values()) == ["failed", "finished", "finished"]


def test_a_lane_that_resumes_from_an_earlier_run_and_crashes_at_once_got_no_further() -> None:
    core = submitted(1, store := FakeStore())
    store.saved[POINTS[0].fingerprint] = 7
    for number in range(MAX_FAILURES):
        assert not store.reasons
        assert core.lease(str(number), None, 1, 0.0).leases
        core.trainer_exited(str(number), ExitKind.CRASHED, "SIGSEGV")
    assert store.reasons


def test_a_trainer_whose_node_drains_is_announced_once(tmp_path: Path) -> None:
    broker = Broker(str(tmp_path), "none")
    for trainer in ("trainer-0", "trainer-0", None):
        asyncio.run(broker.drain(trainer))
    line = "trainer-0: its node is drained; its lanes continue elsewhere"
    assert list(asyncio.run(broker.get_updates(0)).events) == [line]
