"""The broker's state machine under random orders of submit, lease, report, park, death and release."""

from __future__ import annotations

import itertools

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from orchestrator.finetune.source import Answer, Report
from orchestrator.record.schema import FAILURES_ALLOWED
from orchestrator.schedule.broker_core import SILENT_SECONDS, UNSERVED_SECONDS, BrokerCore
from orchestrator.schedule.life import Phase
from orchestrator.study.configuration import (
    Batches,
    Configuration,
    ModelChoice,
    Optimizer,
    Schedule,
    TaskChoice,
    VariantChoice,
)

STEPS = 4  # a lane reports after each of its steps


def configuration(variant: str = "lora", rate: float = 1e-3, seed: int = 0) -> Configuration:
    return Configuration(
        VariantChoice(variant),
        TaskChoice("letters", "r0", 8, 8, 8, "exact_match", 0.0),
        ModelChoice("base", "c0"),
        Optimizer(rate),
        Schedule(STEPS),
        Batches(8),
        evaluations=STEPS,
        seed=seed,
    )


POINTS = [configuration(v, rate) for v in ("lora", "hira") for rate in (1e-4, 1e-3, 1e-2)]


class FakeSeat:
    """What a seat remembers: lane -> (attempt, configuration, step, parked)."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.lanes: dict[str, list] = {}


class Broker(RuleBasedStateMachine):
    """Trials and seats as they behave, in any order. `saved` plays the checkpoints, `final` the store."""

    @initialize(gated=st.booleans())
    def start(self, gated: bool) -> None:
        self.core = BrokerCore(scheduler="asha" if gated else "")
        self.now = 0.0
        self.names = (f"s{i}" for i in itertools.count())
        self.seats: list[FakeSeat] = []
        self.zombies: list[FakeSeat] = []
        self.saved: dict[str, int] = {}
        self.final: dict[str, str] = {}
        self.trials: dict[str, tuple[Configuration, int]] = {}  # trial -> (what it wants, last step it saw)
        self.trial_names = (f"t{i}" for i in itertools.count())

    # -- trials

    @rule(index=st.integers(0, len(POINTS) - 1))
    def submit(self, index: int) -> None:
        point = POINTS[index]
        if point.fingerprint in self.final:
            return  # the driver asks the store first
        trial = next(self.trial_names)
        self.trials[trial] = (point, 0)
        self.core.submit(trial, point, self.now)

    @precondition(lambda self: self.trials)
    @rule(data=st.data())
    def ask(self, data: st.DataObject) -> None:
        trial = data.draw(st.sampled_from(sorted(self.trials)))
        point, seen = self.trials[trial]
        try:
            answer = self.core.next(point.fingerprint, seen)
        except KeyError:  # the broker restarted
            self.core.submit(trial, point, self.now)
            return
        if isinstance(answer, Report):
            assert answer.step > seen
            self.trials[trial] = (point, answer.step)
        elif answer is not None:
            if answer in ("finished", "diverged"):
                assert self.final[point.fingerprint] == answer
            self.release(trial)

    @precondition(lambda self: self.trials)
    @rule(data=st.data())
    def end_trial(self, data: st.DataObject) -> None:
        self.release(data.draw(st.sampled_from(sorted(self.trials))))

    def release(self, trial: str) -> None:
        del self.trials[trial]
        self.core.release(trial, self.now)

    # -- seats

    @precondition(lambda self: len(self.seats) < 3)
    @rule()
    def new_seat(self) -> None:
        self.seats.append(FakeSeat(next(self.names)))

    @precondition(lambda self: self.seats)
    @rule(data=st.data(), reply_lost=st.booleans())
    def lease(self, data: st.DataObject, reply_lost: bool) -> None:
        seat = data.draw(st.sampled_from(self.seats))
        self.sign_of_life(seat)
        shapes = {c.shape for _, c, _, _ in seat.lanes.values()}
        assert len(shapes) <= 1
        room = 3 - len(seat.lanes)
        if not room:
            return
        offer = self.core.lease(seat.name, next(iter(shapes), None), room, self.now)
        assert len(offer.leases) <= room
        assert len(shapes | {lease.configuration.shape for lease in offer.leases}) <= 1
        for lease in () if reply_lost else offer.leases:
            fingerprint = lease.configuration.fingerprint
            assert fingerprint not in seat.lanes
            seat.lanes[fingerprint] = [
                lease.attempt,
                lease.configuration,
                self.saved.get(fingerprint, 0),
                False,
            ]

    @precondition(lambda self: any(s.lanes for s in self.seats + self.zombies))
    @rule(
        data=st.data(),
        end=st.sampled_from(["finished", "diverged", "failed"]),
        told=st.booleans(),
        whole=st.booleans(),
    )
    def train(self, data: st.DataObject, end: str, told: bool, whole: bool) -> None:
        """One step of one lane, a zombie's perhaps; then the report, or the end."""
        seat = data.draw(st.sampled_from([s for s in self.seats + self.zombies if s.lanes]))
        free = [f for f, lane in sorted(seat.lanes.items()) if not lane[3]]
        if not free:
            return
        fingerprint = data.draw(st.sampled_from(free))
        lane = seat.lanes[fingerprint]
        lane[2] += 1
        if lane[2] > STEPS:
            if end != "failed":
                self.final.setdefault(fingerprint, end)
            if end == "failed" or told:  # a record may be there before anyone is told, and the teller die
                del seat.lanes[fingerprint]
                state = end if end == "failed" else self.final[fingerprint]
                life = self.core.lives.get(fingerprint)
                before = (life.phase, life.failures, life.seat, life.attempt) if life else None
                self.core.done(seat.name, fingerprint, lane[0], state, self.now)
                if before and end == "failed" and before[2:] != (seat.name, lane[0]):
                    assert (life.phase, life.failures) == before[:2], "a zombie's failure counts for nothing"
            else:
                lane[2] = STEPS
            return
        if whole:  # a torn checkpoint: the next attempt repeats some reports
            self.saved[fingerprint] = max(self.saved.get(fingerprint, 0), lane[2])
        report = Report(fingerprint, lane[0], lane[2], {"loss": 1.0}, 1.0)
        self.obey(seat, fingerprint, self.core.report(seat.name, report, self.now))

    @precondition(lambda self: self.seats + self.zombies)
    @rule(data=st.data())
    def exchange(self, data: st.DataObject) -> None:
        self.sign_of_life(data.draw(st.sampled_from(self.seats + self.zombies)))

    def sign_of_life(self, seat: FakeSeat) -> None:
        held = {f: (lane[0], lane[1]) for f, lane in seat.lanes.items()}
        answers = self.core.exchange(seat.name, held, self.now)
        assert set(answers) == set(held)
        for fingerprint, answer in answers.items():
            self.obey(seat, fingerprint, answer)

    def obey(self, seat: FakeSeat, fingerprint: str, answer: Answer) -> None:
        lane = seat.lanes[fingerprint]
        life = self.core.lives.get(fingerprint)
        if answer is not Answer.DROP and life is not None:
            assert (life.seat, life.attempt) == (seat.name, lane[0]), "only the holder of the lease may go on"
            assert answer is Answer.STOP or (answer is Answer.PARK) == (life.phase is Phase.PARKED)
        lane[3] = answer is Answer.PARK
        if answer in (Answer.STOP, Answer.DROP):
            del seat.lanes[fingerprint]
            if answer is Answer.STOP:
                self.core.done(seat.name, fingerprint, lane[0], "stopped", self.now)

    @precondition(lambda self: self.seats)
    @rule(data=st.data(), noticed=st.booleans(), zombie=st.booleans())
    def die(self, data: st.DataObject, noticed: bool, zombie: bool) -> None:
        seat = data.draw(st.sampled_from(self.seats))
        self.seats.remove(seat)
        if noticed:
            self.core.seat_gone(seat.name, self.now)
        if zombie:
            self.zombies.append(seat)

    @rule()
    def wait_long(self) -> None:
        self.now += SILENT_SECONDS + UNSERVED_SECONDS
        self.core.tick(self.now)

    @rule()
    def broker_restarts(self) -> None:
        self.core = BrokerCore(lambda f: self.saved.get(f, 0), scheduler=self.core.scheduler)

    # -- what must hold

    @invariant()
    def a_lane_has_one_seat(self) -> None:
        core = self.core
        for fingerprint, life in core.lives.items():
            leased = life.phase in (Phase.LEASED, Phase.PARKED)
            holders = [
                name for name, view in core.seats.items() if fingerprint in view.lanes and name == life.seat
            ]
            assert len(holders) == leased
            assert life.phase is not Phase.PARKED or life.gated
            assert life.failures <= FAILURES_ALLOWED
            steps = [report.step for report in life.reports]
            assert steps == sorted(set(steps))

    @invariant()
    def every_wanted_lane_is_known_or_to_be_submitted_again(self) -> None:
        for life in self.core.lives.values():
            if life.phase is Phase.WAITING:
                assert life.trials

    def teardown(self) -> None:
        """Left alone with one good seat, every trial learns how its lane ended."""
        if not hasattr(self, "core"):
            return
        self.wait_long()
        self.zombies.clear()
        seat = FakeSeat("last")
        self.seats = [seat]
        for _ in range(40 * len(POINTS)):
            if not self.trials:
                break
            for trial, (point, seen) in list(self.trials.items()):
                try:
                    answer = self.core.next(point.fingerprint, seen)
                except KeyError:
                    self.core.submit(trial, point, self.now)
                    continue
                if isinstance(answer, Report):
                    self.trials[trial] = (point, answer.step)
                elif answer is not None:
                    self.release(trial)
            shapes = {c.shape for _, c, _, _ in seat.lanes.values()}
            for lease in self.core.lease(
                "last", next(iter(shapes), None), 3 - len(seat.lanes), self.now
            ).leases:
                f = lease.configuration.fingerprint
                seat.lanes[f] = [lease.attempt, lease.configuration, self.saved.get(f, 0), False]
            held = {f: (lane[0], lane[1]) for f, lane in seat.lanes.items()}
            for f, answer in self.core.exchange("last", held, self.now).items():
                self.obey(seat, f, answer)
            for f, lane in list(seat.lanes.items()):
                if lane[3]:
                    continue
                lane[2] += 1
                if lane[2] > STEPS:
                    del seat.lanes[f]
                    self.final.setdefault(f, "finished")
                    self.core.done("last", f, lane[0], self.final[f], self.now)
                else:
                    self.obey(
                        seat, f, self.core.report("last", Report(f, lane[0], lane[2], {}, 1.0), self.now)
                    )
        assert not self.trials, "a trial waits for ever"


Broker.TestCase.settings = settings(max_examples=300, stateful_step_count=60, deadline=None)
TestBroker = Broker.TestCase


def test_a_seat_refills_its_shape_then_takes_the_shape_with_most_waiting() -> None:
    core = BrokerCore()
    for i, (variant, rate) in enumerate(
        [("lora", 1e-3), ("hira", 1e-3), ("hira", 1e-2), ("lora", 1e-2), ("hira", 1e-1)]
    ):
        core.submit(f"t{i}", configuration(variant, rate), 0.0)
    first = core.lease("a", None, 2, 0.0)
    assert [lease.configuration.variant.name for lease in first.leases] == ["hira", "hira"]
    shape = first.leases[0].configuration.shape
    assert [lease.configuration.variant.name for lease in core.lease("a", shape, 2, 0.0).leases] == ["hira"]
    assert core.lease("a", shape, 1, 0.0).leases == ()
    assert [lease.configuration.variant.name for lease in core.lease("b", None, 4, 0.0).leases] == [
        "lora",
        "lora",
    ]


def test_a_shape_that_waits_too_long_gets_the_seat_with_fewest_lanes() -> None:
    core = BrokerCore()
    for i, rate in enumerate((1e-4, 1e-3, 1e-2)):
        core.submit(f"t{i}", configuration("lora", rate), 0.0)
    shape = core.lease("a", None, 2, 0.0).leases[0].configuration.shape
    core.lease("b", None, 1, 0.0)
    core.submit("t8", configuration("hira"), 0.0)
    core.submit("t9", configuration("lora", 1e-1), 0.0)
    late = UNSERVED_SECONDS + 1
    core.exchange(
        "a", {f: (core.lives[f].attempt, core.configurations[f]) for f in core.seats["a"].lanes}, late
    )
    assert core.lease("b", shape, 1, late).leases == (), "b drains its pack for the unserved shape"
    assert len(core.lease("a", shape, 1, late).leases) == 1, "a goes on with its own"
    (fingerprint,) = core.seats["b"].lanes
    core.done("b", fingerprint, core.lives[fingerprint].attempt, "finished", late)
    assert [lease.configuration.variant.name for lease in core.lease("b", None, 2, late).leases] == ["hira"]


def test_a_failed_lane_is_tried_again_twice_at_most() -> None:
    core = BrokerCore()
    point = configuration()
    core.submit("t", point, 0.0)
    for _ in range(FAILURES_ALLOWED):
        (lease,) = core.lease("a", None, 1, 0.0).leases
        core.done("a", point.fingerprint, lease.attempt, "failed", 0.0)
    assert core.lease("a", None, 1, 0.0).leases == ()
    assert core.next(point.fingerprint, 0) == "failed"
    assert core.ended == [(point.fingerprint, "failed")]


def test_closed_is_said_only_when_nothing_waits() -> None:
    core = BrokerCore()
    core.submit("t", configuration(), 0.0)
    core.closed = True
    assert not core.lease("a", None, 1, 0.0).closed
    assert core.lease("a", configuration().shape, 1, 0.0).closed


def test_a_zombie_is_told_to_drop_its_lane_and_counts_for_nothing_but_a_final_record() -> None:
    core = BrokerCore()
    point = configuration()
    core.submit("t", point, 0.0)
    (old,) = core.lease("zombie", None, 1, 0.0).leases
    core.seat_gone("zombie", 1.0)
    (new,) = core.lease("b", None, 1, 1.0).leases
    assert new.attempt != old.attempt
    report = Report(point.fingerprint, old.attempt, 1, {}, 1.0)
    assert core.report("zombie", report, 2.0) is Answer.DROP
    assert core.next(point.fingerprint, 0) is None
    core.done("zombie", point.fingerprint, old.attempt, "failed", 2.0)
    assert core.lives[point.fingerprint].failures == 0
    held = {point.fingerprint: (old.attempt, point)}
    assert core.exchange("zombie", held, 2.0) == {point.fingerprint: Answer.DROP}
    core.done(
        "zombie", point.fingerprint, old.attempt, "finished", 3.0
    )  # its record is in the store: it counts
    assert core.next(point.fingerprint, 0) == "finished"
    held = {point.fingerprint: (new.attempt, point)}
    assert core.exchange("b", held, 3.0) == {point.fingerprint: Answer.DROP}
