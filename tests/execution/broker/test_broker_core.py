"""The broker under fixed orders of events; test_broker_orders.py generates random orders."""

from __future__ import annotations

from dataclasses import replace

from points import configuration, record

from orchestrator.execution.broker import BrokerCore, EndedLane, ExitKind, LaneRecords, TrainerPlace
from orchestrator.execution.lane_entry import HeldLane
from orchestrator.finetune.engine.lane_source import Directive, LeaseGrant, Report
from orchestrator.record.schema import MAX_FAILURES, LaneProgress, StepMetrics
from orchestrator.util import timeouts


def test_a_trainer_refills_its_lane_group_then_takes_the_group_key_with_most_waiting_lanes() -> None:
    core = BrokerCore()
    for i, (variant, rate) in enumerate(
        [("lora", 1e-3), ("hira", 1e-3), ("hira", 1e-2), ("lora", 1e-2), ("hira", 1e-1)]
    ):
        core.submit(f"t{i}", configuration(variant, rate))
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


def test_a_stopped_record_is_replayed_up_to_what_its_scheduler_saw() -> None:
    point = configuration()
    for stopped_at, seen in ((2, [1, 2]), (None, [1, 2, 3])):
        stopped = replace(record(point, "stopped", 3), stopped_at=stopped_at)
        records = LaneRecords()
        records.find_record = lambda _, stopped=stopped: stopped  # type: ignore[method-assign, misc]
        core = BrokerCore(records, "asha")
        core.submit("t", point)
        assert [r.step for r in core.entries[point.fingerprint].reports] == seen
        assert core.next_report(point.fingerprint, seen[-1]) == "stopped"


def test_a_failed_lane_is_tried_again_twice_at_most() -> None:
    core = BrokerCore()
    point = configuration()
    core.submit("t", point)
    for _ in range(MAX_FAILURES):
        (lease,) = core.lease("a", None, 1, 0.0).leases
        core.end_lease("a", point.fingerprint, lease.attempt, "failed")
    assert core.lease("a", None, 1, 0.0).leases == ()
    assert core.next_report(point.fingerprint, 0) == "failed"
    assert core.events[-1] == EndedLane(point.fingerprint, "failed")


def test_the_driver_sees_the_start_and_every_new_report_of_a_lane_once() -> None:
    core = BrokerCore()
    point = configuration()
    core.submit("t", point)
    assert core.events == []
    (lease,) = core.lease("a", None, 1, 0.0).leases
    assert core.get_updates(0, 0.0).events == core.get_updates(0, 0.0).events == (LaneProgress(point),)
    curves = {step: (StepMetrics(step, 2.0, 1e-3, 0.5),) for step in (5, 10)}
    reports = [
        Report(point.fingerprint, lease.attempt, step, {"loss": 1.0 / step}, curves[step]) for step in (5, 10)
    ]
    for report in (reports[0], reports[0], reports[1]):  # every exchange repeats the last report
        core.exchange("a", {point.fingerprint: (lease.attempt, report)}, report.step, 1, 0.0)
    core.events.append("a line")
    assert core.get_updates(1, 0.0).events == (
        LaneProgress(point, 5, {"loss": 0.2}, curves[5]),
        LaneProgress(point, 10, {"loss": 0.1}, curves[10]),
        "a line",
    )
    assert core.get_updates(3, 0.0).events == ("a line",)
    assert [report.curve for report in core.entries[point.fingerprint].reports] == [(), ()], "trials get none"


def test_the_backlog_of_a_grid_is_submitted_as_lanes_end_and_a_trial_joins_its_lane() -> None:
    core = BrokerCore()
    points = [configuration(seed=seed) for seed in range(5)]
    core.backlog.extend(points)
    assert core.get_updates(0, 0.0).counts["waiting"] == 0
    assert core.get_updates(0, 0.0, max_open=2).counts["waiting"] == 2
    (lease,) = core.lease("a", None, 1, 0.0).leases
    assert lease.configuration == points[0]
    core.submit("trial", points[0])
    core.end_lease("a", points[0].fingerprint, 1, "finished")
    assert core.next_report(points[0].fingerprint, 0) == "finished"
    assert core.get_updates(0, 0.0, max_open=2).counts == {"waiting": 2, "ended": 1, "trainers": 1}
    core.submit("trial", points[4])  # before its turn
    core.release("trial")
    assert core.get_updates(0, 0.0, max_open=9).counts["waiting"] == 4
    assert not core.backlog


def test_a_trainer_taken_for_dead_must_drop_its_lane_and_only_its_final_record_counts() -> None:
    core = BrokerCore()
    point = configuration()
    core.submit("t", point)
    (old,) = core.lease("zombie", None, 1, 0.0).leases
    assert core.trainer_exited("zombie", ExitKind.LOST, "") == 1
    (new,) = core.lease("b", None, 1, 1.0).leases
    assert new.attempt != old.attempt
    report = Report(point.fingerprint, old.attempt, 1, {})
    held: dict[str, HeldLane] = {point.fingerprint: (old.attempt, report)}
    assert core.exchange("zombie", held, 1, 1, 2.0) == {point.fingerprint: Directive.DROP}
    assert core.lease("zombie", None, 1, 2.0) == LeaseGrant(closed=True)
    assert core.next_report(point.fingerprint, 0) is None
    core.end_lease("zombie", point.fingerprint, old.attempt, "failed")
    assert core.entries[point.fingerprint].failures == 0
    core.end_lease("zombie", point.fingerprint, old.attempt, "finished")  # the record is in the store
    assert core.next_report(point.fingerprint, 0) == "finished"
    held = {point.fingerprint: (new.attempt, None)}
    assert core.exchange("b", held, 0, 1, 3.0) == {point.fingerprint: Directive.DROP}


def test_drained_trainers_return_all_lanes_and_get_no_more() -> None:
    for name in ("a", None):
        core = BrokerCore(scheduler="asha")
        points = [configuration(rate=rate) for rate in (1e-4, 1e-3, 1e-2)]
        for point in points:
            core.submit(point.fingerprint, point)
        core.lease("a", None, 3, 0.0)
        reported, stopped, training = points
        held: dict[str, HeldLane] = {
            reported.fingerprint: (1, Report(reported.fingerprint, 1, 1, {})),
            stopped.fingerprint: (1, Report(stopped.fingerprint, 1, 1, {})),
            training.fingerprint: (1, None),
        }
        core.exchange("a", held, 2, 3, 0.0)
        core.stop(stopped.fingerprint, stopped, 1)
        core.draining.add(name)
        assert core.exchange("a", held, 2, 3, 0.0) == {
            reported.fingerprint: Directive.YIELD,
            stopped.fingerprint: Directive.STOP,
            training.fingerprint: Directive.YIELD,
        }
        for point in (reported, training):
            core.return_lease("a", point.fingerprint, 1)
        core.end_lease("a", stopped.fingerprint, 1, "stopped")
        assert core.events[-1] == EndedLane(stopped.fingerprint, "stopped")
        assert core.lease("a", None, 3, 0.0) == LeaseGrant(closed=True)
        assert core.get_updates(0, 0.0).counts == {"returned": 1, "waiting": 1, "ended": 1, "trainers": 1}
        other = core.lease("b", None, 3, 0.0)
        assert [lease.configuration for lease in other.leases] == ([training] if name else [])
        assert other.closed == (name is None)


def fail_three_lanes(core: BrokerCore, trainer: str, group_key: str | None = None) -> set[str]:
    """Let the next three lanes fail, after which the trainer gives up; return their variants."""
    core.exchange(trainer, {}, 1, 1, 0.0)
    variants = set()
    for _ in range(3):
        (lease,) = core.lease(trainer, group_key, 1, 0.0).leases
        variants.add(lease.configuration.variant.name)
        core.end_lease(trainer, lease.configuration.fingerprint, lease.attempt, "failed")
    core.trainer_exited(trainer, ExitKind.FAILED, "3 configurations in a row failed")
    return variants


def test_a_variant_that_fails_is_left_until_the_others_are_trained_and_kills_no_study_before() -> None:
    core = BrokerCore()
    rates = [10.0**-n for n in range(10)]
    for rate in rates:
        core.submit(f"bad{rate}", configuration("hira", rate))
    for rate in rates[:3]:
        core.submit(f"good{rate}", configuration("lora", rate))
    assert fail_three_lanes(core, "0", configuration("hira").group_key) == {"hira"}
    for rate in rates[:3]:
        (lease,) = core.lease("1", None, 1, 0.0).leases
        assert lease.configuration == configuration("lora", rate)
        core.end_lease("1", lease.configuration.fingerprint, 1, "finished")
    core.trainer_exited("1", ExitKind.DONE, "")
    num_exits = 0
    while not core.abort_reason:
        assert fail_three_lanes(core, f"then-{num_exits}") == {"hira"}
        num_exits += 1
    assert "7 times in a row" in core.abort_reason, "before all lanes of the last variant have failed"
    assert any(entry.state is None for entry in core.entries.values())


def test_a_machine_that_fails_every_variant_ends_the_study() -> None:
    core = BrokerCore()
    for rate in (10.0**-n for n in range(8)):
        for variant in ("hira", "lora"):
            core.submit(f"{variant}{rate}", configuration(variant, rate))
    num_exits = 0
    while not core.abort_reason:
        fail_three_lanes(core, f"trainer-{num_exits}")
        num_exits += 1
    assert num_exits <= 7


def test_a_hung_trainer_is_listed_until_its_end_and_its_lanes_wait() -> None:
    core = BrokerCore()
    for rate in (1e-3, 1e-2, 1e-1):
        core.submit(f"t{rate}", configuration(rate=rate))
    for name in ("hung", "computing", "calling"):
        core.lease(name, None, 1, 0.0)
    for now in range(0, 2 * int(timeouts.TRAINER_SILENT_SECONDS), 10):
        core.heartbeat("computing", now)
        core.exchange("calling", {}, 0, 1, now)
        updates = core.get_updates(0, now)
        assert updates.hung == (["hung"] if now > timeouts.TRAINER_SILENT_SECONDS else [])
    assert updates.counts["trainers"] == 2
    assert core.lease("calling", None, 1, now).leases
    core.heartbeat("hung", now)
    assert core.lease("hung", None, 1, now) == LeaseGrant(closed=True)
    assert core.trainer_exited("hung", ExitKind.FAILED, "it hung, and was ended") == 0
    assert core.get_updates(0, now).hung == []
    assert core.failures_in_a_row == 0, "it had taken no step"


def test_nobody_is_taken_for_dead_after_a_pause_of_the_broker_itself() -> None:
    core, limit = BrokerCore(), timeouts.TRAINER_SILENT_SECONDS
    core.submit("t", configuration())
    core.lease("a", None, 1, 0.0)
    for now in (0.0, 100 * limit, 101 * limit - 1):
        assert core.get_updates(0, now).hung == []


def test_the_driver_learns_where_a_trainer_runs_and_why_it_fails() -> None:
    core, place = BrokerCore(), TrainerPlace("node", "GPU 3 of node 10.0.0.7")
    core.places["a"] = place
    core.announced["a"] = ExitKind.CRASHED, "it lost its GPU"
    updates = core.get_updates(0, 0.0)
    assert updates.counts["trainers"] == 0, "it has not called yet"
    assert (updates.places, updates.announced) == ({"a": place}, {"a": (ExitKind.CRASHED, "it lost its GPU")})
    core.trainer_exited("a", ExitKind.CRASHED, "it lost its GPU")
    updates = core.get_updates(0, 0.0)
    assert not updates.places
    assert not updates.announced
