"""The broker under random orders of submissions, leases, reports, pauses, takeovers, deaths and releases."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from points import POINTS, STEPS, configuration, record

from orchestrator.execution.broker import BrokerCore, EndedLane, ExitKind, LaneRecords
from orchestrator.execution.lane_entry import HeldLane, LeasePhase
from orchestrator.finetune.engine.lane_source import Directive, Report
from orchestrator.record.schema import MAX_FAILURES, Record
from orchestrator.study.configuration import Configuration
from orchestrator.util import timeouts

LANES = 3
"""The number of lanes that a trainer holds."""
MAX_MOVES = 2 * len(POINTS)
"""More lanes never move when only two trainers are left."""


@dataclass
class Lane:
    """A lane on a trainer. After a resumption the lane repeats the reports since its checkpoint."""

    attempt: int
    configuration: Configuration
    step: int = 0
    reported: int = 0
    parked: bool = False


class FakeTrainer:
    def __init__(self, name: str) -> None:
        self.name = name
        self.lanes: dict[str, Lane] = {}
        self.taken = 0

    @property
    def held(self) -> dict[str, HeldLane]:
        return {
            f: (
                lane.attempt,
                Report(f, lane.attempt, lane.reported, {"loss": 1.0}) if lane.reported else None,
            )
            for f, lane in self.lanes.items()
        }

    @property
    def state(self) -> tuple[dict[str, HeldLane], int, int]:
        """The arguments of an exchange."""
        return self.held, self.taken, LANES


class FakeStore(LaneRecords):
    """The checkpoints and records of the lanes."""

    def __init__(self) -> None:
        self.records: dict[str, Record] = {}
        self.attempts: dict[str, int] = {}
        self.saved: dict[str, int] = {}

    def save(self, fingerprint: str, lane: Lane) -> None:
        self.saved[fingerprint] = max(self.saved.get(fingerprint, 0), lane.step)
        self.attempts[fingerprint] = max(self.attempts.get(fingerprint, 0), lane.attempt)

    def newest_checkpoint(self, fingerprint: str) -> tuple[int, int]:
        return self.attempts.get(fingerprint, 0), self.saved.get(fingerprint, 0)

    def find_record(self, configuration: Configuration) -> Record | None:
        return self.records.get(configuration.fingerprint)


class Broker(RuleBasedStateMachine):
    """Trials and trainers under any order of events."""

    @initialize(
        pauses=st.booleans(),
        in_lockstep=st.booleans(),
        num_last=st.integers(1, 2),
        num_more=st.integers(0, 2 * LANES),
    )
    def start(self, pauses: bool, in_lockstep: bool, num_last: int, num_more: int) -> None:
        """Start a broker, three trials and a trainer.

        With `in_lockstep`, the trials in `teardown` ask for their next reports together. `num_last` is the
        number of trainers that are left then, and `num_more` that of the trials that are submitted then.
        """
        self.pauses, self.in_lockstep, self.num_last, self.num_more = pauses, in_lockstep, num_last, num_more
        self.store = FakeStore()
        self.records = self.store.records
        self.core = BrokerCore(self.store, "asha" if pauses else "none")
        self.num_moves = 0
        self.now = 0.0
        self.names = (f"s{i}" for i in itertools.count())
        self.trainers: list[FakeTrainer] = []
        self.zombies: list[FakeTrainer] = []
        self.trials: dict[str, tuple[Configuration, int]] = {}  # trial -> (configuration, last step seen)
        self.trial_names = (f"t{i}" for i in itertools.count())
        # The driver's list of stopped trials whose lanes have no record yet.
        self.pending_stops: dict[str, tuple[Configuration, int]] = {}
        self.asked: dict[str, int] = {}  # the last step after which a trial asked for a report
        for index in (0, 1, 2):  # the interesting orders need trials and a trainer
            self.submit(index)
        self.new_trainer()
        self.refill(self.trainers[0])

    def is_final(self, fingerprint: str) -> bool:
        return fingerprint in self.records and self.records[fingerprint].state != "stopped"

    # -- trials

    @rule(index=st.integers(0, len(POINTS) - 1))
    def submit(self, index: int) -> None:
        trial = next(self.trial_names)
        self.trials[trial] = (POINTS[index], 0)
        self.core.submit(trial, POINTS[index])
        self.forget_pending_stops(POINTS[index])

    @precondition(lambda self: self.trials)
    @rule(data=st.data())
    def ask(self, data: st.DataObject) -> None:
        self.asks(data.draw(st.sampled_from(sorted(self.trials))))

    def asks(self, trial: str) -> None:
        point, seen = self.trials[trial]
        fingerprint = point.fingerprint
        answer = self.core.next_report(fingerprint, seen)
        self.asked[fingerprint] = max(seen, self.asked.get(fingerprint, 0))
        if isinstance(answer, Report):
            assert answer.step > seen
            self.trials[trial] = (point, answer.step)
        elif answer is not None:
            if answer != "failed":
                assert self.records[fingerprint].state == answer, "the record is there before anyone is told"
            del self.trials[trial]
            self.core.release(trial)

    @precondition(lambda self: self.trials)
    @rule(data=st.data())
    def trial_fails(self, data: st.DataObject) -> None:
        trial = data.draw(st.sampled_from(sorted(self.trials)))
        del self.trials[trial]
        self.core.release(trial)

    @precondition(lambda self: self.pauses and self.trials)
    @rule(data=st.data())
    def scheduler_stops(self, data: st.DataObject) -> None:
        trial = data.draw(st.sampled_from(sorted(self.trials)))
        point, seen = self.trials.pop(trial)
        self.core.stop(trial, point, seen)
        if not any(point == other for other, _ in self.trials.values()):
            self.pending_stops[trial] = (point, seen)

    def forget_pending_stops(self, point: Configuration) -> None:
        """Forget the stops of a configuration that a trial has submitted again, so its lane need not end."""
        self.pending_stops = {
            trial: stopped for trial, stopped in self.pending_stops.items() if stopped[0] != point
        }

    @rule()
    def driver_looks(self) -> None:
        self.pending_stops = {
            t: pending_stops
            for t, pending_stops in self.pending_stops.items()
            if pending_stops[0].fingerprint not in self.records
        }

    # -- trainers

    @precondition(lambda self: len(self.trainers) < 3)
    @rule()
    def new_trainer(self) -> None:
        self.trainers.append(FakeTrainer(next(self.names)))

    @precondition(lambda self: self.trainers)
    @rule(data=st.data(), reply_lost=st.booleans(), evict_parked=st.booleans())
    def lease(self, data: st.DataObject, reply_lost: bool, evict_parked: bool) -> None:
        self.refill(data.draw(st.sampled_from(self.trainers)), reply_lost, evict_parked)

    def refill(self, trainer: FakeTrainer, reply_lost: bool = False, evict_parked: bool = True) -> None:
        """Lease lanes as the fine-tuning loop does, which returns long-parked lanes if it gets new ones."""
        self.core.exchange(trainer.name, *trainer.state, self.now)
        group_key = next((lane.configuration.group_key for lane in trainer.lanes.values()), None)
        long_parked = [f for f, lane in trainer.lanes.items() if lane.parked] if evict_parked else []
        free = LANES - len(trainer.lanes)
        if free + len(long_parked) == 0:
            return
        grant = self.core.lease(trainer.name, group_key, free + len(long_parked), self.now)
        assert len(grant.leases) <= free + len(long_parked)
        if not grant.leases and group_key is not None and len(long_parked) == len(trainer.lanes):
            group_key = None
            grant = self.core.lease(trainer.name, None, 1, self.now)
            assert len(grant.leases) <= 1
        leases = grant.leases
        assert not leases or not grant.closed
        group_keys = {lease.configuration.group_key for lease in leases}
        assert len(group_keys | {group_key} - {None}) <= 1
        if reply_lost:
            return
        if (
            group_keys == {lane.configuration.group_key for lane in trainer.lanes.values()}
            and not grant.requires_empty_group
        ):
            long_parked = long_parked[: max(0, len(leases) - free)]
        for fingerprint in long_parked if leases else []:
            lane = trainer.lanes.pop(fingerprint)
            self.store.save(fingerprint, lane)
            self.core.return_lease(trainer.name, fingerprint, lane.attempt)
        for lease in leases:
            fingerprint = lease.configuration.fingerprint
            assert fingerprint not in trainer.lanes
            assert lease.scheduler.startswith("asha" if self.pauses else "")
            step = self.store.saved.get(fingerprint, 0)
            trainer.lanes[fingerprint] = Lane(lease.attempt, lease.configuration, step)
        assert len(trainer.lanes) <= LANES
        group = [entry for entry in self.core.open_entries.values() if entry.trainer == trainer.name]
        assert len(group) == 1 or not any(entry.alone for entry in group), "it trains alone"

    @precondition(lambda self: any(len(one.lanes) > 1 for one in self.trainers))
    @rule(is_moved=st.booleans())
    def stay_idle(self, is_moved: bool) -> None:
        """An idle trainer asks for lanes until it may take over those of another trainer."""
        trainer = next((one for one in self.trainers if not one.lanes), FakeTrainer(next(self.names)))
        if trainer not in self.trainers:
            self.trainers.append(trainer)
        for _ in range(2):
            self.refill(trainer)
            self.now += timeouts.TAKEOVER_SECONDS
        self.refill(trainer)
        if is_moved:
            for victim in self.trainers:
                self.exchange_once(victim)
            self.refill(trainer)

    @precondition(lambda self: any(s.lanes for s in self.trainers + self.zombies))
    @rule(
        data=st.data(),
        end=st.sampled_from(["finished", "diverged", "failed"]),
        is_reported=st.booleans(),
        is_saved=st.booleans(),
    )
    def train(self, data: st.DataObject, end: str, is_reported: bool, is_saved: bool) -> None:
        """Repeat a report of one lane, or take one step and report it, or end the lane.

        The trainer may have been taken for dead.
        """
        trainer = data.draw(st.sampled_from([s for s in self.trainers + self.zombies if s.lanes]))
        free = [f for f, lane in sorted(trainer.lanes.items()) if not lane.parked]
        if free:
            self.turn(trainer, data.draw(st.sampled_from(free)), end, is_reported, is_saved)

    def turn(
        self,
        trainer: FakeTrainer,
        fingerprint: str,
        end: str,
        is_reported: bool = True,
        is_saved: bool = True,
    ) -> None:
        lane = trainer.lanes[fingerprint]
        if lane.reported == lane.step:
            if self.pauses:
                assert self.asked.get(fingerprint, 0) >= lane.step, "it runs ahead of Tune"
            if lane.step == STEPS:
                self.end(trainer, fingerprint, end, is_reported)
                return
            lane.step += 1
            trainer.taken += 1
            if is_saved:  # without it, the next attempt repeats some reports, as after a torn checkpoint
                self.store.save(fingerprint, lane)
        lane.reported += 1
        directives = self.core.exchange(trainer.name, *trainer.state, self.now)
        self.obey(trainer, fingerprint, directives[fingerprint])

    def end(self, trainer: FakeTrainer, fingerprint: str, end: str, is_reported: bool) -> None:
        lane = trainer.lanes[fingerprint]
        if end != "failed" and not self.is_final(fingerprint):
            self.records[fingerprint] = record(lane.configuration, end)
        if end == "failed" or is_reported:  # a trainer may die after its record, before this call
            del trainer.lanes[fingerprint]
            state = end if end == "failed" else self.records[fingerprint].state
            entry = self.core.entries.get(fingerprint)
            before = (entry.phase, entry.failures, entry.trainer, entry.attempt) if entry else None
            self.core.end_lease(trainer.name, fingerprint, lane.attempt, state)
            if before and end == "failed" and before[2:] != (trainer.name, lane.attempt):
                assert (entry.phase, entry.failures) == before[:2], "a zombie's failure counts for nothing"

    @precondition(lambda self: self.trainers + self.zombies)
    @rule(data=st.data())
    def exchange(self, data: st.DataObject) -> None:
        self.exchange_once(data.draw(st.sampled_from(self.trainers + self.zombies)))

    def exchange_once(self, trainer: FakeTrainer) -> None:
        directives = self.core.exchange(trainer.name, *trainer.state, self.now)
        assert set(directives) == set(trainer.lanes)
        if trainer.name in self.core.gone:
            assert set(directives.values()) <= {Directive.DROP}
        else:
            assert self.core.steps_taken[trainer.name] == trainer.taken
        for fingerprint, answer in directives.items():
            self.obey(trainer, fingerprint, answer)

    def obey(self, trainer: FakeTrainer, fingerprint: str, answer: Directive) -> None:
        lane = trainer.lanes[fingerprint]
        entry = self.core.entries.get(fingerprint)
        if answer is not Directive.DROP and entry is not None:
            assert (entry.trainer, entry.attempt) == (trainer.name, lane.attempt), "only the holder may go on"
            if answer in (Directive.CONTINUE, Directive.PARK):
                assert (answer is Directive.PARK) == (entry.phase is LeasePhase.PAUSED)
            assert answer is not Directive.STOP or entry.stop_step is not None
            leaves = trainer.name in self.core.draining or bool(entry.moves_to)
            assert answer is Directive.STOP or (answer is Directive.YIELD) == leaves
        lane.parked = answer is Directive.PARK
        if answer in (Directive.STOP, Directive.DROP, Directive.YIELD):
            del trainer.lanes[fingerprint]
            if answer is Directive.YIELD:
                self.num_moves += 1
                self.store.save(fingerprint, lane)
                self.core.return_lease(trainer.name, fingerprint, lane.attempt)
            if answer is Directive.STOP:
                assert lane.reported >= entry.stop_step, "the record has what the scheduler saw"
                if not self.is_final(fingerprint):
                    self.records[fingerprint] = record(lane.configuration, "stopped", lane.reported)
                state = self.records[fingerprint].state
                self.core.end_lease(trainer.name, fingerprint, lane.attempt, state)

    @precondition(lambda self: self.trainers)
    @rule(data=st.data(), noticed=st.booleans(), exit_kind=st.sampled_from(ExitKind), zombie=st.booleans())
    def die(self, data: st.DataObject, noticed: bool, exit_kind: ExitKind, zombie: bool) -> None:
        trainer = data.draw(st.sampled_from(self.trainers))
        self.trainers.remove(trainer)
        if noticed:
            self.core.trainer_exited(trainer.name, exit_kind, "it died")
            assert trainer.name not in self.core.trainers
        if zombie:
            self.zombies.append(trainer)

    @precondition(lambda self: self.trainers)
    @rule(data=st.data())
    def drain(self, data: st.DataObject) -> None:
        """Drain a trainer, which then gets no more lanes and holds none after its next exchange."""
        trainer = data.draw(st.sampled_from(self.trainers))
        self.core.draining.add(trainer.name)
        assert self.core.lease(trainer.name, None, LANES, self.now).closed
        self.exchange_once(trainer)
        assert not trainer.lanes
        self.exchange_once(trainer)  # the trainer no longer names the dropped lanes
        assert not any(entry.trainer == trainer.name for entry in self.core.entries.values())

    @rule(is_silent=st.booleans())
    def wait_long(self, is_silent: bool) -> None:
        """Wait until silent trainers are taken for dead. Others than those that died may be silent, too."""
        living = [] if is_silent else self.trainers
        for _ in range(9):
            self.now += timeouts.TRAINER_SILENT_SECONDS / 4
            for trainer in living:
                self.core.heartbeat(trainer.name, self.now)
            self.core.tick(self.now)
        if is_silent:
            assert not self.core.trainers
            self.zombies += self.trainers
            self.trainers = []

    # -- invariants

    @invariant()
    def a_lane_has_one_trainer(self) -> None:
        core = self.core
        for entry in core.entries.values():
            is_held = entry.phase in (LeasePhase.LEASED, LeasePhase.PAUSED)
            assert is_held == (entry.trainer in core.trainers)
            assert is_held or not entry.trainer
            assert entry.phase not in (LeasePhase.PAUSED, LeasePhase.RETURNED) or entry.pauses_after_report
            assert entry.failures <= MAX_FAILURES
            steps = [report.step for report in entry.reports]
            assert steps == sorted(set(steps))

    @invariant()
    def every_lane_on_no_trainer_is_wanted_or_owes_its_record(self) -> None:
        for entry in self.core.entries.values():
            if entry.phase is LeasePhase.WAITING:
                assert entry.is_wanted
                assert (
                    entry.stop_step is not None
                    or not entry.pauses_after_report
                    or entry.resume_after_step >= max((r.step for r in entry.reports), default=-1)
                )
            if entry.phase is LeasePhase.RETURNED:
                assert entry.trials
                assert entry.resume_after_step < entry.reports[-1].step

    def teardown(self) -> None:
        """Check that every trial gets the end of its lane, and every stopped lane a record.

        One living trainer must be enough for this. Of two, an idle one takes over lanes of the other.
        """
        if not hasattr(self, "core"):
            return
        self.driver_looks()
        self.wait_long(is_silent=True)
        self.zombies.clear()
        self.trainers = [FakeTrainer(f"last{number}") for number in range(self.num_last)]
        for seed in range(1, 1 + self.num_more):
            self.trials[next(self.trial_names)] = (configuration(seed=seed), 0)
        for trial, (point, _) in self.trials.items():
            self.core.submit(trial, point)
        self.num_moves = 0
        for _ in range(60 * len(POINTS)):
            self.now += timeouts.TAKEOVER_SECONDS
            least = min((seen for _, seen in self.trials.values()), default=0)
            for trial, (_, seen) in list(self.trials.items()):
                if not self.in_lockstep or seen == least:
                    self.asks(trial)
            for trainer in self.trainers:
                self.refill(trainer)
                self.exchange_once(trainer)
                for fingerprint in list(trainer.lanes):
                    if fingerprint in trainer.lanes and not trainer.lanes[fingerprint].parked:
                        self.turn(trainer, fingerprint, "finished")
        assert self.num_moves <= (MAX_MOVES if self.num_last > 1 else 0)
        assert not self.trials, "a trial waits for ever"
        assert not any(trainer.lanes for trainer in self.trainers)
        assert all(entry.phase is LeasePhase.ENDED for entry in self.core.entries.values())
        ends = [event for event in self.core.events if isinstance(event, EndedLane)]
        assert len(ends) == len({end.fingerprint for end in ends}), "a lane ends once"
        failed = {f for f, entry in self.core.entries.items() if entry.state == "failed"}
        pending_stops = {point.fingerprint for point, _ in self.pending_stops.values()}
        assert pending_stops <= set(self.records) | failed, "a stopped lane has no record"


Broker.TestCase.settings = settings(stateful_step_count=60)
TestBroker = Broker.TestCase
