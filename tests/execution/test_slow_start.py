"""A Ray that does not start within its own limit of 30 s, as on a busy machine."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil
import pytest

from orchestrator.execution.ray.runtime import START_ATTEMPTS, connect
from orchestrator.util.errors import StudyError

pytestmark = [pytest.mark.ray, pytest.mark.nightly, pytest.mark.timeout(600)]


@contextmanager
def stopped_raylets(most: int) -> Iterator[list[int]]:
    """Suspend the first `most` raylets below this process, and yield the growing list of their PIDs."""
    found: list[int] = []
    done = threading.Event()

    def look() -> None:
        while not done.is_set() and len(found) < most:
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    if process.name() == "raylet" and process.pid not in found:
                        process.send_signal(signal.SIGSTOP)
                        found.append(process.pid)
            time.sleep(0.005)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


def test_a_second_start_follows_one_that_took_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with stopped_raylets(1) as stopped, connect() as cluster:
        assert cluster.nodes
        assert len(stopped) == 1
        assert not psutil.pid_exists(stopped[0])


def test_starts_that_all_take_too_long_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    before = set(psutil.Process().children(recursive=True))
    with (
        stopped_raylets(START_ATTEMPTS),
        pytest.raises(StudyError, match=r"^Ray did not start within its 30 s, 2 times .*; run the command"),
        connect(),
    ):
        pass
    assert set(psutil.Process().children(recursive=True)) <= before
