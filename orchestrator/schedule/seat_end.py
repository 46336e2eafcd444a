"""How a seat has come to its end, from what Ray Train says of its run."""

from __future__ import annotations

import time
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.exceptions import RayActorError

NODE_SECONDS = 5.0  # a worker is out of reach: how long its node is given to show that it is, too


class How(StrEnum):
    DONE = "done"
    """By itself: no work was left, or it was told to go."""
    NO_ROOM = "no room"
    """It waited for its place in vain."""
    LOST = "lost"
    """With the node of one of its workers."""
    CRASHED = "crashed"
    """A worker's process died by itself, on a node that lives."""
    FAILED = "failed"
    """A worker gave up, or what stands between it and the driver died."""


@dataclass(frozen=True)
class SeatEnd:
    how: How
    reason: str = ""
    """For people, one line; empty when it is done."""


def end_of(error: Exception) -> SeatEnd:
    """What `TorchTrainer.fit` raised means. Asks Ray how its actors died."""
    from ray.exceptions import ActorDiedError, RayActorError
    from ray.train import ControllerError, WorkerGroupError
    from ray.train.v2._internal.exceptions import (
        UserExceptionWithTraceback,
        WorkerGroupStartupTimeoutError,
        WorkerHealthCheckFailedError,
    )

    if isinstance(error, ControllerError) and isinstance(
        error.controller_failure, WorkerGroupStartupTimeoutError
    ):
        return SeatEnd(How.NO_ROOM, reason(error))
    if not isinstance(error, WorkerGroupError):  # the controller died, which ends its workers, or gave up
        return SeatEnd(How.FAILED, reason(error))
    # When a worker dies the others fail at their next sum: what they say explains nothing.
    failures = error.worker_failures.values()
    silent = [f.health_check_failure for f in failures if isinstance(f, WorkerHealthCheckFailedError)]
    deaths = [failure for failure in silent if isinstance(failure, RayActorError)]
    for death in deaths:
        until = time.monotonic() + (0.0 if isinstance(death, ActorDiedError) else NODE_SECONDS)
        while not (lost := _with_its_node(death)) and time.monotonic() < until:
            time.sleep(0.5)
        if lost:
            return SeatEnd(How.LOST, reason(death))
    for death in deaths:
        if isinstance(death, ActorDiedError):
            return SeatEnd(How.CRASHED, reason(death).partition(" Some common causes")[0])
    raised = [f._base_exc for f in failures if isinstance(f, UserExceptionWithTraceback)]
    for exception in raised:
        if type(exception).__name__ == "SeatBroken":
            return SeatEnd(How.CRASHED, reason(exception))
    return SeatEnd(How.FAILED, reason((raised or [error])[0]))


def reason(error: BaseException) -> str:
    """The last line that says something, of a chain of Ray's wrappers."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__


def _with_its_node(death: RayActorError) -> bool:
    """Ray says so when it knows; that takes it a while, in which a lost actor is called unavailable."""
    import ray
    from ray._private.state import actors
    from ray.core.generated import common_pb2

    from orchestrator.schedule.cluster import draining, listens

    if death.preempted or death.actor_id is None:
        return death.preempted
    context: Any = common_pb2  # made by protobuf: type checkers see nothing of it
    actor: dict[str, Any] = actors(death.actor_id)
    if actor["DeathCause"].actor_died_error_context.reason == context.ActorDiedErrorContext.NODE_DIED:
        return True
    node = next((n for n in ray.nodes() if n["NodeID"] == actor["Address"]["NodeID"]), None)
    if node is None or not node["Alive"] or node["NodeID"] in draining():
        return True
    return not listens(node["NodeManagerAddress"], node["NodeManagerPort"])
