"""The broker's mind: which seat trains which lane. A plain state machine; time comes in as an argument.

Lanes are keyed by fingerprint. A seat is known by its incarnation (a new process is a new seat). Nothing here
is the truth: records are, in the store. After a restart trials submit again and seats say what they hold.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from orchestrator.finetune.source import Answer, Lease, Offer, Report
from orchestrator.record.schema import State
from orchestrator.schedule.life import ORPHAN_SECONDS, Life, Phase
from orchestrator.study.configuration import Configuration

SILENT_SECONDS = 60.0  # a seat that says nothing for so long has lost its lanes
UNSERVED_SECONDS = 60.0  # a shape that waits for so long is given a seat


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
        scheduler: str = "",
    ) -> None:
        """`newest_attempt`: the highest attempt that left checkpoints, so that a new one has its own folder.
        `failures`: how often a lane has failed before, whoever trained it.
        `scheduler`: the settings of the study's early stopping; with any, lanes park after a report."""
        self.newest_attempt, self.failures = newest_attempt, failures
        self.scheduler = scheduler
        self.lives: dict[str, Life] = {}
        self.configurations: dict[str, Configuration] = {}
        self.seats: dict[str, SeatView] = {}
        self.ended: list[tuple[str, State]] = []
        """Every lane that ended, in order: the driver reads on from where it was."""
        self.closed = False

    # -- trials -----------------------------------------------------------------------------------------

    def submit(self, trial: str, configuration: Configuration, now: float) -> None:
        """A trial wants this configuration. One that is known already is joined."""
        fingerprint = configuration.fingerprint
        life = self.lives.get(fingerprint)
        if life is None:
            life = self.lives[fingerprint] = Life(fingerprint, configuration.shape, now, bool(self.scheduler))
            life.failures = self.failures(fingerprint)
        self.configurations[fingerprint] = configuration
        life.trials.add(trial)
        if life.phase is Phase.ENDED and life.state == "stopped":
            life.phase, life.state = Phase.WAITING, None  # wanted again: it goes on from its checkpoint
            life.since = now

    def next(self, fingerprint: str, after: int) -> Report | State | None:
        """See Life.ask. Raises KeyError when the lane is unknown (the broker restarted: submit again)."""
        return self.lives[fingerprint].ask(after)

    def release(self, trial: str, now: float) -> None:
        """The trial has ended, however it did. Its lane is stopped unless another trial wants it."""
        for fingerprint in [f for f, life in self.lives.items() if trial in life.trials]:
            self.lives[fingerprint].trials.discard(trial)
            self._forget_unwanted(fingerprint, now)

    # -- seats ------------------------------------------------------------------------------------------

    def lease(self, seat: str, shape: str | None, room: int, now: float) -> Offer:
        """Lanes for a seat that has just said, by `exchange`, what it holds."""
        view = self._hear(seat, now)
        view.shape = shape
        self._serve_the_unserved(now)
        waiting = [life for life in self.lives.values() if life.phase is Phase.WAITING and life.trials]
        if shape is None:
            shape, view.yields_to = self._choose(view, waiting), None
        elif view.yields_to is not None:
            return Offer()
        leases: list[Lease] = []
        for life in waiting:
            if life.shape == shape and len(leases) < room:
                attempt = max(life.attempt, self.newest_attempt(life.fingerprint)) + 1
                life.lease(seat, attempt)
                view.shape = shape
                view.lanes.add(life.fingerprint)
                leases.append(Lease(self.configurations[life.fingerprint], attempt, self.scheduler))
        return Offer(tuple(leases), closed=self.closed and not waiting)

    def alive(self, seat: str, now: float) -> None:
        """A sign of life from a seat that is too busy for more."""
        if seat in self.seats:
            self.seats[seat].heard = now

    def report(self, seat: str, report: Report, now: float) -> Answer:
        self._hear(seat, now)
        life = self.lives.get(report.fingerprint)
        return (
            life.report(seat, report, now) if life else Answer.GO
        )  # unknown: the next exchange announces it

    def exchange(
        self, seat: str, held: Mapping[str, tuple[int, Configuration]], now: float
    ) -> dict[str, Answer]:
        """The seat names all that it holds: fingerprint -> (attempt, configuration). What it should hold and
        does not name never reached it, and goes back to the queue. What it holds and nobody else was given
        meanwhile (the broker restarted, the seat was silent for a while) it keeps."""
        view = self._hear(seat, now)
        for fingerprint, (attempt, configuration) in held.items():
            life = self.lives.get(fingerprint)
            if life is None:
                life = self.lives[fingerprint] = Life(
                    fingerprint, configuration.shape, now, bool(self.scheduler)
                )
                life.orphan_until = now + ORPHAN_SECONDS
                self.configurations[fingerprint] = configuration
            if life.phase is Phase.WAITING and life.attempt <= attempt:
                life.lease(seat, attempt)
                view.lanes.add(fingerprint)
                view.shape = view.shape or configuration.shape
        for fingerprint in view.lanes - set(held):
            view.lanes.discard(fingerprint)
            self._lose(seat, fingerprint, now)
        return {f: self.lives[f].answer(seat, attempt, now) for f, (attempt, _) in held.items()}

    def done(self, seat: str, fingerprint: str, attempt: int, state: State, now: float) -> None:
        view = self._hear(seat, now)
        life = self.lives.get(fingerprint)
        if life is None or not (life.seat == seat and life.attempt != attempt):
            view.lanes.discard(fingerprint)  # else it has it anew, and only the old lease has ended
        if life is None or life.phase is Phase.ENDED:
            return
        life.done(seat, attempt, state, now)
        if life.state is not None:
            self.ended.append((fingerprint, life.state))
        else:
            self._forget_unwanted(fingerprint, now)

    def seat_gone(self, seat: str, now: float) -> None:
        """The seat has ended or died: its lanes go back to the queue."""
        view = self.seats.pop(seat, None)
        for fingerprint in view.lanes if view else ():
            self._lose(seat, fingerprint, now)

    def tick(self, now: float) -> None:
        """Called now and then: seats that have been silent for too long are taken for dead."""
        for seat in [s for s, view in self.seats.items() if now - view.heard > SILENT_SECONDS]:
            self.seat_gone(seat, now)

    # -- what the driver shows --------------------------------------------------------------------------

    def counts(self) -> dict[str, int]:
        """Lanes by phase, and "seats"."""
        return {**Counter(str(life.phase) for life in self.lives.values()), "seats": len(self.seats)}

    # -- inside -----------------------------------------------------------------------------------------

    def _hear(self, seat: str, now: float) -> SeatView:
        view = self.seats.setdefault(seat, SeatView(now))
        view.heard = now
        return view

    def _lose(self, seat: str, fingerprint: str, now: float) -> None:
        life = self.lives.get(fingerprint)
        if life is not None and life.seat == seat:
            life.wait(now)
            self._forget_unwanted(fingerprint, now)

    def _forget_unwanted(self, fingerprint: str, now: float) -> None:
        """A waiting lane that nobody wants is not kept; one that trains is stopped by its next answer."""
        life = self.lives[fingerprint]
        if life.phase is Phase.WAITING and not life.trials:
            del self.lives[fingerprint], self.configurations[fingerprint]

    def _choose(self, view: SeatView, waiting: list[Life]) -> str | None:
        """For an empty pack: the shape it drained for, else the one with most waiting lanes."""
        counts = Counter(life.shape for life in waiting)
        if view.yields_to in counts:
            return view.yields_to
        return max(counts, key=counts.__getitem__, default=None)

    def _serve_the_unserved(self, now: float) -> None:
        """A shape that no seat trains and that has waited too long gets the seat with the fewest lanes."""
        served = {view.shape for view in self.seats.values() if view.lanes}
        served |= {view.yields_to for view in self.seats.values()}
        for life in self.lives.values():
            if (
                life.phase is Phase.WAITING
                and life.shape not in served
                and now - life.since > UNSERVED_SECONDS
            ):
                busy = [view for view in self.seats.values() if view.lanes and view.yields_to is None]
                if busy:
                    min(busy, key=lambda view: len(view.lanes)).yields_to = life.shape
                    served.add(life.shape)
