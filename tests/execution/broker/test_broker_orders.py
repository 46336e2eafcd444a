"""The broker under random orders of submissions, leases, reports, pauses, deaths and releases."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from points import POINTS, STEPS, record

from orchestrator.execution.broker.core import BrokerCore
from orchestrator.execution.broker.failure_policy import ExitKind
from orchestrator.execution.broker.lane_entry import HeldLane, LeasePhase
from orchestrator.finetune.engine.lane_source import Directive, Report
from orchestrator.record.schema import MAX_FAILURES, Record
from orchestrator.study.configuration import Configuration
from orchestrator.util import timeouts


@dataclass
class Lane:
    """A lane on a trainer. After a resumption it reports again what its checkpoint contains."""

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
                lane.configuration,
                Report(f, lane.attempt, lane.reported, {"loss": 1.0}, 1.0) if lane.reported else None,
            )
            for f, lane in self.lanes.items()
        }


class Broker(RuleBasedStateMachine):
    """Trials and trainers in any order of events. `saved` stands for checkpoints, `records` for the store."""

    @initialize(gated=st.booleans(), in_step=st.booleans())
    def start(self, gated: bool, in_step: bool) -> None:
        """`in_step`: in the end, as under Hyperband, no trial asks on before all have come as far."""
        self.gated, self.in_step = gated, in_step
        self.records: dict[str, Record] = {}
        self.saved: dict[str, int] = {}
        self.now = 0.0
        self.names = (f"s{i}" for i in itertools.count())
        self.trainers: list[FakeTrainer] = []
        self.zombies: list[FakeTrainer] = []
        self.trials: dict[str, tuple[Configuration, int]] = {}  # trial -> (what it wants, last step it saw)
        self.trial_names = (f"t{i}" for i in itertools.count())
        # As the driver has it: trials that the scheduler stopped, whose record is to come.
        self.owed: dict[str, tuple[Configuration, int]] = {}
        self.asked: dict[str, int] = {}  # the last step beyond which a trial has asked
        self.told: BrokerCore | None = None  # which broker the driver has told what is owed
        self.broker_restarts()
        for index in (0, 1, 2):  # not empty: what matters happens between trainers and trials that are there
            self.submit(index)
        self.new_trainer()
        self.refill(self.trainers[0])

    def known(self, configuration: Configuration) -> Record | None:
        return self.records.get(configuration.fingerprint)

    def final(self, fingerprint: str) -> bool:
        return fingerprint in self.records and self.records[fingerprint].state != "stopped"

    # -- trials

    @rule(index=st.integers(0, len(POINTS) - 1))
    def submit(self, index: int) -> None:
        trial = next(self.trial_names)
        self.trials[trial] = (POINTS[index], 0)
        self.core.submit(trial, POINTS[index], self.now)
        self.forget_owed(POINTS[index])

    @precondition(lambda self: self.trials)
    @rule(data=st.data())
    def ask(self, data: st.DataObject) -> None:
        self.asks(data.draw(st.sampled_from(sorted(self.trials))))

    def asks(self, trial: str) -> None:
        point, seen = self.trials[trial]
        fingerprint = point.fingerprint
        try:
            answer = self.core.next_report(fingerprint, seen, self.now)
        except KeyError:  # the broker restarted
            self.core.submit(trial, point, self.now)
            self.forget_owed(point)
            return
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

    @precondition(lambda self: self.gated and self.trials)
    @rule(data=st.data())
    def scheduler_stops(self, data: st.DataObject) -> None:
        trial = data.draw(st.sampled_from(sorted(self.trials)))
        point, seen = self.trials.pop(trial)
        self.core.stop(trial, point, seen, self.now)
        if not any(point == other for other, _ in self.trials.values()):
            self.owed[trial] = (point, seen)

    def forget_owed(self, point: Configuration) -> None:
        """It is wanted again: what was stopped need not end."""
        self.owed = {trial: stopped for trial, stopped in self.owed.items() if stopped[0] != point}

    @rule()
    def driver_looks(self) -> None:
        if self.told is not self.core:
            for trial, stopped in self.owed.items():
                self.core.stop(trial, *stopped, self.now)
            self.told = self.core
        self.owed = {t: owed for t, owed in self.owed.items() if owed[0].fingerprint not in self.records}

    # -- trainers

    @precondition(lambda self: len(self.trainers) < 3)
    @rule()
    def new_trainer(self) -> None:
        self.trainers.append(FakeTrainer(next(self.names)))

    @precondition(lambda self: self.trainers)
    @rule(data=st.data(), reply_lost=st.booleans(), spilling=st.booleans())
    def lease(self, data: st.DataObject, reply_lost: bool, spilling: bool) -> None:
        self.refill(data.draw(st.sampled_from(self.trainers)), reply_lost, spilling)

    def refill(self, trainer: FakeTrainer, reply_lost: bool = False, spilling: bool = True) -> None:
        """As the loop does it: lanes that have been parked for long make way for those that are leased."""
        self.core.exchange(trainer.name, trainer.held, trainer.taken, self.now)
        shape = next((lane.configuration.group_key for lane in trainer.lanes.values()), None)
        late = [f for f, lane in trainer.lanes.items() if lane.parked] if spilling else []
        free = 3 - len(trainer.lanes)
        if free + len(late) == 0:
            return
        offer = self.core.lease(trainer.name, shape, free + len(late), self.now)
        assert len(offer.leases) <= free + len(late)
        if not offer.leases and shape is not None and len(late) == len(trainer.lanes):
            shape = None
            offer = self.core.lease(trainer.name, None, 1, self.now)
            assert len(offer.leases) <= 1
        leases = offer.leases
        assert not leases or not offer.closed
        shapes = {lease.configuration.group_key for lease in leases}
        assert len(shapes | {shape} - {None}) <= 1
        if reply_lost:
            return
        # Given up for dead and leased again, to the same trainer: the newer lease counts.
        gone = {lease.configuration.fingerprint for lease in leases} & set(trainer.lanes)
        late = [f for f in late if f not in gone]
        if (
            shapes == {lane.configuration.group_key for lane in trainer.lanes.values()}
            and not offer.requires_empty_group
        ):
            late = late[: max(0, len(leases) - len(gone) - free)]
        for fingerprint in late if leases else []:
            self.core.return_lease(
                trainer.name, fingerprint, trainer.lanes.pop(fingerprint).attempt, self.now
            )
        for lease in leases:
            fingerprint = lease.configuration.fingerprint
            assert fingerprint not in trainer.lanes or lease.attempt > trainer.lanes[fingerprint].attempt
            assert lease.scheduler.startswith("asha" if self.gated else "")
            step = self.saved.get(fingerprint, 0)
            trainer.lanes[fingerprint] = Lane(lease.attempt, lease.configuration, step)
        assert len(trainer.lanes) <= 3

    @precondition(lambda self: any(s.lanes for s in self.trainers + self.zombies))
    @rule(
        data=st.data(),
        after_restart=st.sampled_from([False, False, False, True]),
        end=st.sampled_from(["finished", "diverged", "failed"]),
        told=st.booleans(),
        whole=st.booleans(),
    )
    def train(self, data: st.DataObject, after_restart: bool, end: str, told: bool, whole: bool) -> None:
        """One report that is owed or one step of one lane, a zombie's perhaps, and its report, or the end.
        It may be the first that a broker which has restarted hears."""
        trainer = data.draw(st.sampled_from([s for s in self.trainers + self.zombies if s.lanes]))
        free = [f for f, lane in sorted(trainer.lanes.items()) if not lane.parked]
        if after_restart:
            self.broker_restarts()
        if free:
            self.turn(trainer, data.draw(st.sampled_from(free)), end, told, whole)

    def turn(
        self, trainer: FakeTrainer, fingerprint: str, end: str, told: bool = True, whole: bool = True
    ) -> None:
        lane = trainer.lanes[fingerprint]
        if lane.reported == lane.step:
            if self.gated:
                assert self.asked.get(fingerprint, 0) >= lane.step, "it runs ahead of Tune"
            if lane.step == STEPS:
                self.end(trainer, fingerprint, end, told)
                return
            lane.step += 1
            trainer.taken += 1
            if whole:  # a torn checkpoint: the next attempt repeats some reports
                self.saved[fingerprint] = max(self.saved.get(fingerprint, 0), lane.step)
        lane.reported += 1
        answers = self.core.exchange(trainer.name, trainer.held, trainer.taken, self.now)
        self.obey(trainer, fingerprint, answers[fingerprint])

    def end(self, trainer: FakeTrainer, fingerprint: str, end: str, told: bool) -> None:
        lane = trainer.lanes[fingerprint]
        if end != "failed" and not self.final(fingerprint):
            self.records[fingerprint] = record(lane.configuration, end)
        if end == "failed" or told:  # a record may be there before anyone is told, and the teller die
            del trainer.lanes[fingerprint]
            state = end if end == "failed" else self.records[fingerprint].state
            life = self.core.entries.get(fingerprint)
            before = (life.phase, life.failures, life.trainer_id, life.attempt) if life else None
            self.core.end_lease(trainer.name, fingerprint, lane.attempt, state, self.now)
            if before and end == "failed" and before[2:] != (trainer.name, lane.attempt):
                assert (life.phase, life.failures) == before[:2], "a zombie's failure counts for nothing"

    @precondition(lambda self: self.trainers + self.zombies)
    @rule(data=st.data())
    def exchange(self, data: st.DataObject) -> None:
        self.sign_of_life(data.draw(st.sampled_from(self.trainers + self.zombies)))

    def sign_of_life(self, trainer: FakeTrainer) -> None:
        answers = self.core.exchange(trainer.name, trainer.held, trainer.taken, self.now)
        assert set(answers) == set(trainer.lanes)
        assert self.core.steps_taken[trainer.name] == trainer.taken
        for fingerprint, answer in answers.items():
            self.obey(trainer, fingerprint, answer)

    def obey(self, trainer: FakeTrainer, fingerprint: str, answer: Directive) -> None:
        lane = trainer.lanes[fingerprint]
        life = self.core.entries.get(fingerprint)
        if answer is not Directive.DROP and life is not None:
            assert (life.trainer_id, life.attempt) == (trainer.name, lane.attempt), (
                "only the holder may go on"
            )
            if answer in (Directive.CONTINUE, Directive.PARK):
                assert (answer is Directive.PARK) == (life.phase is LeasePhase.PAUSED)
            assert answer is not Directive.STOP or life.is_stopped
            assert answer is Directive.STOP or (answer is Directive.YIELD) == (
                trainer.name in self.core.draining
            )
        lane.parked = answer is Directive.PARK
        if answer in (Directive.STOP, Directive.DROP, Directive.YIELD):
            del trainer.lanes[fingerprint]
            if answer is Directive.YIELD:
                self.saved[fingerprint] = max(self.saved.get(fingerprint, 0), lane.step)
                self.core.return_lease(trainer.name, fingerprint, lane.attempt, self.now)
            if answer is Directive.STOP:
                assert lane.reported >= life.stop_step, "the record has what the scheduler saw"
                if not self.final(fingerprint):
                    self.records[fingerprint] = record(lane.configuration, "stopped", lane.reported)
                state = self.records[fingerprint].state
                self.core.end_lease(trainer.name, fingerprint, lane.attempt, state, self.now)

    @precondition(lambda self: self.trainers)
    @rule(data=st.data(), noticed=st.booleans(), how=st.sampled_from(ExitKind), zombie=st.booleans())
    def die(self, data: st.DataObject, noticed: bool, how: ExitKind, zombie: bool) -> None:
        trainer = data.draw(st.sampled_from(self.trainers))
        self.trainers.remove(trainer)
        if noticed:
            self.core.trainer_exited(trainer.name, self.now, how)
            assert trainer.name not in self.core.trainers
        if zombie:
            self.zombies.append(trainer)

    @precondition(lambda self: self.trainers)
    @rule(data=st.data())
    def vacate(self, data: st.DataObject) -> None:
        """It is given nothing more, and has nothing when it has heard of it."""
        trainer = data.draw(st.sampled_from(self.trainers))
        self.core.drain(trainer.name)
        assert self.core.lease(trainer.name, None, 3, self.now).closed
        self.sign_of_life(trainer)
        assert not trainer.lanes
        self.sign_of_life(trainer)  # what it was told to drop, it no longer names
        assert not any(life.trainer_id == trainer.name for life in self.core.entries.values())

    @rule()
    def wait_long(self) -> None:
        self.now += timeouts.TRAINER_SILENT_SECONDS + timeouts.STARVATION_SECONDS
        self.core.tick(self.now)

    @rule()
    def broker_restarts(self) -> None:
        self.core = BrokerCore(
            lambda f: self.saved.get(f, 0),
            find_record=self.known,
            scheduler="asha" if self.gated else "none",
            checkpoint_step=lambda f: self.saved.get(f, 0),
        )

    # -- what must hold

    @invariant()
    def a_lane_has_one_trainer(self) -> None:
        core = self.core
        for fingerprint, life in core.entries.items():
            leased = life.phase in (LeasePhase.LEASED, LeasePhase.PAUSED)
            holders = [
                name
                for name, view in core.trainers.items()
                if fingerprint in view.lanes and name == life.trainer_id
            ]
            assert len(holders) == leased
            assert life.phase not in (LeasePhase.PAUSED, LeasePhase.RETURNED) or life.pauses_after_report
            assert life.failures <= MAX_FAILURES
            steps = [report.step for report in life.reports]
            assert steps == sorted(set(steps))

    @invariant()
    def every_lane_on_no_trainer_is_wanted_or_owes_its_record(self) -> None:
        for life in self.core.entries.values():
            if life.phase is LeasePhase.WAITING:
                assert life.trials or life.is_stopped
                assert (
                    life.is_stopped
                    or not life.pauses_after_report
                    or life.resume_after_step >= max((r.step for r in life.reports), default=-1)
                )
            if life.phase is LeasePhase.RETURNED:
                assert life.trials
                assert life.resume_after_step < life.reports[-1].step

    def teardown(self) -> None:
        """Left alone with one good trainer, every trial learns how its lane ended, and no record is owed."""
        if not hasattr(self, "core"):
            return
        self.driver_looks()
        self.wait_long()
        self.zombies.clear()
        trainer = FakeTrainer("last")
        self.trainers = [trainer]
        for _ in range(60 * len(POINTS)):
            least = min((seen for _, seen in self.trials.values()), default=0)
            for trial, (_, seen) in list(self.trials.items()):
                if not self.in_step or seen == least:
                    self.asks(trial)
            self.refill(trainer)
            self.sign_of_life(trainer)
            for fingerprint, lane in list(trainer.lanes.items()):
                if not lane.parked:
                    self.turn(trainer, fingerprint, "finished")
        assert not self.trials, "a trial waits for ever"
        assert not trainer.lanes
        assert all(life.phase is LeasePhase.ENDED for life in self.core.entries.values())
        failed = {f for f, life in self.core.entries.items() if life.state == "failed"}
        owed = {point.fingerprint for point, _ in self.owed.values()}
        assert owed <= set(self.records) | failed, "a stopped lane has no record"


Broker.TestCase.settings = settings(stateful_step_count=60)
TestBroker = Broker.TestCase
