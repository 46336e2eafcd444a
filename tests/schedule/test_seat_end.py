"""Whose fault it is that a seat ended. Real deaths are those of test_processes.py and test_nodes.py."""

from __future__ import annotations

import pytest
from ray.exceptions import ActorUnavailableError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback, WorkerGroupStartupTimeoutError

from orchestrator.finetune.faults import SeatBroken, StoreFull
from orchestrator.schedule.seat_end import How, end_of


def raised(*errors: BaseException) -> WorkerGroupError:
    """What Train makes of what its workers raised."""
    told = {rank: UserExceptionWithTraceback(error, "its traceback") for rank, error in enumerate(errors)}
    return WorkerGroupError("what they said", told)


@pytest.mark.parametrize(
    ("error", "how", "reason"),
    [
        (ControllerError(WorkerGroupStartupTimeoutError(1)), How.NO_ROOM, "startup timed out"),
        (ControllerError(RuntimeError("a callback")), How.FAILED, "a callback"),
        (raised(SeatBroken("the device is lost")), How.CRASHED, "the device is lost"),
        (raised(RuntimeError("closed by peer"), SeatBroken("the device is lost")), How.CRASHED, "the device"),
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
