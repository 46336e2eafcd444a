"""The reason for a trainer's end, from the exception of its Ray Train run and from Ray's table of actors."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayActorError
from ray.train import ControllerError, WorkerGroupError

from orchestrator.execution.broker.failure_policy import ExitKind
from orchestrator.execution.ray import private
from orchestrator.execution.ray.errors import format_ray_error
from orchestrator.execution.ray.runtime import is_listening
from orchestrator.finetune.failures import BrokenKind, StoreFullError, TrainerBrokenError
from orchestrator.util import timeouts


@dataclass(frozen=True)
class ExitStatus:
    """The end of a trainer."""

    kind: ExitKind
    reason: str = ""
    """One line for the user; empty for ExitKind.DONE."""


def classify_exit(error: Exception, controller: Any = None) -> ExitStatus:
    """Return the reason for a trainer's end. Ray is asked for the state of the run's actors.

    Args:
        error: The exception that `fit` of Ray Train's trainer raised.
        controller: The handle of the run's Train controller, or None if none was created. With None, a worker
            that was lost during startup counts as FAILED instead of NODE_LOST.
    """
    if isinstance(error, WorkerGroupError):
        return _classify_worker_errors(error)
    kind = ExitKind.FAILED  # the controller died, which ends its workers, or has given up
    if isinstance(error, ControllerError):
        failure, (placement_timeout, startup_failure) = error.controller_failure, private.startup_errors()
        if isinstance(failure, placement_timeout):
            kind = ExitKind.PLACEMENT_TIMEOUT
        elif controller is not None and isinstance(failure, (startup_failure, RayActorError)):
            # A worker died during startup; Train does not say which one.
            kind = ExitKind.NODE_LOST if has_worker_on_lost_node(controller) else kind
    return ExitStatus(kind, format_ray_error(error))


def _classify_worker_errors(error: WorkerGroupError) -> ExitStatus:
    """Return the reason for the end of a run's workers, from the most specific error.

    After the death of one worker, the others fail in their next collective operation, so their errors are not
    the cause.
    """
    health_errors = private.health_check_errors(error)
    deaths = [death for death in health_errors if isinstance(death, RayActorError)]
    reasons = {_classify_worker_death(death): format_ray_error(death) for death in reversed(deaths)}
    if ExitKind.NODE_LOST in reasons:
        return ExitStatus(ExitKind.NODE_LOST, reasons[ExitKind.NODE_LOST])
    if any(isinstance(health_error, OutOfMemoryError) for health_error in health_errors):
        return ExitStatus(ExitKind.OUT_OF_MEMORY, "its machine was short of memory, and Ray killed it")
    if ExitKind.CRASHED in reasons:
        return ExitStatus(ExitKind.CRASHED, reasons[ExitKind.CRASHED].partition(" Some common causes")[0])
    raised = private.training_function_errors(error)
    if full := next((one for one in raised if isinstance(one, StoreFullError)), None):
        return ExitStatus(ExitKind.STORE_FULL, format_ray_error(full))
    for exception in raised:
        if isinstance(exception, TrainerBrokenError):
            is_lost = exception.kind is BrokenKind.DEVICE_LOST
            kind = ExitKind.CRASHED if is_lost else ExitKind.REPEATED_LANE_FAILURES
            return ExitStatus(kind, format_ray_error(exception))
    return ExitStatus(ExitKind.FAILED, format_ray_error((raised or [error])[0]))


def _classify_worker_death(error: RayActorError) -> ExitKind:
    """Return the reason for a worker's death, after waiting until Ray knows it.

    Ray reports a lost worker as unavailable until Ray knows whether the process or the node died.

    Returns:
        NODE_LOST, CRASHED, or FAILED if Ray does not know the reason in UNREACHABLE_TIMEOUT_SECONDS.
    """
    deadline = time.monotonic() + timeouts.UNREACHABLE_TIMEOUT_SECONDS
    while True:
        is_dead = isinstance(error, ActorDiedError) or (
            error.actor_id is not None and private.actor_row(error.actor_id)["State"] == "DEAD"
        )
        if _died_with_node(error):
            return ExitKind.NODE_LOST
        if is_dead:
            return ExitKind.CRASHED
        if time.monotonic() > deadline:
            return ExitKind.FAILED
        time.sleep(0.5)


def has_worker_on_lost_node(controller: Any) -> bool:
    """Return whether a worker of a run was on a node that is dead, draining or unreachable.

    Args:
        controller: The handle of the Train controller, which owns the workers.
    """
    return any(_is_on_lost_node(row) for row in private.owned_actor_rows(controller))


def _died_with_node(error: RayActorError) -> bool:
    if error.preempted or error.actor_id is None:
        return error.preempted
    return _is_on_lost_node(private.actor_row(error.actor_id))


def _is_on_lost_node(row: private.ActorRow) -> bool:
    if private.died_with_node(row):
        return True
    node_id = row["Address"]["NodeID"]
    if not node_id.strip("f"):  # the actor was never placed
        return False
    node = next((n for n in ray.nodes() if n["NodeID"] == node_id and n["Alive"]), None)
    if node is None or node_id in private.draining_node_ids():
        return True
    # Ray takes a while to notice that a node is gone.
    return not is_listening(node["NodeManagerAddress"], node["NodeManagerPort"])
