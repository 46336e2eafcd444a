"""The broker's actor and its client in a trainer.

The actor is a thin shell around `BrokerCore` that adds the store, the clock and waiting. It runs on the
driver's node and is not restarted: a study that loses it ends, and the same command continues it.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ray

from orchestrator.execution.broker import (
    BROKER_NAME,
    BrokerCore,
    ExitKind,
    LaneRecords,
    TrainerPlace,
    Updates,
)
from orchestrator.execution.lane_entry import HeldLane, HeldLanes, LaneEntry
from orchestrator.execution.ray_cluster import driver_node_affinity
from orchestrator.execution.schedulers import scheduler_settings
from orchestrator.finetune.engine.lane_source import Directive, LeaseGrant, Report
from orchestrator.record import schema
from orchestrator.record.schema import FINAL_STATES, Evaluation, Record, RecordState
from orchestrator.record.store import Store
from orchestrator.study.configuration import Configuration
from orchestrator.util import timeouts

log = logging.getLogger(__name__)


class StoredRecords(LaneRecords):
    """The broker's view of the store.

    Args:
        store: The store.
        scheduler: The study's early stopping, or "none".
    """

    def __init__(self, store: Store, scheduler: str) -> None:
        self.store, self.scheduler = store, scheduler

    def newest_checkpoint(self, fingerprint: str) -> tuple[int, int]:
        """Return the highest attempt number with a checkpoint folder, and the step of the newest checkpoint.

        Each is 0 if the lane has no such folder or file.
        """
        folder = self.store.checkpoints / fingerprint
        attempts = [path.name for path in folder.glob("*")]
        steps = [path.stem.removeprefix("step-") for path in folder.glob("*/step-*.safetensors")]
        newest = [max((int(n) for n in numbers if n.isdecimal()), default=0) for numbers in (attempts, steps)]
        return newest[0], newest[1]

    def count_failures(self, fingerprint: str) -> int:
        """Return the number of failures in the store."""
        return self.store.count_failures(fingerprint)

    def find_record(self, configuration: Configuration) -> Record | None:
        """Return the reusable record, if there is one."""
        settings = scheduler_settings(self.scheduler, configuration)
        record = self.store.get_reusable(configuration.fingerprint, settings)
        if record is not None and record.state in FINAL_STATES:
            # The trainer that wrote the record may have died before it removed the checkpoints.
            self.store.discard_checkpoints(record.fingerprint)
        return record

    def write_failure(self, entry: LaneEntry, reason: str) -> RecordState:
        """Write the record of a lane that crashes trainers."""
        record = Record(
            fingerprint=entry.fingerprint,
            configuration=entry.configuration,
            state="failed",
            steps=entry.newest_step,
            reason=reason,
            evaluations=tuple(Evaluation(r.step, "validation", r.scores) for r in entry.reports),
            provenance=schema.current_provenance("none", attempt=entry.attempt, ended=time.time()),
        )
        try:
            is_first = self.store.put(record, new_failures=entry.crashes_alone)
            if not is_first and (first := self.store.get(entry.fingerprint)):
                return first.state
        except OSError as error:  # the next study trains the lane again
            log.warning("%s: its record cannot be written: %s", entry.fingerprint[:12], error)
        return "failed"


class Broker:
    """The actor between the trials, the trainers and the driver of a study.

    Its methods run on one event loop, and no call of the core waits, so these calls do not overlap.

    Args:
        root: Folder of the store.
        scheduler: The study's early stopping, or "none".
    """

    def __init__(self, root: str, scheduler: str) -> None:

        self.core = BrokerCore(StoredRecords(Store(root), scheduler), scheduler)
        self.is_aborted = False
        self.lane_events: dict[str, asyncio.Event] = {}
        """Events that wake the trials that wait for a lane, by fingerprint."""

    # -- trials

    async def next_report(
        self, trial: str, configuration: Configuration, after: int, timeout: float
    ) -> Report | RecordState | None:
        """Submit a configuration, and wait for the report after step `after` or for the end of the lane.

        Args:
            trial: Name of the trial.
            configuration: The configuration; submitting it again is harmless.
            after: Step of the last report that the trial has seen.
            timeout: Longest wait in seconds.

        Returns:
            The report, the state in which the lane ended, or None after the timeout; "failed" after `abort`.
        """
        fingerprint = configuration.fingerprint
        self.core.submit(trial, configuration)
        deadline = time.monotonic() + timeout
        while True:
            answer = "failed" if self.is_aborted else self.core.next_report(fingerprint, after)
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
        """Remove a trial that the scheduler did not stop."""
        self.core.release(trial)

    async def stop(self, trial: str, configuration: Configuration, stop_step: int) -> None:
        """Remove a trial that the scheduler stopped at the report of step `stop_step`."""
        self.core.stop(trial, configuration, stop_step)

    # -- trainers

    async def start(self, trainer: str, place: TrainerPlace) -> None:
        """Note where a trainer runs."""
        if trainer not in self.core.gone:
            self.core.places[trainer] = place

    async def lease(
        self,
        trainer: str,
        group_key: str | None,
        capacity: int,
        held: HeldLanes,
        steps_taken: int,
        max_lanes: int,
    ) -> LeaseGrant:
        """Exchange, then lease lanes; see `BrokerCore.lease`."""
        await self.exchange(trainer, held, steps_taken, max_lanes)
        return self.core.lease(trainer, group_key, capacity, time.monotonic())

    async def exchange(
        self, trainer: str, held: HeldLanes, steps_taken: int, max_lanes: int
    ) -> dict[str, Directive]:
        """Take a trainer's reports and return the directives for its lanes; see `BrokerCore.exchange`."""
        directives = self.core.exchange(trainer, held, steps_taken, max_lanes, time.monotonic())
        self._wake_trials(held)
        return directives

    async def heartbeat(self, trainer: str) -> None:
        """Note that a trainer is alive although its loop makes no calls."""
        self.core.heartbeat(trainer, time.monotonic())

    async def return_lease(self, trainer: str, fingerprint: str, attempt: int) -> None:
        """Requeue a lane that its trainer has given back."""
        self.core.return_lease(trainer, fingerprint, attempt)

    async def end_lease(self, trainer: str, fingerprint: str, attempt: int, state: RecordState) -> None:
        """Note the state in which a lane has ended on a trainer; its record, if any, is in the store."""
        self.core.end_lease(trainer, fingerprint, attempt, state)
        self._wake_trials([fingerprint])

    async def notify(self, line: str) -> None:
        """Keep a line of a trainer for the user."""
        self.core.events.append(line)

    async def drain(self, trainer: str | None) -> None:
        """Make a trainer, or all if it is None, save their lanes, give them back and end."""
        if trainer is not None and trainer not in self.core.draining:
            self.core.events.append(f"{trainer}: its node is drained; its lanes continue elsewhere")
        self.core.draining.add(trainer)

    async def fail(self, trainer: str, kind: ExitKind, reason: str) -> None:
        """Note why a trainer is about to end; the first reason of its workers counts."""
        if trainer not in self.core.gone:
            self.core.announced.setdefault(trainer, (kind, reason))

    async def abort(self, reason: str = "") -> None:
        """Ask the driver to end the study, or answer all trials because it ends.

        A trainer calls this with a reason, which the driver reads with the next updates. The driver calls it
        without one; `next_report` then returns "failed" to every trial.
        """
        self.core.abort_reason = self.core.abort_reason or reason
        if not reason:
            self.is_aborted = True
            self._wake_trials(self.lane_events)

    # -- the driver

    async def request(self, configurations: Sequence[Configuration]) -> None:
        """Add configurations to the backlog."""
        self.core.backlog.extend(configurations)

    async def get_updates(self, num_read: int, max_open: int = 0) -> Updates:
        """Return what is new after `num_read` events; see `BrokerCore.get_updates`."""
        return self.core.get_updates(num_read, time.monotonic(), max_open)

    async def trainer_exited(self, trainer: str, kind: ExitKind, reason: str = "") -> int:
        """Remove a trainer that has ended, and return the number of lanes that it held."""
        num_held = self.core.trainer_exited(trainer, kind, reason)
        self._wake_trials(self.core.entries)  # a lane that has crashed its trainers has failed
        return num_held

    def _wake_trials(self, fingerprints: Iterable[str]) -> None:
        for fingerprint in self.lane_events.keys() & fingerprints:
            self.lane_events[fingerprint].set()


def start_broker(store: Store, scheduler: str) -> Any:
    """Start the broker's actor in the study's Ray namespace, on the driver's node.

    The concurrency is high because every trial waits in a call of its own. The broker runs on the driver's
    node because worker nodes come and go.
    """
    actor: Any = ray.remote(Broker)
    options = {"name": BROKER_NAME, "num_cpus": 0, "max_restarts": 0, "max_concurrency": 10_000}
    placed = actor.options(scheduling_strategy=driver_node_affinity(), **options)
    return placed.remote(str(store.root), scheduler)


class BrokerClient:
    """The `LaneSource` of a trainer's fine-tuning loop: it calls the broker's actor.

    Each call of `lease`, `report` and `exchange` sends all lanes that the trainer holds, each with its last
    report.

    Args:
        trainer: The trainer's name.
    """

    def __init__(self, trainer: str) -> None:
        self.trainer = trainer
        self.broker = ray.get_actor(BROKER_NAME)
        self.held: dict[str, HeldLane] = {}
        self.steps_taken, self.max_lanes = 0, 0
        self.last_progress_time = time.monotonic()
        """The time of the last call of the loop, or of its last progress without a call."""
        self.is_starting_lanes = False
        """True from a lease until `exchange` or an empty lease; loading a model shows no progress."""
        threading.Thread(target=self._send_heartbeats, name="heartbeat", daemon=True).start()

    def lease(self, group_key: str | None, capacity: int, steps_taken: int) -> LeaseGrant:
        """Lease up to `capacity` lanes; see `LaneSource.lease`."""
        self.steps_taken = steps_taken
        state = self.held, steps_taken, self.max_lanes
        grant: LeaseGrant = self._call("lease", self.trainer, group_key, capacity, *state)
        self.held |= {lease.configuration.fingerprint: (lease.attempt, None) for lease in grant.leases}
        self.is_starting_lanes = bool(grant.leases)
        return grant

    def report(self, report: Report) -> Directive:
        """Send a report and return the directive for its lane.

        The exchange also returns directives for the other lanes. This method ignores them, because the next
        exchange repeats them.
        """
        if report.fingerprint not in self.held:
            return Directive.DROP
        self.held[report.fingerprint] = (report.attempt, report)
        return self._exchange([report.fingerprint])[report.fingerprint]

    def exchange(self, steps_taken: int) -> Mapping[str, Directive]:
        """Return the directives for all lanes that the trainer holds, by fingerprint."""
        self.steps_taken, self.is_starting_lanes = steps_taken, False
        return self._exchange(list(self.held))

    def _exchange(self, obeyed: Iterable[str]) -> Mapping[str, Directive]:
        """Exchange with the broker, and forget those of the lanes in `obeyed` that are dropped."""
        state = self.held, self.steps_taken, self.max_lanes
        directives: Mapping[str, Directive] = self._call("exchange", self.trainer, *state)
        for fingerprint in obeyed:
            if directives[fingerprint] is Directive.DROP:
                del self.held[fingerprint]
        return directives

    def return_lease(self, fingerprint: str, attempt: int) -> None:
        """Give back a lane that has not ended."""
        self._call("return_lease", self.trainer, fingerprint, attempt)
        self.held.pop(fingerprint, None)

    def end_lease(self, fingerprint: str, attempt: int, state: RecordState) -> None:
        """Tell the broker that a lane has ended; its record is in the store."""
        self._call("end_lease", self.trainer, fingerprint, attempt, state)
        self.held.pop(fingerprint, None)

    def notify(self, line: str) -> None:
        """Show a line to the user of the study."""
        self._call("notify", line)

    def note_max_lanes(self, max_lanes: int) -> None:
        """Note how many lanes the trainer can hold; the next lease or exchange sends it."""
        self.max_lanes = max_lanes

    def note_progress(self) -> None:
        """Note that the loop has made progress; see `LaneSource.note_progress`."""
        self.last_progress_time = time.monotonic()

    def _send_heartbeats(self) -> None:
        """Keep the trainer alive for the broker while the loop loads a model or evaluates.

        No heartbeat is sent while the loop seems hung: it has made neither a call nor progress for long.
        """
        while True:
            time.sleep(timeouts.HEARTBEAT_SECONDS)
            limit = timeouts.LANE_START_SECONDS if self.is_starting_lanes else timeouts.HUNG_SECONDS
            if time.monotonic() - self.last_progress_time < limit:
                self.broker.heartbeat.remote(self.trainer)

    def _call(self, method: str, *args: Any) -> Any:
        self.note_progress()
        return ray.get(getattr(self.broker, method).remote(*args))
