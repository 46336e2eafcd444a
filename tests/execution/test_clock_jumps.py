"""Jumps of the clock, as after a suspension of the machine, make no process give up another process."""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from points import POINTS
from ray.cluster_utils import Cluster as RayCluster
from ray.exceptions import GetTimeoutError
from rich.console import Console

from orchestrator.execution.broker.actor import Broker
from orchestrator.execution.broker.client import retry_until_lost
from orchestrator.execution.monitor import StudyMonitor
from orchestrator.execution.progress import Progress
from orchestrator.execution.ray.runtime import Cluster
from orchestrator.execution.run_budget import RunBudget
from orchestrator.execution.session_context import SessionContext
from orchestrator.execution.trainers.pool import PoolConfig, TrainerPool
from orchestrator.execution.trainers.storage_visibility import StorageVisibility
from orchestrator.execution.trainers.trainer import TrainerSpec
from orchestrator.record.store import Store
from orchestrator.util import timeouts
from orchestrator.util.suspend_tolerant_clock import SuspendTolerantClock

HOUR = 3600.0
Jump = Callable[[float], None]


@pytest.fixture
def jump(monkeypatch: pytest.MonkeyPatch) -> Jump:
    """Return a function that sets the monotonic clock of this process forward by some seconds."""
    real, ahead = time.monotonic, [0.0]

    def set_forward(seconds: float) -> None:
        ahead[0] += seconds

    monkeypatch.setattr(time, "monotonic", lambda: real() + ahead[0])
    return set_forward


def test_a_gap_between_two_looks_counts_for_little(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    clock = SuspendTolerantClock(max_gap=15.0)
    start = clock()
    for _ in range(3):
        now += 10.0
        clock()
    assert clock() - start == 30.0
    now += HOUR
    assert clock() - start == 45.0
    now -= HOUR
    assert clock() - start == 45.0


def test_no_trainer_is_taken_for_dead_because_the_brokers_clock_jumps(tmp_path: Path, jump: Jump) -> None:
    broker = Broker(str(tmp_path), "none")

    async def trainers() -> int:
        return int((await broker.get_updates(0, 0, 0, ""))["counts"]["trainers"])

    asyncio.run(broker.next_report("trial", POINTS[0], 0, 0.0))
    asyncio.run(broker.lease("trainer-0.x", None, 1, {}, 0))
    assert asyncio.run(trainers()) == 1
    jump(HOUR)
    assert asyncio.run(trainers()) == 1
    for _ in range(10):  # the trainer is silent, however often the clock is read
        jump(10.0)
        left = asyncio.run(trainers())
    assert left == 0


class OneAnswerLate(StudyMonitor):
    """A monitor that gets no answer to one poll, while the clock jumps by an hour."""

    looks = 0
    jump: Jump

    def _poll(self) -> None:
        self.looks += 1
        if self.looks == 2:
            self.jump(HOUR)
            raise GetTimeoutError("no answer")
        self.is_drained = self.looks == 4

    def _abort(self) -> None:
        pass


@pytest.mark.ray
def test_no_broker_is_lost_because_the_drivers_clock_jumps(
    connected: RayCluster, tmp_path: Path, jump: Jump
) -> None:
    config = PoolConfig(1, TrainerSpec(1, 0.0, "store", "scratch", start_timeout=0.0))
    pool = TrainerPool(config, "space", None, StorageVisibility(tmp_path, (), print), print)
    progress = Progress(tmp_path, 1, 0, Console(file=io.StringIO()))
    context = SessionContext(
        "none", Cluster(()), config, Store(tmp_path), tmp_path, progress, RunBudget(), print
    )
    watch = OneAnswerLate(context, None, pool, {})
    watch.jump = jump
    try:
        watch.run()
        assert (watch.looks, pool.failure_reason) == (4, "")
    finally:
        # A thread that waits for Ray while it is shut down crashes the process.
        started = list(pool.running.values())
        pool.shut_down(0.0)
        for run in started:
            run.join(timeouts.TRAINER_TIMEOUT_SECONDS)
            assert not run.is_alive()


def test_no_trainer_gives_up_its_lanes_because_its_clock_jumps(jump: Jump) -> None:
    """The first three calls of the broker get no answer, and the clock jumps during the first; the fourth
    call gets an answer."""
    calls: list[int] = []

    def call() -> str:
        calls.append(len(calls))
        if len(calls) == 1:
            jump(HOUR)
        if len(calls) < 4:
            raise GetTimeoutError("no answer")
        return "done"

    assert retry_until_lost(call) == "done"
