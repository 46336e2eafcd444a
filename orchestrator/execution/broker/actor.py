"""The broker as an actor, and what a trainer uses to talk to it: thin shells around `BrokerCore`."""

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

from orchestrator.execution.broker.core import BrokerCore, HeldLane, parse_trainer_name
from orchestrator.execution.broker.lane_entry import LaneEntry
from orchestrator.execution.ray.runtime import driver_node_affinity
from orchestrator.execution.trainers.exit_status import ExitKind
from orchestrator.execution.tune.rungs import scheduler_settings
from orchestrator.finetune.engine.lane_source import Directive, LeaseGrant, Report
from orchestrator.record import provenance
from orchestrator.record.schema import Evaluation, Record, RecordState
from orchestrator.record.store import Store
from orchestrator.study.configuration import Configuration
from orchestrator.util import timeouts
from orchestrator.util.watched_clock import SuspendTolerantClock

log = logging.getLogger(__name__)

BROKER_NAME = "broker"
FINAL_STATES = ("finished", "diverged")
Result = TypeVar("Result")


class Broker:
    """An actor. Every method is a coroutine: the core is only ever touched by one at a time."""

    def __init__(self, root: str, scheduler: str) -> None:
        store = Store(root)

        def newest_attempt(fingerprint: str) -> int:
            attempts = (store.checkpoints / fingerprint).glob("*")
            return max((int(path.name) for path in attempts if path.name.isdecimal()), default=0)

        def checkpoint_step(fingerprint: str) -> int:
            files = (store.checkpoints / fingerprint).glob("*/step-*.safetensors")
            steps = [path.stem.removeprefix("step-") for path in files]
            return max((int(step) for step in steps if step.isdecimal()), default=0)

        def find_record(configuration: Configuration) -> Record | None:
            record = store.get_reusable(
                configuration.fingerprint, scheduler_settings(scheduler, configuration)
            )
            if (
                record is not None and record.state in FINAL_STATES
            ):  # whoever wrote it may have died right after
                store.discard_checkpoints(record.fingerprint)
            return record

        def write_failure(entry: LaneEntry, configuration: Configuration, why: str) -> RecordState:
            return _write_failure_record(store, entry, configuration, why)

        self.clock = SuspendTolerantClock()
        self.core = BrokerCore(
            newest_attempt, store.count_failures, find_record, scheduler, write_failure, checkpoint_step
        )
        self.is_aborted = False
        self.incarnation = uuid.uuid4().hex
        self.lane_events: dict[str, asyncio.Event] = {}
        self.lines: list[str] = []
        """Lines from the trainers that the driver shows to the user."""

    # -- trials

    async def next_report(
        self, trial: str, configuration: Configuration, after: int, timeout: float
    ) -> Report | RecordState | None:
        """Submits (again, after a restart) and waits for the report beyond step `after` or the end."""
        fingerprint = configuration.fingerprint
        self.core.submit(trial, configuration, self.clock())
        deadline = time.monotonic() + timeout
        while True:
            answer = "failed" if self.is_aborted else self.core.next_report(fingerprint, after, self.clock())
            left = deadline - time.monotonic()
            if answer is not None or left <= 0:
                return answer
            event = self.lane_events.setdefault(fingerprint, asyncio.Event())
            event.clear()
            try:
                await asyncio.wait_for(event.wait(), left)
            except TimeoutError:
                return None

    async def release(self, trial: str) -> None:
        self.core.release(trial)

    async def stop(self, trial: str, configuration: Configuration, stop_step: int) -> None:
        self.core.stop(trial, configuration, stop_step, self.clock())

    # -- trainers

    async def lease(
        self,
        trainer_id: str,
        group_key: str | None,
        free_slots: int,
        held: Mapping[str, HeldLane],
        steps_taken: int,
    ) -> LeaseGrant:
        await self.exchange(trainer_id, held, steps_taken)
        return self.core.lease(trainer_id, group_key, free_slots, self.clock())

    async def exchange(
        self, trainer_id: str, held: Mapping[str, HeldLane], steps_taken: int
    ) -> dict[str, Directive]:
        directives = self.core.exchange(trainer_id, held, steps_taken, self.clock())
        for fingerprint in held:
            self._wake_trials(fingerprint)
        return directives

    async def heartbeat(self, trainer_id: str) -> None:
        self.core.heartbeat(trainer_id, self.clock())

    async def return_lease(self, trainer_id: str, fingerprint: str, attempt: int) -> None:
        self.core.return_lease(trainer_id, fingerprint, attempt, self.clock())

    async def notify(self, line: str) -> None:
        self.lines.append(line)

    async def end_lease(self, trainer_id: str, fingerprint: str, attempt: int, state: RecordState) -> None:
        self.core.end_lease(trainer_id, fingerprint, attempt, state, self.clock())
        self._wake_trials(fingerprint)

    async def trainer_exited(self, trainer_name: str, exit_kind: ExitKind, reason: str = "") -> None:
        """All incarnations of the trainer called `name` are gone; `how`, and why, they came to their end."""
        held = [
            f
            for trainer_id, view in self.core.trainers.items()
            if parse_trainer_name(trainer_id) == trainer_name
            for f in view.lanes
        ]
        self.core.trainer_exited(trainer_name, self.clock(), exit_kind, reason)
        for fingerprint in held:
            self._wake_trials(fingerprint)

    async def drain(self, trainer_name: str | None) -> None:
        """The trainers called `name` (None: all, and for good) save every lane, give it back, and end."""
        self.core.drain(trainer_name)

    # -- the driver

    async def get_updates(self, num_ended: int, num_lines: int, incarnation: str) -> dict[str, Any]:
        """Return what is new for the driver.

        Args:
            since: how many ended lanes the driver knows already.
            lines: how many lines of the trainers it knows already.
            born: the incarnation of the broker that gave it those. Where this is another one, all ended lanes
                and all lines are returned.

        Returns:
            "born": this incarnation; "ended" and "lines": what is new of each; "counts": the lanes in each
            phase and the live trainers; "taken": the optimizer steps of each trainer; "stuck": the names of trainers
            that hang; "hopeless": why no more trainers should be started, empty where they should.
        """
        self.core.tick(self.clock())
        num_ended, num_lines = (num_ended, num_lines) if incarnation == self.incarnation else (0, 0)
        return {
            "incarnation": self.incarnation,
            "ended": self.core.ended_lanes[num_ended:],
            "lines": self.lines[num_lines:],
            "counts": self.core.counts(),
            "steps_taken": dict(self.core.steps_taken),
            "hung": self.core.hung_trainers(self.clock()),
            "abort_reason": self.core.failure_policy.abort_reason,
        }

    async def close(self) -> None:
        """No more trials will come: trainers end when nothing waits."""
        self.core.closed = True

    async def abort(self) -> None:
        """The study cannot go on: no trial is kept waiting."""
        self.is_aborted = True
        for event in self.lane_events.values():
            event.set()

    def _wake_trials(self, fingerprint: str) -> None:
        event = self.lane_events.get(fingerprint)
        if event is not None:
            event.set()


def _write_failure_record(
    store: Store, entry: LaneEntry, configuration: Configuration, why: str
) -> RecordState:
    """Writes the record of a lane whose trainer can not. Returns the state of the record that counts."""
    record = Record(
        fingerprint=entry.fingerprint,
        configuration=configuration,
        state="failed",
        steps=entry.reports[-1].step if entry.reports else 0,
        reason=why,
        evaluations=tuple(Evaluation(r.step, "validation", r.scores) for r in entry.reports),
        provenance=provenance.current_provenance("none", attempt=entry.attempt, ended=time.time()),
    )
    try:
        if not store.put(record, new_failures=entry.solo_crashes):
            first = store.get(entry.fingerprint)
            return first.state if first is not None else "failed"
    except OSError as error:  # nothing is lost: the next study tries it again
        log.warning("%s: its record cannot be written: %s", entry.fingerprint[:12], error)
    return "failed"


def start_broker(store: Store, scheduler: str) -> Any:
    """The broker of a study, in the study's own Ray namespace: any process of the study finds it by NAME."""
    actor: Any = ray.remote(Broker)
    # Each trial waits in a call of its own; a broker that dies is started again, empty.
    options = {"name": BROKER_NAME, "num_cpus": 0, "max_restarts": -1, "max_concurrency": 10_000}
    place = driver_node_affinity()  # worker nodes come and go
    return actor.options(scheduling_strategy=place, **options).remote(str(store.root), scheduler)


class BrokerClient:
    """A trainer's side of the broker: the `Source` of the fine-tuning loop.

    Whenever it leases, reports or exchanges, it names all that it holds, each lane with its last report: a
    reply that was lost, or a broker that restarted, is made good by the next call, whichever that is.
    """

    def __init__(self, trainer_id: str) -> None:
        self.trainer_id = trainer_id
        self.broker = ray.get_actor(BROKER_NAME)
        self.held: dict[str, HeldLane] = {}
        self.steps_taken = 0
        self.last_call_time = time.monotonic()
        threading.Thread(target=self._send_heartbeats, name="heartbeat", daemon=True).start()

    def lease(self, group_key: str | None, free_slots: int, steps_taken: int) -> LeaseGrant:
        self.steps_taken = steps_taken
        grant: LeaseGrant = self._call(
            "lease", self.trainer_id, group_key, free_slots, self.held, steps_taken
        )
        for lease in grant.leases:
            self.held[lease.configuration.fingerprint] = (lease.attempt, lease.configuration, None)
        return grant

    def report(self, report: Report) -> Directive:
        """An exchange that obeys one answer only: the others are given again at the next."""
        fingerprint = report.fingerprint
        if fingerprint not in self.held:
            return Directive.DROP
        attempt, configuration, _ = self.held[fingerprint]
        self.held[fingerprint] = (attempt, configuration, report)
        directive: Directive = self._call("exchange", self.trainer_id, self.held, self.steps_taken)[
            fingerprint
        ]
        if directive is Directive.DROP:
            del self.held[fingerprint]
        return directive

    def exchange(self, steps_taken: int) -> Mapping[str, Directive]:
        self.steps_taken = steps_taken
        directives: dict[str, Directive] = self._call("exchange", self.trainer_id, self.held, steps_taken)
        for fingerprint, answer in directives.items():
            if answer is Directive.DROP:
                del self.held[fingerprint]
        return directives

    def return_lease(self, fingerprint: str, attempt: int) -> None:
        self._call("return_lease", self.trainer_id, fingerprint, attempt)
        self.held.pop(fingerprint, None)

    def notify(self, line: str) -> None:
        self._call("notify", line)

    def end_lease(self, fingerprint: str, attempt: int, state: RecordState) -> None:
        self._call("end_lease", self.trainer_id, fingerprint, attempt, state)
        self.held.pop(fingerprint, None)

    def _send_heartbeats(self) -> None:
        """Loading a large base or a long evaluation keeps the loop from talking: it is not dead. One that is
        silent for STUCK_SECONDS is, whatever this thread could say."""
        while True:
            time.sleep(timeouts.HEARTBEAT_SECONDS)
            if time.monotonic() - self.last_call_time < timeouts.HUNG_SECONDS:
                self.broker.heartbeat.remote(self.trainer_id)

    def _call(self, method: str, *args: Any) -> Any:
        self.last_call_time = time.monotonic()
        call = getattr(self.broker, method)
        return retry_until_lost(lambda: ray.get(call.remote(*args), timeout=timeouts.BROKER_LOST_SECONDS))


def retry_until_lost(call: Callable[[], Result]) -> Result:
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
    clock = SuspendTolerantClock(
        max_gap=timeouts.BROKER_LOST_SECONDS * 2 / 3
    )  # a call in which the clock jumps decides nothing
    deadline = clock() + timeouts.BROKER_LOST_SECONDS
    while True:
        try:
            return call()
        except (ActorUnavailableError, RayActorError, GetTimeoutError):
            if clock() > deadline:
                raise
            time.sleep(0.5)
