"""The trainer's side of the broker: remote calls that survive a restart of the broker."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import ray
from ray.exceptions import GetTimeoutError, RayActorError

from orchestrator.execution.broker.lane_entry import HeldLane, TrainerInfo
from orchestrator.finetune.engine.lane_source import Directive, LeaseGrant, Report
from orchestrator.record.schema import RecordState
from orchestrator.util import timeouts

BROKER_NAME = "broker"
"""Name of the broker's actor in the Ray namespace of the study."""
Result = TypeVar("Result")


class BrokerClient:
    """The `LaneSource` of a trainer's fine-tuning loop.

    Every lease, report and exchange names all lanes that the trainer holds, each with its last report, and
    the trainer's devices and limit of lanes. The next call thereby repairs the effects of a lost reply or of
    a restart of the broker.

    Args:
        trainer_id: The trainer's name and incarnation; a new process is a new incarnation.
        devices: The names of the devices of the trainer's workers.
    """

    def __init__(self, trainer_id: str, devices: Sequence[str] = ()) -> None:
        self.trainer_id, self._info = trainer_id, TrainerInfo(tuple(devices))
        self.broker = ray.get_actor(BROKER_NAME)
        self.held: dict[str, HeldLane] = {}
        self.steps_taken = 0
        self.last_progress_time = time.monotonic()
        """The time of the last call of the loop, or of its last progress without a call."""
        self.is_starting_lanes = False
        """True from a lease of lanes until the next exchange; loading a model shows no progress."""
        threading.Thread(target=self._send_heartbeats, name="heartbeat", daemon=True).start()

    def lease(self, group_key: str | None, capacity: int, steps_taken: int) -> LeaseGrant:
        """Lease up to `capacity` lanes; see `LaneSource.lease`."""
        self.steps_taken = steps_taken
        grant: LeaseGrant = self._call(
            "lease", self.trainer_id, group_key, capacity, self.held, steps_taken, self._info
        )
        for lease in grant.leases:
            self.held[lease.configuration.fingerprint] = (lease.attempt, lease.configuration, None)
        self.is_starting_lanes = bool(grant.leases)
        return grant

    def report(self, report: Report) -> Directive:
        """Send a report and return the directive for its lane.

        The exchange also returns directives for the other lanes. This method ignores them, because the next
        exchange repeats them.
        """
        fingerprint = report.fingerprint
        if fingerprint not in self.held:
            return Directive.DROP
        attempt, configuration, _ = self.held[fingerprint]
        self.held[fingerprint] = (attempt, configuration, report)
        answer = self._exchange()[fingerprint]
        if answer is Directive.DROP:
            del self.held[fingerprint]
        return answer

    def exchange(self, steps_taken: int) -> Mapping[str, Directive]:
        """Return the directives for all lanes that the trainer holds, by fingerprint."""
        self.steps_taken, self.is_starting_lanes = steps_taken, False
        directives = self._exchange()
        for fingerprint, directive in directives.items():
            if directive is Directive.DROP:
                del self.held[fingerprint]
        return directives

    def return_lease(self, fingerprint: str, attempt: int) -> None:
        """Give back a lane that has not ended."""
        self._call("return_lease", self.trainer_id, fingerprint, attempt)
        self.held.pop(fingerprint, None)

    def notify(self, line: str) -> None:
        """Show a line to the user of the study."""
        self._call("notify", line)

    def note_max_lanes(self, max_lanes: int) -> None:
        """Note how many lanes the trainer can hold; the next lease or exchange sends it."""
        self._info = self._info._replace(max_lanes=max_lanes)

    def note_progress(self) -> None:
        """Note that the loop has made progress; see `LaneSource.note_progress`."""
        self.last_progress_time = time.monotonic()

    def end_lease(self, fingerprint: str, attempt: int, state: RecordState) -> None:
        """Tell the broker that a lane has ended; its record is in the store."""
        self._call("end_lease", self.trainer_id, fingerprint, attempt, state)
        self.held.pop(fingerprint, None)

    def _exchange(self) -> dict[str, Directive]:
        directives: dict[str, Directive] = self._call(
            "exchange", self.trainer_id, self.held, self.steps_taken, self._info
        )
        return directives

    def _send_heartbeats(self) -> None:
        """Keep the trainer alive for the broker while the loop loads a model or evaluates.

        The heartbeats end when the loop is hung: it has made neither a call nor progress for long.
        """
        while True:
            time.sleep(timeouts.HEARTBEAT_SECONDS)
            limit = timeouts.LANE_START_SECONDS if self.is_starting_lanes else timeouts.HUNG_SECONDS
            if time.monotonic() - self.last_progress_time < limit:
                self.broker.heartbeat.remote(self.trainer_id)

    def _call(self, method: str, *args: Any) -> Any:
        self.note_progress()
        call = getattr(self.broker, method)
        return retry_until_lost(lambda: ray.get(call.remote(*args), timeout=timeouts.BROKER_LOST_SECONDS))


def retry_until_lost(call: Callable[[], Result]) -> Result:
    """Call the broker until it answers.

    The call is repeated until BROKER_LOST_SECONDS after its first failure. The time before the failure does
    not count, so a process that was suspended during the first call makes another one.

    Args:
        call: A call of the broker, which may take up to BROKER_LOST_SECONDS.

    Returns:
        The answer.

    Raises:
        RayActorError, GetTimeoutError: Raised by the last call.
    """
    deadline: float | None = None
    while True:
        try:
            return call()
        except (RayActorError, GetTimeoutError):
            now = time.monotonic()
            deadline = deadline or now + timeouts.BROKER_LOST_SECONDS
            if now > deadline:
                raise
            time.sleep(0.5)
