"""The broker's mind: which seat trains which lane. A plain state machine; time comes in as an argument.

Lanes are keyed by fingerprint. A seat is known by its incarnation (a new process is a new seat). Nothing here
is the truth: records are, in the store. After a restart trials submit again and seats say what they hold.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from orchestrator.execution.broker.lane_entry import ORPHAN_SECONDS, Life, Phase
from orchestrator.execution.trainers.exit_status import Deaths, How
from orchestrator.execution.tune.rungs import settings
from orchestrator.finetune.engine.lane_source import Answer, Lease, Offer, Report
from orchestrator.record.schema import Record, State
from orchestrator.study.configuration import Configuration

SILENT_SECONDS = 60.0  # a seat that says nothing for so long has lost its lanes
UNSERVED_SECONDS = 60.0  # a shape, or a suspect, that waits for so long is given a seat
FAILING = 3  # failures in a row of a shape's lanes: so many end a seat, see finetune/loop.py

Held = tuple[int, Configuration, Report | None]
"""A lane as its seat names it: attempt, configuration, the last report of this attempt."""


@dataclass
class SeatView:
    """What the broker knows of a seat. `yields_to`: a shape for which it drains its pack."""

    heard: float
    shape: str | None = None
    yields_to: str | None = None
    lanes: set[str] = field(default_factory=set)


class BrokerCore:
    def __init__(
        self,
        newest_attempt: Callable[[str], int] = lambda fingerprint: 0,
        failures: Callable[[str], int] = lambda fingerprint: 0,
        known: Callable[[Configuration], Record | None] = lambda configuration: None,
        scheduler: str = "none",
        give_up: Callable[[Life, Configuration, str], State] = lambda life, configuration, why: "failed",
        saved: Callable[[str], int] = lambda fingerprint: 0,
    ) -> None:
        """`newest_attempt`: the highest attempt that left checkpoints, so that a new one has its own folder.
        `failures`: how often a lane has failed before, whoever trained it.
        `known`: the record that answers a request, if there is one.
        `scheduler`: the study's early stopping; with any, lanes park after a report.
        `give_up`: writes the record of a lane that crashes whatever seat trains it; returns the state of the
        record that counts.
        `saved`: the step of a lane's newest checkpoint, 0 without one."""
        self.newest_attempt, self.failures, self.known = newest_attempt, failures, known
        self.scheduler, self.give_up, self.saved = scheduler, give_up, saved
        self.lives: dict[str, Life] = {}
        self.open: dict[str, Life] = {}
        """Those that have not ended: what is gone through at every lease must not grow with the study."""
        self.configurations: dict[str, Configuration] = {}
        self.seats: dict[str, SeatView] = {}
        self.ended: list[tuple[str, State]] = []
        """Every lane that ended, in order: the driver reads on from where it was."""
        self.taken: dict[str, int] = {}
        """Optimizer steps that each seat has taken, also of those that are gone."""
        self.closed = False
        self.vacated: set[str] = set()
        """Names of seats that have to go."""
        self.all_vacated = False
        self.cases = 0
        self.deaths = Deaths()
        self.failing: Counter[str] = Counter()
        """Shape -> failures in a row of its lanes, and crashes of their seats."""
        self.silent: dict[str, float] = {}
        """Name of a seat that was taken for dead, and has said nothing since -> since when."""

    # -- trials -----------------------------------------------------------------------------------------

    def submit(self, trial: str, configuration: Configuration, now: float) -> None:
        """A trial wants this configuration. One that is in training is joined, one whose result is known
        replays it."""
        self._life(configuration, now).want(trial, now)

    def next(self, fingerprint: str, after: int, now: float) -> Report | State | None:
        """See Life.ask. Raises KeyError when the lane is unknown (the broker restarted: submit again)."""
        return self.lives[fingerprint].ask(after, now)

    def release(self, trial: str) -> None:
        """The trial has ended, but not by the scheduler's word. Its lane is dropped unless others want it."""
        for fingerprint in [f for f, life in self.open.items() if trial in life.trials]:
            self.open[fingerprint].trials.discard(trial)
            self._forget_unwanted(fingerprint)

    def stop(self, trial: str, configuration: Configuration, seen: int, now: float) -> None:
        """The scheduler has stopped the trial at the report of step `seen`. Its lane ends early, with a
        record, unless others want it; also when it is on no seat, or unknown because the broker restarted."""
        life = self._life(configuration, now)
        life.trials.discard(trial)
        if not life.trials:
            life.stop(seen, now)

    # -- seats ------------------------------------------------------------------------------------------

    def lease(self, seat: str, shape: str | None, room: int, now: float) -> Offer:
        """Lanes for a seat that has just said, by `exchange`, what it holds. Lanes that are suspected of a
        crash share a pack with none but suspects of the same, and not with too many of them."""
        view = self._hear(seat, now)
        if self._has_to_go(seat):
            return Offer(closed=True)
        if shape is not None or not view.lanes:
            view.shape = shape
        self._serve_the_unserved(now)
        waiting = [life for life in self.open.values() if life.needs_seat]
        pack = self._held(seat)
        mates = list(pack)
        if shape is None:
            mates = []
            shape, view.yields_to = self._choose(view, waiting), None
        elif view.yields_to is not None:
            return Offer()
        leases: list[Lease] = []
        apart = False
        for life in sorted(waiting, key=_suspects_first):
            if life.shape == shape and len(leases) < room and _may_join(life, mates):
                mates.append(life)
                apart = apart or not _may_join(life, pack)
                attempt = max(life.attempt, self.newest_attempt(life.fingerprint)) + 1
                life.lease(seat, attempt)
                view.shape = shape
                view.lanes.add(life.fingerprint)
                configuration = self.configurations[life.fingerprint]
                leases.append(Lease(configuration, attempt, settings(self.scheduler, configuration)))
        return Offer(tuple(leases), closed=self.closed and not waiting, apart=apart)

    def alive(self, seat: str, now: float) -> None:
        """A sign of life from a seat that is too busy for more."""
        self.silent.pop(name_of(seat), None)
        if seat in self.seats:
            self.seats[seat].heard = now

    def exchange(self, seat: str, held: Mapping[str, Held], taken: int, now: float) -> dict[str, Answer]:
        """The seat names all that it holds, by fingerprint. What it should hold and does not name never
        reached it, and goes back to the queue. What it holds and nobody else was given meanwhile (the broker
        restarted, the seat was silent for a while) it keeps. `taken`: see Source."""
        view = self._hear(seat, now)
        if taken > self.taken.get(seat, 0):
            self.deaths.step()
        self.taken[seat] = max(taken, self.taken.get(seat, 0))
        for fingerprint, (attempt, configuration, report) in held.items():
            orphan = fingerprint not in self.lives
            life = self._life(configuration, now)
            if orphan:
                life.orphan_until = now + ORPHAN_SECONDS
            if life.phase is Phase.WAITING and life.attempt <= attempt:
                life.lease(seat, attempt)
                view.lanes.add(fingerprint)
                view.shape = view.shape or configuration.shape
            if report is not None and life.report(seat, report):
                self._got_on(configuration.shape)
        for fingerprint in view.lanes - set(held):
            view.lanes.discard(fingerprint)
            self._lose(seat, fingerprint, now)
        answers = {f: self.lives[f].answer(seat, attempt, now) for f, (attempt, _, _) in held.items()}
        if self._has_to_go(seat):
            answers |= {f: Answer.LEAVE for f, a in answers.items() if a in (Answer.GO, Answer.PARK)}
        return answers

    def spill(self, seat: str, fingerprint: str, attempt: int, now: float) -> None:
        """See Source.spill."""
        view = self._hear(seat, now)
        life = self.lives.get(fingerprint)
        if life is not None and life.held_by(seat, attempt):
            view.lanes.discard(fingerprint)
            life.wait(now)
            self._forget_unwanted(fingerprint)

    def done(self, seat: str, fingerprint: str, attempt: int, state: State, now: float) -> None:
        view = self._hear(seat, now)
        life = self.lives.get(fingerprint)
        if life is None or not (life.seat == seat and life.attempt != attempt):
            view.lanes.discard(fingerprint)  # else it has it anew, and only the old lease has ended
        if life is None or life.phase is Phase.ENDED:
            return
        if state != "failed":
            self._got_on(life.shape)
        elif life.held_by(seat, attempt):
            self.failing[life.shape] += 1
        life.done(seat, attempt, state, now)
        if life.state is not None:
            self._over(fingerprint, life.state)
        else:
            self._forget_unwanted(fingerprint)

    def vacate(self, name: str | None) -> None:
        """The seats of this name (all incarnations, also to come; None: all seats) save their lanes, give
        them back and end. A broker that restarts has to be told again."""
        if name is None:
            self.all_vacated = True
        else:
            self.vacated.add(name)

    def seat_ended(self, name: str, now: float, how: How, reason: str = "") -> None:
        """All incarnations of the seat `name` are gone; `how`, and why, they came to their end."""
        self.silent.pop(name, None)
        seats = [seat for seat in self.seats if name_of(seat) == name]
        told = [self.seat_gone(seat, now, how, reason) for seat in seats]
        if how in (How.DONE, How.NO_ROOM, How.LOST) or any(told):
            return
        if how is How.ALIKE and any(self.failing[life.shape] < FAILING for life in self.open.values()):
            return  # there are others to train
        self.deaths.died()

    def seat_gone(self, seat: str, now: float, how: How = How.DONE, reason: str = "") -> bool:
        """The seat has ended or died: its lanes go back to the queue. If it crashed, perhaps for what one of
        them did, they are suspected of it. Returns whether this narrows down which."""
        held = self._held(seat)
        self.seats.pop(seat, None)
        crashed, suspicious = how is How.CRASHED, how in (How.CRASHED, How.MEMORY)
        if held and how not in (How.DONE, How.LOST):
            further = [life.left(self.saved(life.fingerprint)) for life in held]
            if any(further):
                self.deaths.gain()
            self.failing[held[0].shape] += crashed
        self.cases += suspicious
        for life in held:
            if suspicious:
                life.suspect(self.cases, len(held), counts=crashed)
            if crashed and life.guilty:
                why = f"its seat's process died while it trained alone: {reason or 'it did not say why'}"
                state = self.give_up(life, self.configurations[life.fingerprint], why)
                self.deaths.guilty()
                life.give_up(state)
                self._over(life.fingerprint, state)
            else:
                self._lose(seat, life.fingerprint, now)
        return len(held) > 1 if how is How.MEMORY else crashed and bool(held)

    def tick(self, now: float) -> None:
        """Called now and then: seats that have been silent for too long are taken for dead."""
        for seat in [s for s, view in self.seats.items() if now - view.heard > SILENT_SECONDS]:
            self.silent.setdefault(name_of(seat), now)
            self.seat_gone(seat, now)

    def stuck(self, now: float) -> list[str]:
        """Names of seats that were taken for dead and said nothing for as long again: they hold their place
        for nothing. (A broker that stood still itself hears of the others in between.)"""
        return [name for name, since in self.silent.items() if now - since > SILENT_SECONDS]

    # -- what the driver shows --------------------------------------------------------------------------

    def counts(self) -> dict[str, int]:
        """Lanes by phase, and "seats"."""
        counts = Counter(str(life.phase) for life in self.open.values())
        if ended := len(self.lives) - len(self.open):
            counts[str(Phase.ENDED)] = ended
        return {**counts, "seats": len(self.seats)}

    @property
    def suspects(self) -> int:
        """Lanes that are suspected of a crash: while there are any, deaths of seats narrow the search."""
        return sum(life.company is not None for life in self.open.values())

    # -- inside -----------------------------------------------------------------------------------------

    def _held(self, seat: str) -> list[Life]:
        lanes = self.seats[seat].lanes if seat in self.seats else ()
        return [life for f in sorted(lanes) if (life := self.lives.get(f)) is not None and life.seat == seat]

    def _has_to_go(self, seat: str) -> bool:
        return self.all_vacated or name_of(seat) in self.vacated

    def _hear(self, seat: str, now: float) -> SeatView:
        view = self.seats.setdefault(seat, SeatView(now))
        view.heard = now
        self.silent.pop(name_of(seat), None)
        self.deaths.seats = max(self.deaths.seats, len(self.seats))
        return view

    def _got_on(self, shape: str) -> None:
        self.deaths.gain()
        self.failing.pop(shape, None)

    def _life(self, configuration: Configuration, now: float) -> Life:
        """That of this configuration; a new one has failed as often, and may be over, as the store says."""
        fingerprint = configuration.fingerprint
        if fingerprint not in self.lives:
            life = Life(fingerprint, configuration.shape, now, gated=self.scheduler != "none")
            life.failures = self.failures(fingerprint)
            self.lives[fingerprint] = self.open[fingerprint] = life
            self.configurations[fingerprint] = configuration
            record = self.known(configuration)
            if record is not None:
                life.replay(record)
                self._over(fingerprint, record.state)
        return self.lives[fingerprint]

    def _over(self, fingerprint: str, state: State) -> None:
        self.ended.append((fingerprint, state))
        del self.open[fingerprint]

    def _lose(self, seat: str, fingerprint: str, now: float) -> None:
        life = self.lives.get(fingerprint)
        if life is not None and life.seat == seat:
            life.wait(now)
            self._forget_unwanted(fingerprint)

    def _forget_unwanted(self, fingerprint: str) -> None:
        """A lane on no seat that nobody wants is not kept; one that trains hears of it by its next answer."""
        life = self.lives[fingerprint]
        if life.phase in (Phase.WAITING, Phase.SPILLED) and not life.trials and not life.let_go:
            del self.lives[fingerprint], self.open[fingerprint], self.configurations[fingerprint]

    def _choose(self, view: SeatView, waiting: list[Life]) -> str | None:
        """For an empty pack: the shape it drained for, else the one that failed least, so that what can be
        trained is trained first; of several that of a suspect, else the one with most waiting lanes."""
        counts = Counter(life.shape for life in waiting)
        if view.yields_to in counts:
            return view.yields_to
        suspects = {life.shape for life in waiting if life.company is not None}
        return min(counts, key=lambda s: (self.failing[s], s not in suspects, -counts[s]), default=None)

    def _serve_the_unserved(self, now: float) -> None:
        """A shape that no seat trains and that has waited too long gets the seat with the fewest lanes. So
        does a suspect, which may join no pack. A shape whose lanes all fail waits for its turn."""
        staying = [view for seat, view in self.seats.items() if not self._has_to_go(seat)]
        drains_for = {view.yields_to for view in staying}
        served = {view.shape for view in staying if view.lanes} | drains_for
        for life in self.open.values():
            if not life.needs_seat or now - life.since <= UNSERVED_SECONDS:
                continue
            if life.company is not None:
                unserved = life.shape not in drains_for
            else:
                unserved = life.shape not in served and self.failing[life.shape] < FAILING
            busy = [view for view in staying if view.lanes and view.yields_to is None]
            if unserved and busy:
                min(busy, key=lambda view: len(view.lanes)).yields_to = life.shape
                drains_for.add(life.shape)
                served.add(life.shape)


def name_of(seat: str) -> str:
    """Of a seat, whose incarnations are name.something."""
    return seat.partition(".")[0]


def _suspects_first(life: Life) -> bool:
    return life.company is None


def _may_join(life: Life, pack: Sequence[Life]) -> bool:
    """Whether the lane may train beside these."""
    most = min((one.company for one in (*pack, life) if one.company is not None), default=None)
    return most is None or (len(pack) < most and all(one.case == life.case for one in pack))
