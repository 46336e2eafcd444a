"""The broker's actor: a thin shell around `BrokerCore` that adds the store, the clock and waiting."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import ray

from orchestrator.execution.broker.assignment import count_usable_lanes, parse_trainer_name
from orchestrator.execution.broker.client import BROKER_NAME
from orchestrator.execution.broker.core import BrokerCore
from orchestrator.execution.broker.failure_policy import ExitKind
from orchestrator.execution.broker.lane_entry import NO_INFO, HeldLanes, LaneEntry, TrainerInfo
from orchestrator.execution.ray.runtime import driver_node_affinity
from orchestrator.execution.rungs import scheduler_settings
from orchestrator.finetune.engine.lane_source import Directive, LeaseGrant, Report
from orchestrator.record import schema
from orchestrator.record.schema import FINAL_STATES, Evaluation, Record, RecordState
from orchestrator.record.store import Store
from orchestrator.study.configuration import Configuration

log = logging.getLogger(__name__)


class Broker:
    """The actor between the trials, the trainers and the driver of a study.

    Every method is a coroutine, so at most one of them uses the core at a time.

    Args:
        root: Folder of the store.
        scheduler: The study's early stopping, or "none".
    """

    def __init__(self, root: str, scheduler: str) -> None:
        store = Store(root)

        def find_record(configuration: Configuration) -> Record | None:
            settings = scheduler_settings(scheduler, configuration)
            record = store.get_reusable(configuration.fingerprint, settings)
            if record is not None and record.state in FINAL_STATES:
                # The trainer that wrote the record may have died before it removed the checkpoints.
                store.discard_checkpoints(record.fingerprint)
            return record

        self.clock = time.monotonic
        self.core = BrokerCore(
            partial(_newest_attempt, store),
            store.count_failures,
            find_record,
            scheduler,
            partial(_write_failure, store),
            partial(_newest_checkpoint_step, store),
        )
        self.is_aborted = False
        self.incarnation = uuid.uuid4().hex
        self.lane_events: dict[str, asyncio.Event] = {}
        """Events that wake the trials that wait for a lane, by fingerprint."""
        self.lines: list[str] = []
        """Lines from the trainers that the driver shows to the user."""

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
            The report, the final state, or None after the timeout.
        """
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
        """Remove a trial that the scheduler did not stop."""
        self.core.release(trial)

    async def stop(self, trial: str, configuration: Configuration, stop_step: int) -> None:
        """Remove a trial that the scheduler stopped at the report of step `stop_step`."""
        self.core.stop(trial, configuration, stop_step, self.clock())

    # -- trainers

    async def admit(self, trainer_id: str, devices: Sequence[str]) -> dict[str, str]:
        """Record the devices of a trainer that starts; see `DeviceRegistry.admit`."""
        return self.core.failure_policy.devices.admit(parse_trainer_name(trainer_id), devices)

    async def hold(self, trainer_id: str, faults: dict[str, str]) -> bool:
        """Exclude devices that a trainer keeps reserved, with the reason for each; see `DeviceRegistry.hold`.

        Returns:
            True if the trainer shall end now: it is drained, no lane has waited for IDLE_TRAINER_SECONDS, or
            no lane waits and the study submits no more.
        """
        is_waiting = any(entry.needs_trainer for entry in self.core.open_entries.values())
        devices = self.core.failure_policy.devices
        is_idle = devices.hold(parse_trainer_name(trainer_id), faults, is_waiting, self.clock())
        return is_idle or self.core.must_drain(trainer_id) or (self.core.closed and not is_waiting)

    async def lease(
        self,
        trainer_id: str,
        group_key: str | None,
        capacity: int,
        held: HeldLanes,
        steps_taken: int,
        info: TrainerInfo = NO_INFO,
    ) -> LeaseGrant:
        """Exchange, then lease lanes; see `BrokerCore.lease`."""
        await self.exchange(trainer_id, held, steps_taken, info)
        return self.core.lease(trainer_id, group_key, capacity, self.clock())

    async def exchange(
        self, trainer_id: str, held: HeldLanes, steps_taken: int, info: TrainerInfo = NO_INFO
    ) -> dict[str, Directive]:
        """Take a trainer's reports and return the directives for its lanes; see `BrokerCore.exchange`.

        The devices of the trainer's workers are noted if the trainer is unknown, as after a restart of the
        broker. A trainer that has ended stays known, so its last calls add no device.
        """
        if info.devices and trainer_id not in self.core.steps_taken:
            self.core.failure_policy.devices.admit(parse_trainer_name(trainer_id), info.devices)
        directives = self.core.exchange(trainer_id, held, steps_taken, self.clock())
        self.core.trainers[trainer_id].max_lanes = info.max_lanes
        self._wake_trials(held)
        return directives

    async def heartbeat(self, trainer_id: str) -> None:
        """Note that a trainer is alive although its loop makes no calls."""
        self.core.heartbeat(trainer_id, self.clock())

    async def return_lease(self, trainer_id: str, fingerprint: str, attempt: int) -> None:
        """Requeue a lane that its trainer has given back."""
        self.core.return_lease(trainer_id, fingerprint, attempt, self.clock())

    async def notify(self, line: str) -> None:
        """Keep a line of a trainer for the driver."""
        self.lines.append(line)

    async def end_lease(self, trainer_id: str, fingerprint: str, attempt: int, state: RecordState) -> None:
        """Note the state in which a lane has ended on a trainer; its record, if any, is in the store."""
        self.core.end_lease(trainer_id, fingerprint, attempt, state, self.clock())
        self._wake_trials([fingerprint])

    async def trainer_exited(self, trainer_name: str, exit_kind: ExitKind, reason: str = "") -> None:
        """Remove all incarnations of a trainer that has ended; see `BrokerCore.trainer_exited`."""
        self.core.trainer_exited(trainer_name, self.clock(), exit_kind, reason)
        self._wake_trials(self.core.entries)  # a lane that has crashed its trainers has failed

    async def drain(self, trainer_name: str | None) -> None:
        """Make a trainer, or all if the name is None, save their lanes, give them back and end."""
        self.core.drain(trainer_name)

    # -- the driver

    async def get_updates(
        self, num_ended: int, num_progress: int, num_lines: int, incarnation: str
    ) -> dict[str, Any]:
        """Return the updates for the driver since its last call.

        Args:
            num_ended: Number of ended lanes that the driver has read.
            num_progress: Number of starts and reports of lanes that it has read.
            num_lines: Number of lines of the trainers that it has read.
            incarnation: The incarnation of the broker that the numbers refer to. If it differs from this
                incarnation, everything is returned.

        Returns:
            "incarnation": this incarnation; "ended", "progress" and "lines": the new ended lanes, starts and
            reports of lanes, and lines; "counts": the number of lanes in each phase and of live trainers;
            "steps_taken": the optimizer steps of each trainer; "hung": the names of hung trainers;
            "excluded_devices": excluded device -> reason; "holders": the names of the trainers that keep such
            devices reserved; "max_lanes": for each trainer that has reported its limit, the number of lanes
            that it can hold; "usable_lanes": for each of these trainers, the number of lanes that a search
            may keep unfinished; "abort_reason": the reason why no more trainers should be started, or "".
        """
        self.core.tick(self.clock())
        devices = self.core.failure_policy.devices
        if incarnation != self.incarnation:
            num_ended = num_progress = num_lines = 0
        return {
            "incarnation": self.incarnation,
            "ended": self.core.ended_lanes[num_ended:],
            "progress": self.core.progress[num_progress:],
            "lines": self.lines[num_lines:],
            "counts": self.core.counts(),
            "steps_taken": dict(self.core.steps_taken),
            "hung": self.core.hung_trainers(self.clock()),
            "excluded_devices": devices.excluded,
            "holders": frozenset(devices.holders),
            "max_lanes": [view.max_lanes for view in self.core.trainers.values() if view.max_lanes],
            "usable_lanes": count_usable_lanes(self.core.trainers.values(), self.core.open_entries.values()),
            "abort_reason": self.core.failure_policy.abort_reason,
        }

    async def close(self) -> None:
        """Let trainers end when no lane waits, because no more trials will come."""
        self.core.closed = True

    async def abort(self) -> None:
        """Answer all waiting trials, because the study cannot continue."""
        self.is_aborted = True
        self._wake_trials(self.lane_events)

    def _wake_trials(self, fingerprints: Iterable[str]) -> None:
        for fingerprint in self.lane_events.keys() & fingerprints:
            self.lane_events[fingerprint].set()


def _newest_attempt(store: Store, fingerprint: str) -> int:
    attempts = (store.checkpoints / fingerprint).glob("*")
    return max((int(path.name) for path in attempts if path.name.isdecimal()), default=0)


def _newest_checkpoint_step(store: Store, fingerprint: str) -> int:
    files = (store.checkpoints / fingerprint).glob("*/step-*.safetensors")
    steps = [path.stem.removeprefix("step-") for path in files]
    return max((int(step) for step in steps if step.isdecimal()), default=0)


def _write_failure(store: Store, entry: LaneEntry, configuration: Configuration, why: str) -> RecordState:
    """Write the record of a lane that crashes every trainer.

    Returns:
        The state of the record that counts, which another process may have written before.
    """
    record = Record(
        fingerprint=entry.fingerprint,
        configuration=configuration,
        state="failed",
        steps=entry.reports[-1].step if entry.reports else 0,
        reason=why,
        evaluations=tuple(Evaluation(r.step, "validation", r.scores) for r in entry.reports),
        provenance=schema.current_provenance("none", attempt=entry.attempt, ended=time.time()),
    )
    try:
        if not store.put(record, new_failures=entry.solo_crashes) and (first := store.get(entry.fingerprint)):
            return first.state
    except OSError as error:  # the next study trains the lane again
        log.warning("%s: its record cannot be written: %s", entry.fingerprint[:12], error)
    return "failed"


def start_broker(store: Store, scheduler: str) -> Any:
    """Start the broker's actor in the study's Ray namespace, on the driver's node.

    Ray restarts a broker that dies, with an empty state. The concurrency is high because every trial waits in
    a call of its own. The broker runs on the driver's node because worker nodes come and go.
    """
    actor: Any = ray.remote(Broker)
    options = {"name": BROKER_NAME, "num_cpus": 0, "max_restarts": -1, "max_concurrency": 10_000}
    placed = actor.options(scheduling_strategy=driver_node_affinity(), **options)
    return placed.remote(str(store.root), scheduler)
