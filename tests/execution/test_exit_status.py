"""Whose fault it is that a seat ended. Real deaths are those of test_chaos.py and test_nodes.py."""

from __future__ import annotations

import pytest
from ray.exceptions import ActorUnavailableError, OutOfMemoryError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import (
    UserExceptionWithTraceback,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)

from orchestrator.execution.trainers.exit_status import DEATHS_ALLOWED, Deaths, How, end_of
from orchestrator.finetune.failures import SeatBroken, StoreFull


def raised(*errors: BaseException) -> WorkerGroupError:
    """What Train makes of what its workers raised."""
    told = {rank: UserExceptionWithTraceback(error, "its traceback") for rank, error in enumerate(errors)}
    return WorkerGroupError("what they said", told)


def short_of_memory() -> WorkerGroupError:
    """What Train makes of a worker that Ray's memory monitor ended."""
    ended = OutOfMemoryError("Task was killed due to the node running low on memory.")
    return WorkerGroupError("they died", {0: WorkerHealthCheckFailedError("no answer", ended)})


@pytest.mark.parametrize(
    ("error", "how", "reason"),
    [
        (ControllerError(WorkerGroupStartupTimeoutError(1)), How.NO_ROOM, "startup timed out"),
        (ControllerError(RuntimeError("a callback")), How.FAILED, "a callback"),
        (raised(SeatBroken("the device is lost")), How.CRASHED, "the device is lost"),
        (raised(RuntimeError("closed by peer"), SeatBroken("the device is lost")), How.CRASHED, "the device"),
        (raised(SeatBroken("3 configurations in a row failed with a data file")), How.ALIKE, "a data file"),
        (short_of_memory(), How.MEMORY, "short of memory"),
        (raised(StoreFull("no space left on /store")), How.FAILED, "no space left on /store"),
        (raised(ActorUnavailableError("the broker", None)), How.FAILED, "the broker"),  # no worker died
        (ActorUnavailableError("the controller", None), How.FAILED, "the controller"),
    ],
)
def test_end(error: Exception, how: How, reason: str) -> None:
    end = end_of(error)
    assert end.how is how
    assert reason in end.reason
    assert "\n" not in end.reason


def test_deaths_without_a_step_end_the_study_soon_and_without_a_gain_in_the_end() -> None:
    deaths = Deaths()
    for _ in range(DEATHS_ALLOWED):
        deaths.died()
    assert not deaths.hopeless
    deaths.step()
    deaths.died()
    assert not deaths.hopeless
    for _ in range(DEATHS_ALLOWED):
        deaths.died()
    assert "without taking a step" in deaths.hopeless
    deaths.gain()
    for seats in (1, 4):
        deaths.seats = seats
        for _ in range(DEATHS_ALLOWED * (1 + seats)):
            deaths.step()
            deaths.died()
            assert not deaths.hopeless
        deaths.step()
        deaths.died()
        assert "got no lane any further" in deaths.hopeless
        deaths.gain()
        assert not deaths.hopeless
    for _ in range(DEATHS_ALLOWED * (1 + seats) + 1):
        assert not deaths.hopeless
        deaths.guilty()
    assert deaths.hopeless, "where all lanes are guilty, it is not the lanes"
