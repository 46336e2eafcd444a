"""The broker as an actor, and what a seat uses to talk to it: thin shells around `BrokerCore`."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError

from orchestrator.execution.broker.core import BrokerCore, Held, name_of
from orchestrator.execution.broker.lane_entry import Life
from orchestrator.execution.ray.runtime import beside_the_driver
from orchestrator.execution.trainers.exit_status import How
from orchestrator.execution.tune.rungs import settings
from orchestrator.finetune.engine.lane_source import Answer, Offer, Report
from orchestrator.record import provenance
from orchestrator.record.schema import Evaluation, Record, State
from orchestrator.record.store import Store
from orchestrator.study.configuration import Configuration
from orchestrator.util.watched_clock import WatchedClock

log = logging.getLogger(__name__)

BEAT_SECONDS = 10.0
STUCK_SECONDS = 1800.0
BROKER_LOST_SECONDS = 30.0  # who misses the broker for so long gives it up; see `until_lost` for a seat
NAME = "broker"
FINAL = ("finished", "diverged")
Answered = TypeVar("Answered")


class Broker:
    """An actor. Every method is a coroutine: the core is only ever touched by one at a time."""

    def __init__(self, root: str, scheduler: str) -> None:
        store = Store(root)

        def newest_attempt(fingerprint: str) -> int:
            attempts = (store.checkpoints / fingerprint).glob("*")
            return max((int(path.name) for path in attempts if path.name.isdecimal()), default=0)

        def saved(fingerprint: str) -> int:
            files = (store.checkpoints / fingerprint).glob("*/step-*.safetensors")
            steps = [path.stem.removeprefix("step-") for path in files]
            return max((int(step) for step in steps if step.isdecimal()), default=0)

        def known(configuration: Configuration) -> Record | None:
            record = store.meets(configuration.fingerprint, settings(scheduler, configuration))
            if record is not None and record.state in FINAL:  # whoever wrote it may have died right after
                store.discard_checkpoints(record.fingerprint)
            return record

        def give_up(life: Life, configuration: Configuration, why: str) -> State:
            return _failed(store, life, configuration, why)

        self.clock = WatchedClock()
        self.core = BrokerCore(newest_attempt, store.failures, known, scheduler, give_up, saved)
        self.given_up = False
        self.born = uuid.uuid4().hex
        self.changed: dict[str, asyncio.Event] = {}
        self.lines: list[str] = []
        """Lines from the seats that the driver shows to the user."""

    # -- trials

    async def next(
        self, trial: str, configuration: Configuration, after: int, timeout: float
    ) -> Report | State | None:
        """Submits (again, after a restart) and waits for the report beyond step `after` or the end."""
        fingerprint = configuration.fingerprint
        self.core.submit(trial, configuration, self.clock())
        deadline = time.monotonic() + timeout
        while True:
            answer = "failed" if self.given_up else self.core.next(fingerprint, after, self.clock())
            left = deadline - time.monotonic()
            if answer is not None or left <= 0:
                return answer
            event = self.changed.setdefault(fingerprint, asyncio.Event())
            event.clear()
            try:
                await asyncio.wait_for(event.wait(), left)
            except TimeoutError:
                return None

    async def release(self, trial: str) -> None:
        self.core.release(trial)

    async def stop(self, trial: str, configuration: Configuration, seen: int) -> None:
        self.core.stop(trial, configuration, seen, self.clock())

    # -- seats

    async def lease(
        self, seat: str, shape: str | None, room: int, held: Mapping[str, Held], taken: int
    ) -> Offer:
        await self.exchange(seat, held, taken)
        return self.core.lease(seat, shape, room, self.clock())

    async def exchange(self, seat: str, held: Mapping[str, Held], taken: int) -> dict[str, Answer]:
        answers = self.core.exchange(seat, held, taken, self.clock())
        for fingerprint in held:
            self._tell(fingerprint)
        return answers

    async def alive(self, seat: str) -> None:
        self.core.alive(seat, self.clock())

    async def spill(self, seat: str, fingerprint: str, attempt: int) -> None:
        self.core.spill(seat, fingerprint, attempt, self.clock())

    async def say(self, line: str) -> None:
        self.lines.append(line)

    async def done(self, seat: str, fingerprint: str, attempt: int, state: State) -> None:
        self.core.done(seat, fingerprint, attempt, state, self.clock())
        self._tell(fingerprint)

    async def seat_ended(self, name: str, how: How, reason: str = "") -> None:
        """All incarnations of the seat called `name` are gone; `how`, and why, they came to their end."""
        held = [f for seat, view in self.core.seats.items() if name_of(seat) == name for f in view.lanes]
        self.core.seat_ended(name, self.clock(), how, reason)
        for fingerprint in held:
            self._tell(fingerprint)

    async def vacate(self, name: str | None) -> None:
        """The seats called `name` (None: all, and for good) save every lane, give it back, and end."""
        self.core.vacate(name)

    # -- the driver

    async def news(self, since: int, lines: int, born: str) -> dict[str, Any]:
        """Return what is new for the driver.

        Args:
            since: how many ended lanes the driver knows already.
            lines: how many lines of the seats it knows already.
            born: the incarnation of the broker that gave it those. Where this is another one, all ended lanes
                and all lines are returned.

        Returns:
            "born": this incarnation; "ended" and "lines": what is new of each; "counts": the lanes in each
            phase and the live seats; "taken": the optimizer steps of each seat; "stuck": the names of seats
            that hang; "hopeless": why no more seats should be started, empty where they should.
        """
        self.core.tick(self.clock())
        since, lines = (since, lines) if born == self.born else (0, 0)
        return {
            "born": self.born,
            "ended": self.core.ended[since:],
            "lines": self.lines[lines:],
            "counts": self.core.counts(),
            "taken": dict(self.core.taken),
            "stuck": self.core.stuck(self.clock()),
            "hopeless": self.core.deaths.hopeless,
        }

    async def close(self) -> None:
        """No more trials will come: seats end when nothing waits."""
        self.core.closed = True

    async def give_up(self) -> None:
        """The study cannot go on: no trial is kept waiting."""
        self.given_up = True
        for event in self.changed.values():
            event.set()

    def _tell(self, fingerprint: str) -> None:
        event = self.changed.get(fingerprint)
        if event is not None:
            event.set()


def _failed(store: Store, life: Life, configuration: Configuration, why: str) -> State:
    """Writes the record of a lane whose seat can not. Returns the state of the record that counts."""
    record = Record(
        fingerprint=life.fingerprint,
        configuration=configuration,
        state="failed",
        steps=life.reports[-1].step if life.reports else 0,
        reason=why,
        evaluations=tuple(Evaluation(r.step, "validation", r.scores) for r in life.reports),
        provenance=provenance.current("none", attempt=life.attempt, ended=time.time()),
    )
    try:
        if not store.put(record, failures=life.crashes):
            first = store.get(life.fingerprint)
            return first.state if first is not None else "failed"
    except OSError as error:  # nothing is lost: the next study tries it again
        log.warning("%s: its record cannot be written: %s", life.fingerprint[:12], error)
    return "failed"


def start_broker(store: Store, scheduler: str) -> Any:
    """The broker of a study, in the study's own Ray namespace: any process of the study finds it by NAME."""
    actor: Any = ray.remote(Broker)
    # Each trial waits in a call of its own; a broker that dies is started again, empty.
    options = {"name": NAME, "num_cpus": 0, "max_restarts": -1, "max_concurrency": 10_000}
    place = beside_the_driver()  # worker nodes come and go
    return actor.options(scheduling_strategy=place, **options).remote(str(store.root), scheduler)


class BrokerSource:
    """A seat's side of the broker: the `Source` of the fine-tuning loop.

    Whenever it leases, reports or exchanges, it names all that it holds, each lane with its last report: a
    reply that was lost, or a broker that restarted, is made good by the next call, whichever that is.
    """

    def __init__(self, seat: str) -> None:
        self.seat = seat
        self.broker = ray.get_actor(NAME)
        self.held: dict[str, Held] = {}
        self.taken = 0
        self.spoke = time.monotonic()
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def lease(self, shape: str | None, room: int, taken: int) -> Offer:
        self.taken = taken
        offer: Offer = self._call("lease", self.seat, shape, room, self.held, taken)
        for lease in offer.leases:
            self.held[lease.configuration.fingerprint] = (lease.attempt, lease.configuration, None)
        return offer

    def report(self, report: Report) -> Answer:
        """An exchange that obeys one answer only: the others are given again at the next."""
        fingerprint = report.fingerprint
        if fingerprint not in self.held:
            return Answer.DROP
        attempt, configuration, _ = self.held[fingerprint]
        self.held[fingerprint] = (attempt, configuration, report)
        answer: Answer = self._call("exchange", self.seat, self.held, self.taken)[fingerprint]
        if answer is Answer.DROP:
            del self.held[fingerprint]
        return answer

    def exchange(self, taken: int) -> Mapping[str, Answer]:
        self.taken = taken
        answers: dict[str, Answer] = self._call("exchange", self.seat, self.held, taken)
        for fingerprint, answer in answers.items():
            if answer is Answer.DROP:
                del self.held[fingerprint]
        return answers

    def spill(self, fingerprint: str, attempt: int) -> None:
        self._call("spill", self.seat, fingerprint, attempt)
        self.held.pop(fingerprint, None)

    def say(self, line: str) -> None:
        self._call("say", line)

    def done(self, fingerprint: str, attempt: int, state: State) -> None:
        self._call("done", self.seat, fingerprint, attempt, state)
        self.held.pop(fingerprint, None)

    def _beat(self) -> None:
        """Loading a large base or a long evaluation keeps the loop from talking: it is not dead. One that is
        silent for STUCK_SECONDS is, whatever this thread could say."""
        while True:
            time.sleep(BEAT_SECONDS)
            if time.monotonic() - self.spoke < STUCK_SECONDS:
                self.broker.alive.remote(self.seat)

    def _call(self, method: str, *args: Any) -> Any:
        self.spoke = time.monotonic()
        call = getattr(self.broker, method)
        return until_lost(lambda: ray.get(call.remote(*args), timeout=BROKER_LOST_SECONDS))


def until_lost(call: Callable[[], Answered]) -> Answered:
    """Call the broker until it answers.

    Args:
        call: one call, which may take up to BROKER_LOST_SECONDS.

    Returns:
        The answer.

    Raises:
        ActorUnavailableError, RayActorError, GetTimeoutError: as the last call did, when the broker has not
            answered for BROKER_LOST_SECONDS. A single call counts as two thirds of that at most, so there are
            always at least two. So a broker whose calls fail at once is given up after BROKER_LOST_SECONDS,
            one that lets calls wait until they time out after twice that.
    """
    clock = WatchedClock(most=BROKER_LOST_SECONDS * 2 / 3)  # a call in which the clock jumps decides nothing
    deadline = clock() + BROKER_LOST_SECONDS
    while True:
        try:
            return call()
        except (ActorUnavailableError, RayActorError, GetTimeoutError):
            if clock() > deadline:
                raise
            time.sleep(0.5)
