"""The classification of Ray Train's errors. test_crashed_trainer.py and test_nodes.py kill real processes."""

from __future__ import annotations

import pytest
from ray.exceptions import ActorUnavailableError, OutOfMemoryError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import (
    UserExceptionWithTraceback,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)

from orchestrator.execution.broker.failure_policy import MAX_TRAINER_FAILURES, ExitKind, FailurePolicy
from orchestrator.execution.trainers.exit_status import classify_exit
from orchestrator.finetune.failures import BrokenKind, StoreFullError, TrainerBrokenError


def raised(*errors: BaseException) -> WorkerGroupError:
    """Return the error of a Train run whose workers raised these errors."""
    failures = {rank: UserExceptionWithTraceback(error, "its traceback") for rank, error in enumerate(errors)}
    return WorkerGroupError("what they said", failures)


def out_of_memory() -> WorkerGroupError:
    """Return the error of a Train run whose worker was killed by Ray's memory monitor."""
    ended = OutOfMemoryError("Task was killed due to the node running low on memory.")
    return WorkerGroupError("they died", {0: WorkerHealthCheckFailedError("no answer", ended)})


@pytest.mark.parametrize(
    ("error", "kind", "reason"),
    [
        (ControllerError(WorkerGroupStartupTimeoutError(1)), ExitKind.PLACEMENT_TIMEOUT, "startup timed out"),
        (ControllerError(RuntimeError("a callback")), ExitKind.FAILED, "a callback"),
        (
            raised(TrainerBrokenError("the device is lost", BrokenKind.DEVICE_LOST)),
            ExitKind.CRASHED,
            "the device is lost",
        ),
        (
            raised(
                RuntimeError("closed by peer"),
                TrainerBrokenError("the device is lost", BrokenKind.DEVICE_LOST),
            ),
            ExitKind.CRASHED,
            "the device",
        ),
        (
            raised(
                TrainerBrokenError(
                    "3 configurations in a row failed with a data file", BrokenKind.REPEATED_LANE_FAILURES
                )
            ),
            ExitKind.REPEATED_LANE_FAILURES,
            "a data file",
        ),
        (out_of_memory(), ExitKind.OUT_OF_MEMORY, "short of memory"),
        (raised(StoreFullError("no space left on /store")), ExitKind.STORE_FULL, "no space left on /store"),
        (raised(ActorUnavailableError("the broker", None)), ExitKind.FAILED, "the broker"),  # no worker died
        (ActorUnavailableError("the controller", None), ExitKind.FAILED, "the controller"),
    ],
)
def test_an_error_gives_its_exit_kind(error: Exception, kind: ExitKind, reason: str) -> None:
    end = classify_exit(error)
    assert end.kind is kind
    assert reason in end.reason
    assert "\n" not in end.reason


def fail(policy: FailurePolicy, steps: int = 1) -> None:
    policy.on_exit("trainer", steps, is_failure=True)


def test_deaths_without_a_step_end_the_study_soon_and_without_a_gain_in_the_end() -> None:
    policy = FailurePolicy()
    for _ in range(MAX_TRAINER_FAILURES):
        fail(policy)
    assert not policy.abort_reason
    policy.on_step("trainer", 1)
    fail(policy)
    assert not policy.abort_reason
    for _ in range(MAX_TRAINER_FAILURES):
        fail(policy)
    assert "without taking a step" in policy.abort_reason
    policy.on_progress()
    for trainers in (1, 4):
        policy.max_live_trainers = trainers
        for _ in range(MAX_TRAINER_FAILURES * (1 + trainers)):
            policy.on_step("trainer", 1)
            fail(policy)
            assert not policy.abort_reason
        policy.on_step("trainer", 1)
        fail(policy)
        assert "no lane got any further" in policy.abort_reason
        policy.on_progress()
        assert not policy.abort_reason
    for _ in range(MAX_TRAINER_FAILURES * (1 + trainers) + 1):
        assert not policy.abort_reason
        policy.on_faulty_lane()
    assert policy.abort_reason, "if all lanes fail, the lanes are not the cause"
