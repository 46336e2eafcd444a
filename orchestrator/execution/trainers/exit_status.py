"""How a trainer has come to its end, from what Ray Train says of its run; and when it is too often."""

from __future__ import annotations

import time
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from orchestrator.finetune.failures import BrokenKind, TrainerBrokenError
from orchestrator.util import timeouts
from orchestrator.util.redaction import redact_secrets

if TYPE_CHECKING:
    from ray.exceptions import RayActorError

MAX_TRAINER_FAILURES = 3  # in a row


class ExitKind(StrEnum):
    DONE = "done"
    """By itself: no work was left, or it was told to go."""
    PLACEMENT_TIMEOUT = "placement_timeout"
    """It waited for its place in vain."""
    NODE_LOST = "node_lost"
    """With the node of one of its workers."""
    CRASHED = "crashed"
    """A worker's process died by itself, on a node that lives."""
    OUT_OF_MEMORY = "out_of_memory"
    """Ray ended a worker because its machine was short of memory: fewer lanes may have enough. No lane is
    guilty of it: what took the memory may be another's process."""
    REPEATED_LANE_FAILURES = "repeated_lane_failures"
    """A worker gave up since lane after lane failed with the same words: for what these lanes have in common,
    or for something that is wrong with the machine. What it held besides was never tried."""
    FAILED = "failed"
    """A worker gave up, or what stands between it and the driver died."""


@dataclass(frozen=True)
class ExitStatus:
    kind: ExitKind
    reason: str = ""
    """For people, one line; empty when it is done."""


class FailurePolicy:
    """Of a study's trainers, in a row. Two things end the study: trainers that die one after another while none of
    them takes a step, and, for as many as there are trainers, deaths while no lane gets any further."""

    def __init__(self) -> None:
        self.failures_without_step = 0
        """Since any trainer took a step, or a lane was found guilty of a crash."""
        self.failures_without_progress = 0
        """Since a lane got further: a new report, a newer checkpoint, a good end. Lanes found guilty count
        like deaths: where all are, it is not the lanes."""
        self.max_live_trainers = 1
        """The most that were there at once."""

    def on_step(self) -> None:
        """A trainer has taken one."""
        self.failures_without_step = 0

    def on_progress(self) -> None:
        """A lane has got further."""
        self.failures_without_step = self.failures_without_progress = 0

    def on_faulty_lane(self) -> None:
        """A lane crashes its trainer whatever is tried, and is given up."""
        self.failures_without_step = 0
        self.failures_without_progress += 1

    def on_trainer_failure(self) -> None:
        """A death that tells nothing. One that narrows down which lane it is for is none of these: there are
        no more of them than halving a lane group and trying a lone lane again can make."""
        self.failures_without_step += 1
        self.failures_without_progress += 1

    @property
    def abort_reason(self) -> str:
        """Why no other trainer should be started; empty while one should."""
        if self.failures_without_step > MAX_TRAINER_FAILURES:
            return (
                f"Trainers died {self.failures_without_step} times in a row without taking a step; see above."
            )
        if self.failures_without_progress > MAX_TRAINER_FAILURES * (1 + self.max_live_trainers):
            return f"Trainers died {self.failures_without_progress} times in a row and got no lane any further; see above."
        return ""


def classify_exit(error: Exception, controller: Any = None) -> ExitStatus:
    """Classify the error that ended a trainer's Ray Train run. This function asks Ray how the run's actors died.

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
            return ExitStatus(ExitKind.PLACEMENT_TIMEOUT, format_ray_error(error))
        # A worker died while it was started; Train does not say which.
        died = isinstance(failure, (WorkerGroupStartupFailedError, RayActorError))
        if died and controller is not None and has_worker_on_lost_node(controller):
            return ExitStatus(ExitKind.NODE_LOST, format_ray_error(error))
    if not isinstance(error, WorkerGroupError):  # the controller died, which ends its workers, or gave up
        return ExitStatus(ExitKind.FAILED, format_ray_error(error))
    # When a worker dies the others fail at their next sum: what they say explains nothing.
    failures = error.worker_failures.values()
    health_failures = [
        f.health_check_failure for f in failures if isinstance(f, WorkerHealthCheckFailedError)
    ]
    deaths = [failure for failure in health_failures if isinstance(failure, RayActorError)]
    exit_kinds = [(_worker_exit_kind(death), format_ray_error(death)) for death in deaths]
    for fate, why in exit_kinds:
        if fate is ExitKind.NODE_LOST:
            return ExitStatus(fate, why)
    for short in health_failures:
        if isinstance(short, OutOfMemoryError):
            return ExitStatus(ExitKind.OUT_OF_MEMORY, "its machine was short of memory, and Ray ended it")
    for fate, why in exit_kinds:
        if fate is ExitKind.CRASHED:
            return ExitStatus(fate, why.partition(" Some common causes")[0])
    raised = [f._base_exc for f in failures if isinstance(f, UserExceptionWithTraceback)]
    for exception in raised:
        if isinstance(exception, TrainerBrokenError):
            lost = exception.kind is BrokenKind.DEVICE_LOST
            return ExitStatus(
                ExitKind.CRASHED if lost else ExitKind.REPEATED_LANE_FAILURES, format_ray_error(exception)
            )
    return ExitStatus(ExitKind.FAILED, format_ray_error((raised or [error])[0]))


def format_ray_error(error: BaseException) -> str:
    """The last line that says something, of a chain of Ray's wrappers."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return redact_secrets(lines[-1])[:300] if lines else type(error).__name__


def _worker_exit_kind(error: RayActorError) -> ExitKind:
    """A worker that is lost to Ray is called unavailable until Ray knows what became of it."""
    from ray._private.state import actors
    from ray.exceptions import ActorDiedError

    until = time.monotonic() + timeouts.UNREACHABLE_TIMEOUT_SECONDS
    while True:
        dead = isinstance(error, ActorDiedError) or (
            error.actor_id is not None and actors(error.actor_id)["State"] == "DEAD"
        )
        if _died_with_node(error):
            return ExitKind.NODE_LOST
        if dead:
            return ExitKind.CRASHED
        if time.monotonic() > until:
            return ExitKind.FAILED
        time.sleep(0.5)


def has_worker_on_lost_node(controller: Any) -> bool:
    """Return whether one of a Train controller's workers was on a node that is dead, draining or unreachable.

    Args:
        controller: the actor handle of the Train controller, which owns the worker actors.
    """
    from ray._private.state import actors

    own = actors(controller._actor_id.hex())
    # Addresses are used again: those of actors that were there before this one mean somebody else.
    its = [a for a in actors().values() if a["OwnerAddress"] == own["Address"]]
    return any(_is_on_lost_node(actor) for actor in its if actor["StartTime"] >= own["StartTime"])


def _died_with_node(error: RayActorError) -> bool:
    """Ray says so when it knows, which takes it a while."""
    from ray._private.state import actors

    if error.preempted or error.actor_id is None:
        return error.preempted
    return _is_on_lost_node(actors(error.actor_id))


def _is_on_lost_node(actor: dict[str, Any]) -> bool:
    """`actor`: Ray's row about it."""
    import ray
    from ray.core.generated import common_pb2

    from orchestrator.execution.ray.runtime import draining_node_ids, is_listening

    context: Any = common_pb2  # made by protobuf: type checkers see nothing of it
    if actor["DeathCause"].actor_died_error_context.reason == context.ActorDiedErrorContext.NODE_DIED:
        return True
    if not actor["Address"]["NodeID"].strip("f"):  # it never had one
        return False
    node = next((n for n in ray.nodes() if n["NodeID"] == actor["Address"]["NodeID"]), None)
    if node is None or not node["Alive"] or node["NodeID"] in draining_node_ids():
        return True
    return not is_listening(node["NodeManagerAddress"], node["NodeManagerPort"])
