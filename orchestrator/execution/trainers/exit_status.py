"""How a seat has come to its end, from what Ray Train says of its run; and when it is too often."""

from __future__ import annotations

import time
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from orchestrator.util.redaction import without_secrets

if TYPE_CHECKING:
    from ray.exceptions import RayActorError

DEATHS_ALLOWED = 3  # in a row
DEVICE_LOST = "the device is lost"  # how SeatBroken tells it from lanes that failed alike
OUT_OF_REACH_SECONDS = 30.0  # a worker is out of reach: how long Ray may take to find out why


class How(StrEnum):
    DONE = "done"
    """By itself: no work was left, or it was told to go."""
    NO_ROOM = "no room"
    """It waited for its place in vain."""
    LOST = "lost"
    """With the node of one of its workers."""
    CRASHED = "crashed"
    """A worker's process died by itself, on a node that lives."""
    MEMORY = "memory"
    """Ray ended a worker because its machine was short of memory: fewer lanes may have enough. No lane is
    guilty of it: what took the memory may be another's process."""
    ALIKE = "alike"
    """A worker gave up since lane after lane failed with the same words: for what these lanes have in common,
    or for something that is wrong with the machine. What it held besides was never tried."""
    FAILED = "failed"
    """A worker gave up, or what stands between it and the driver died."""


@dataclass(frozen=True)
class SeatEnd:
    how: How
    reason: str = ""
    """For people, one line; empty when it is done."""


class Deaths:
    """Of a study's seats, in a row. Two things end the study: seats that die one after another while none of
    them takes a step, and, for as many as there are seats, deaths while no lane gets any further."""

    def __init__(self) -> None:
        self.barren = 0
        """Since any seat took a step, or a lane was found guilty of a crash."""
        self.fruitless = 0
        """Since a lane got further: a new report, a newer checkpoint, a good end. Lanes found guilty count
        like deaths: where all are, it is not the lanes."""
        self.seats = 1
        """The most that were there at once."""

    def step(self) -> None:
        """A seat has taken one."""
        self.barren = 0

    def gain(self) -> None:
        """A lane has got further."""
        self.barren = self.fruitless = 0

    def guilty(self) -> None:
        """A lane crashes its seat whatever is tried, and is given up."""
        self.barren = 0
        self.fruitless += 1

    def died(self) -> None:
        """A death that tells nothing. One that narrows down which lane it is for is none of these: there are
        no more of them than halving a pack and trying a lone lane again can make."""
        self.barren += 1
        self.fruitless += 1

    @property
    def hopeless(self) -> str:
        """Why no other seat should be started; empty while one should."""
        if self.barren > DEATHS_ALLOWED:
            return f"Seats died {self.barren} times in a row without taking a step; see above."
        if self.fruitless > DEATHS_ALLOWED * (1 + self.seats):
            return f"Seats died {self.fruitless} times in a row and got no lane any further; see above."
        return ""


def end_of(error: Exception, controller: Any = None) -> SeatEnd:
    """Classify the error that ended a seat's Ray Train run. This function asks Ray how the run's actors died.

    Args:
        error: the exception that `TorchTrainer.fit` raised.
        controller: the actor handle of the run's Train controller, or None if none was created. With None a
            worker that was lost while the run started counts as FAILED instead of LOST.

    Returns:
        The kind of the end, and its reason in one line.
    """
    from ray.exceptions import OutOfMemoryError, RayActorError
    from ray.train import ControllerError, WorkerGroupError
    from ray.train.v2._internal.exceptions import (
        UserExceptionWithTraceback,
        WorkerGroupStartupFailedError,
        WorkerGroupStartupTimeoutError,
        WorkerHealthCheckFailedError,
    )

    if isinstance(error, ControllerError):
        failure = error.controller_failure
        if isinstance(failure, WorkerGroupStartupTimeoutError):
            return SeatEnd(How.NO_ROOM, reason(error))
        # A worker died while it was started; Train does not say which.
        died = isinstance(failure, (WorkerGroupStartupFailedError, RayActorError))
        if died and controller is not None and lost_a_worker(controller):
            return SeatEnd(How.LOST, reason(error))
    if not isinstance(error, WorkerGroupError):  # the controller died, which ends its workers, or gave up
        return SeatEnd(How.FAILED, reason(error))
    # When a worker dies the others fail at their next sum: what they say explains nothing.
    failures = error.worker_failures.values()
    silent = [f.health_check_failure for f in failures if isinstance(f, WorkerHealthCheckFailedError)]
    deaths = [failure for failure in silent if isinstance(failure, RayActorError)]
    fates = [(_fate(death), reason(death)) for death in deaths]
    for fate, why in fates:
        if fate is How.LOST:
            return SeatEnd(fate, why)
    for short in silent:
        if isinstance(short, OutOfMemoryError):
            return SeatEnd(How.MEMORY, "its machine was short of memory, and Ray ended it")
    for fate, why in fates:
        if fate is How.CRASHED:
            return SeatEnd(fate, why.partition(" Some common causes")[0])
    raised = [f._base_exc for f in failures if isinstance(f, UserExceptionWithTraceback)]
    for exception in raised:
        if type(exception).__name__ == "SeatBroken":
            lost = str(exception).startswith(DEVICE_LOST)
            return SeatEnd(How.CRASHED if lost else How.ALIKE, reason(exception))
    return SeatEnd(How.FAILED, reason((raised or [error])[0]))


def reason(error: BaseException) -> str:
    """The last line that says something, of a chain of Ray's wrappers."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return without_secrets(lines[-1])[:300] if lines else type(error).__name__


def _fate(death: RayActorError) -> How:
    """A worker that is lost to Ray is called unavailable until Ray knows what became of it."""
    from ray._private.state import actors
    from ray.exceptions import ActorDiedError

    until = time.monotonic() + OUT_OF_REACH_SECONDS
    while True:
        dead = isinstance(death, ActorDiedError) or (
            death.actor_id is not None and actors(death.actor_id)["State"] == "DEAD"
        )
        if _with_its_node(death):
            return How.LOST
        if dead:
            return How.CRASHED
        if time.monotonic() > until:
            return How.FAILED
        time.sleep(0.5)


def lost_a_worker(controller: Any) -> bool:
    """Return whether one of a Train controller's workers was on a node that is dead, draining or unreachable.

    Args:
        controller: the actor handle of the Train controller, which owns the worker actors.
    """
    from ray._private.state import actors

    own = actors(controller._actor_id.hex())
    # Addresses are used again: those of actors that were there before this one mean somebody else.
    its = [a for a in actors().values() if a["OwnerAddress"] == own["Address"]]
    return any(_on_a_lost_node(actor) for actor in its if actor["StartTime"] >= own["StartTime"])


def _with_its_node(death: RayActorError) -> bool:
    """Ray says so when it knows, which takes it a while."""
    from ray._private.state import actors

    if death.preempted or death.actor_id is None:
        return death.preempted
    return _on_a_lost_node(actors(death.actor_id))


def _on_a_lost_node(actor: dict[str, Any]) -> bool:
    """`actor`: Ray's row about it."""
    import ray
    from ray.core.generated import common_pb2

    from orchestrator.execution.ray.runtime import draining, listens

    context: Any = common_pb2  # made by protobuf: type checkers see nothing of it
    if actor["DeathCause"].actor_died_error_context.reason == context.ActorDiedErrorContext.NODE_DIED:
        return True
    if not actor["Address"]["NodeID"].strip("f"):  # it never had one
        return False
    node = next((n for n in ray.nodes() if n["NodeID"] == actor["Address"]["NodeID"]), None)
    if node is None or not node["Alive"] or node["NodeID"] in draining():
        return True
    return not listens(node["NodeManagerAddress"], node["NodeManagerPort"])
