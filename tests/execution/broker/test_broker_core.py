"""The broker under fixed orders of events; test_broker_orders.py generates random orders."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
from points import configuration, record
from ray.exceptions import GetTimeoutError

from orchestrator.execution.broker import client
from orchestrator.execution.broker.assignment import MAX_GROUP_FAILURES
from orchestrator.execution.broker.core import BrokerCore
from orchestrator.execution.broker.failure_policy import ExitKind
from orchestrator.execution.broker.lane_entry import HeldLane
from orchestrator.finetune.engine.lane_source import Directive, LeaseGrant, Report
from orchestrator.record.schema import MAX_FAILURES, LaneProgress, StepMetrics
from orchestrator.util import timeouts


def test_a_trainer_refills_its_lane_group_then_takes_the_group_key_with_most_waiting_lanes() -> None:
    core = BrokerCore()
    for i, (variant, rate) in enumerate(
        [("lora", 1e-3), ("hira", 1e-3), ("hira", 1e-2), ("lora", 1e-2), ("hira", 1e-1)]
    ):
        core.submit(f"t{i}", configuration(variant, rate), 0.0)
    first = core.lease("a", None, 2, 0.0)
    assert [lease.configuration.variant.name for lease in first.leases] == ["hira", "hira"]
    group_key = first.leases[0].configuration.group_key
    assert [lease.configuration.variant.name for lease in core.lease("a", group_key, 2, 0.0).leases] == [
        "hira"
    ]
    assert core.lease("a", group_key, 1, 0.0).leases == ()
    assert [lease.configuration.variant.name for lease in core.lease("b", None, 4, 0.0).leases] == [
        "lora",
        "lora",
    ]


def end_all_lanes(core: BrokerCore, trainer: str, now: float) -> None:
    for fingerprint in sorted(core.trainers[trainer].lanes):
        core.end_lease(trainer, fingerprint, core.entries[fingerprint].attempt, "finished", now)


def test_a_group_key_that_waits_too_long_gets_the_trainer_with_fewest_lanes() -> None:
    core = BrokerCore()
    for i, rate in enumerate((1e-4, 1e-3, 1e-2)):
        core.submit(f"t{i}", configuration("lora", rate), 0.0)
    group_key = core.lease("a", None, 2, 0.0).leases[0].configuration.group_key
    core.lease("b", None, 1, 0.0)
    core.submit("t8", configuration("hira"), 0.0)
    late = timeouts.STARVATION_SECONDS + 1
    held = {f: (core.entries[f].attempt, core.configurations[f], None) for f in core.trainers["a"].lanes}
    core.exchange("a", held, 0, late)
    assert core.lease("b", group_key, 1, late).leases == ()
    core.submit("t9", configuration("lora", 1e-1), late)
    assert core.lease("b", group_key, 1, late).leases == (), "b drains for the other group key"
    assert len(core.lease("a", group_key, 1, late).leases) == 1, "a goes on with its own group key"
    end_all_lanes(core, "b", late)
    assert [lease.configuration.variant.name for lease in core.lease("b", None, 2, late).leases] == ["hira"]


def test_a_trainer_with_waiting_lanes_of_its_own_group_key_is_filled_before_it_serves_another() -> None:
    """The only trainer of a study of two variants, each with more lanes than fit, hours after the start."""
    core, hour = BrokerCore(), 60 * timeouts.STARVATION_SECONDS
    for variant in ("lora", "hira"):
        for rate in (1e-4, 1e-3, 1e-2, 1e-1):
            core.submit(f"{variant}{rate}", configuration(variant, rate), 0.0)
    trained = []
    for now in (hour, 2 * hour, 3 * hour, 4 * hour):
        first = core.lease("a", None, 1, now).leases
        (key,) = {lease.configuration.group_key for lease in first}
        more = core.lease("a", key, 1, now).leases
        assert core.lease("a", key, 0, now).leases == ()
        trained.append([lease.configuration.variant.name for lease in (*first, *more)])
        end_all_lanes(core, "a", now)
    assert sorted(trained) == [["hira", "hira"], ["hira", "hira"], ["lora", "lora"], ["lora", "lora"]]


def test_a_lane_group_that_lanes_still_join_is_not_drained() -> None:
    """The lane of another group key has waited for hours, but the group has begun a second ago."""
    core, now = BrokerCore(), 60 * timeouts.STARVATION_SECONDS
    core.submit("other", configuration("hira"), 0.0)
    for second, rate in enumerate((1e-4, 1e-3, 1e-2)):
        core.submit(f"t{rate}", configuration("lora", rate), now + second)
        key = configuration("lora").group_key
        assert len(core.lease("a", key, 1, now + second).leases) == 1
        assert core.lease("a", key, 1, now + second).leases == ()
    assert core.trainers["a"].draining_for is None
    core.exchange("a", {f: (1, core.configurations[f], None) for f in core.trainers["a"].lanes}, 1, 2 * now)
    assert core.lease("a", key, 1, 2 * now).leases == ()
    assert core.trainers["a"].draining_for == configuration("hira").group_key


def test_a_stopped_record_is_replayed_up_to_what_its_scheduler_saw() -> None:
    point = configuration()
    for stopped_at, seen in ((2, [1, 2]), (None, [1, 2, 3])):
        stopped = replace(record(point, "stopped", 3), stopped_at=stopped_at)
        core = BrokerCore(find_record=lambda _, stopped=stopped: stopped, scheduler="asha")
        core.submit("t", point, 0.0)
        assert [r.step for r in core.entries[point.fingerprint].reports] == seen
        assert core.next_report(point.fingerprint, seen[-1], 0.0) == "stopped"


def test_a_failed_lane_is_tried_again_twice_at_most() -> None:
    core = BrokerCore()
    point = configuration()
    core.submit("t", point, 0.0)
    for _ in range(MAX_FAILURES):
        (lease,) = core.lease("a", None, 1, 0.0).leases
        core.end_lease("a", point.fingerprint, lease.attempt, "failed", 0.0)
    assert core.lease("a", None, 1, 0.0).leases == ()
    assert core.next_report(point.fingerprint, 0, 9.0) == "failed"
    assert core.ended_lanes == [(point.fingerprint, "failed")]


def test_the_driver_sees_the_start_and_every_new_report_of_a_lane_once() -> None:
    core = BrokerCore()
    point = configuration()
    core.submit("t", point, 0.0)
    assert core.progress == []
    (lease,) = core.lease("a", None, 1, 0.0).leases
    curves = {step: (StepMetrics(step, 2.0, 1e-3, 0.5),) for step in (5, 10)}
    reports = [
        Report(point.fingerprint, lease.attempt, step, {"loss": 1.0 / step}, curves[step]) for step in (5, 10)
    ]
    for report in (reports[0], reports[0], reports[1]):  # every exchange repeats the last report
        core.exchange("a", {point.fingerprint: (lease.attempt, point, report)}, report.step, 0.0)
    assert core.progress == [
        LaneProgress(point),
        LaneProgress(point, 5, {"loss": 0.2}, curves[5]),
        LaneProgress(point, 10, {"loss": 0.1}, curves[10]),
    ]
    assert [report.curve for report in core.entries[point.fingerprint].reports] == [(), ()], "trials get none"


def test_a_grant_is_closed_only_if_no_lane_waits() -> None:
    core = BrokerCore()
    core.submit("t", configuration(), 0.0)
    core.closed = True
    assert not core.lease("a", None, 1, 0.0).closed
    assert core.lease("a", configuration().group_key, 1, 0.0).closed


def test_a_trainer_taken_for_dead_must_drop_its_lane_and_only_its_final_record_counts() -> None:
    core = BrokerCore()
    point = configuration()
    core.submit("t", point, 0.0)
    (old,) = core.lease("zombie", None, 1, 0.0).leases
    core.remove_trainer("zombie", 1.0)
    (new,) = core.lease("b", None, 1, 1.0).leases
    assert new.attempt != old.attempt
    report = Report(point.fingerprint, old.attempt, 1, {})
    held = {point.fingerprint: (old.attempt, point, report)}
    assert core.exchange("zombie", held, 0, 2.0) == {point.fingerprint: Directive.DROP}
    assert core.next_report(point.fingerprint, 0, 9.0) is None
    core.end_lease("zombie", point.fingerprint, old.attempt, "failed", 2.0)
    assert core.entries[point.fingerprint].failures == 0
    held = {point.fingerprint: (old.attempt, point, None)}
    assert core.exchange("zombie", held, 0, 2.0) == {point.fingerprint: Directive.DROP}
    core.end_lease(
        "zombie", point.fingerprint, old.attempt, "finished", 3.0
    )  # the record is in the store, so it counts
    assert core.next_report(point.fingerprint, 0, 9.0) == "finished"
    held = {point.fingerprint: (new.attempt, point, None)}
    assert core.exchange("b", held, 0, 3.0) == {point.fingerprint: Directive.DROP}


def test_drained_trainers_return_all_lanes_and_get_no_more() -> None:
    for name, stays in (("trainer-0", "trainer-1.b"), (None, "")):
        core = BrokerCore(scheduler="asha")
        points = [configuration(rate=rate) for rate in (1e-4, 1e-3, 1e-2)]
        for point in points:
            core.submit(point.fingerprint, point, 0.0)
        core.lease("trainer-0.a", None, 3, 0.0)
        reported, stopped, training = points
        held: dict[str, HeldLane] = {
            reported.fingerprint: (1, reported, Report(reported.fingerprint, 1, 1, {})),
            stopped.fingerprint: (1, stopped, Report(stopped.fingerprint, 1, 1, {})),
            training.fingerprint: (1, training, None),
        }
        core.exchange("trainer-0.a", held, 2, 0.0)
        core.stop(stopped.fingerprint, stopped, 1, 0.0)
        core.drain(name)
        assert core.exchange("trainer-0.a", held, 2, 0.0) == {
            reported.fingerprint: Directive.YIELD,
            stopped.fingerprint: Directive.STOP,
            training.fingerprint: Directive.YIELD,
        }
        for point in (reported, training):
            core.return_lease("trainer-0.a", point.fingerprint, 1, 0.0)
        core.end_lease("trainer-0.a", stopped.fingerprint, 1, "stopped", 0.0)
        assert core.ended_lanes == [(stopped.fingerprint, "stopped")]
        assert core.lease("trainer-0.a", None, 3, 0.0) == LeaseGrant(closed=True)
        assert core.lease("trainer-0.later", None, 3, 0.0).closed, "a new incarnation on the same node"
        assert core.counts() == {"returned": 1, "waiting": 1, "ended": 1, "trainers": 2}
        if stays:
            leases = core.lease(stays, None, 3, 0.0).leases
            assert [lease.configuration for lease in leases] == [training]
        else:
            assert core.lease("trainer-1.b", None, 3, 0.0).closed


def fail_all_lanes(core: BrokerCore, name: str) -> set[str]:
    """Let every lane of a trainer with one slot fail until the trainer gives up; return their variants."""
    variants = set()
    for _ in range(MAX_GROUP_FAILURES):
        (lease,) = core.lease(f"{name}.x", None, 1, 0.0).leases
        variants.add(lease.configuration.variant.name)
        core.end_lease(f"{name}.x", lease.configuration.fingerprint, lease.attempt, "failed", 0.0)
    core.trainer_exited(name, 0.0, ExitKind.REPEATED_LANE_FAILURES, "3 configurations in a row failed")
    return variants


def test_a_variant_that_fails_is_left_until_the_others_are_trained_and_kills_no_study_before() -> None:
    core = BrokerCore()
    rates = [10.0**-n for n in range(8)]
    for rate in rates:
        core.submit(f"bad{rate}", configuration("hira", rate), 0.0)
    for rate in rates[:3]:
        core.submit(f"good{rate}", configuration("lora", rate), 0.0)
    for _ in range(MAX_GROUP_FAILURES):
        (lease,) = core.lease("trainer-0.x", configuration("hira").group_key, 1, 0.0).leases
        core.end_lease("trainer-0.x", lease.configuration.fingerprint, lease.attempt, "failed", 0.0)
    core.trainer_exited("trainer-0", 0.0, ExitKind.REPEATED_LANE_FAILURES, "3 configurations in a row failed")
    assert core.failure_policy.failures_without_step == 0, "no failure counts while another variant waits"
    late = timeouts.STARVATION_SECONDS + 1
    for rate in rates[:3]:
        (lease,) = core.lease("trainer-1.x", None, 1, late).leases
        good = configuration("lora", rate)
        assert lease.configuration == good
        core.exchange("trainer-1.x", {good.fingerprint: (1, good, None)}, 1, late)
        core.lease("trainer-1.x", good.group_key, 0, late)
        assert core.trainers["trainer-1.x"].draining_for is None, "no trainer drains for a variant that fails"
        core.end_lease("trainer-1.x", good.fingerprint, 1, "finished", late)
    for number in (2, 3, 4, 5):
        assert not core.failure_policy.abort_reason
        assert fail_all_lanes(core, f"trainer-{number}") == {"hira"}
    assert core.failure_policy.abort_reason, "the study ends before all lanes of the last variant fail"
    assert any(entry.needs_trainer for entry in core.open_entries.values())


def test_a_machine_that_fails_every_variant_ends_the_study() -> None:
    core = BrokerCore()
    for rate in (10.0**-n for n in range(8)):
        for variant in ("hira", "lora"):
            core.submit(f"{variant}{rate}", configuration(variant, rate), 0.0)
    num_exits = 0
    while not core.failure_policy.abort_reason:
        fail_all_lanes(core, f"trainer-{num_exits}")
        num_exits += 1
    assert num_exits <= 5


def test_a_hung_trainer_is_named_and_one_that_speaks_again_is_not() -> None:
    core = BrokerCore()
    for rate in (1e-3, 1e-2, 1e-1):
        core.submit(f"t{rate}", configuration(rate=rate), 0.0)
    for name in ("trainer-0.x", "trainer-1.x", "trainer-2.x"):
        core.lease(name, None, 1, 0.0)
    dead = timeouts.TRAINER_SILENT_SECONDS + 1
    core.tick(dead)
    assert core.counts()["trainers"] == 0
    assert core.hung_trainers(dead) == [], "the broker itself may have stood still"
    core.heartbeat("trainer-1.x", dead)
    core.exchange("trainer-2.x", {}, 0, dead)
    later = dead + timeouts.TRAINER_SILENT_SECONDS + 1
    assert core.hung_trainers(later) == ["trainer-0"]
    core.trainer_exited("trainer-0", later, ExitKind.FAILED, "it hung")
    assert core.hung_trainers(later) == []


def test_a_process_that_was_stopped_during_a_call_makes_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(monotonic=lambda: clock.now, sleep=lambda seconds: None, now=1.0)
    monkeypatch.setattr(client, "time", clock)

    def call() -> str:
        clock.now += 3600.0
        if clock.now < 7200.0:
            raise GetTimeoutError("no answer")
        return "done"

    assert client.retry_until_lost(call) == "done"
