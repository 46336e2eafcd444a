"""The time after which a study ends because Ray's control store (GCS) is silent, on a simulated clock.

test_leftovers.py kills a real GCS.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import pytest

from orchestrator.execution.ray import gcs_monitor
from orchestrator.execution.ray.runtime import Cluster
from orchestrator.util import graceful_interrupts
from orchestrator.util.graceful_interrupts import InterruptHandler

WHERE = "10.0.0.1:6379"
LOCAL = Cluster((), local=True, gcs_address=WHERE)
JOINED = Cluster((), local=False, gcs_address=WHERE)


class Looks:
    """The event that stops a watch. A wait for the event takes no time and advances the clock."""

    def __init__(self, answers: Iterable[bool]) -> None:
        self.answers, self.now, self.last = iter(answers), 0.0, False

    def wait(self, seconds: float) -> bool:
        self.now += seconds
        found = next(self.answers, None)
        self.last = bool(found)
        return found is None


Watch = Callable[..., tuple[list[str], float | None, str]]


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """Return a function that watches a cluster whose GCS gives the listed answers, one per poll.

    The function returns the printed lines, the seconds of silence after which the study was ended (None if it
    was not ended), and the error line.
    """
    monkeypatch.delenv("RAY_gcs_rpc_server_reconnect_timeout_s", raising=False)

    def run(
        cluster: Cluster, answers: Iterable[bool], notify: Callable[[str], None] | None = None
    ) -> tuple[list[str], float | None, str]:
        looks, lines, line = Looks(answers), list[str](), ""

        class Ended(BaseException):
            pass

        def end_with(error: str, last: object) -> None:
            nonlocal line
            line = error
            raise Ended

        with monkeypatch.context() as patch:
            patch.setattr(time, "monotonic", lambda: looks.now)
            patch.setattr(gcs_monitor, "is_listening", lambda host, port: looks.last)
            patch.setattr(gcs_monitor, "exit_with_error", end_with)
            try:
                gcs_monitor._watch(cluster, notify or lines.append, lambda: None, looks)  # type: ignore[arg-type]
            except Ended:
                return lines, looks.now, line
        return lines, None, line

    return run


def test_a_gcs_that_answers_again_is_reported_and_ends_no_study(watch: Watch) -> None:
    lines, ended, _ = watch(LOCAL, [True, False, False, True, True])
    assert ended is None
    assert lines == [
        f"Ray's control store ({WHERE}) does not answer; waiting 30 s",
        f"Ray's control store ({WHERE}) answers again",
    ]


@pytest.mark.parametrize(
    ("cluster", "timeout", "least", "most"),
    [(LOCAL, None, 30, 35), (LOCAL, 600, 30, 35), (JOINED, None, 50, 59), (JOINED, 600, 500, 590)],
)
def test_a_joined_cluster_has_nearly_as_long_as_ray_itself_would_wait(
    watch: Watch,
    monkeypatch: pytest.MonkeyPatch,
    cluster: Cluster,
    timeout: int | None,
    least: float,
    most: float,
) -> None:
    if timeout:
        monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", str(timeout))
    _, ended, _ = watch(cluster, [False] * 1000)
    assert ended is not None
    assert least < ended < most


def test_the_error_line_of_a_joined_cluster_names_both_possible_causes(watch: Watch) -> None:
    assert ": its process is gone. Finished work is kept; to go on: python " in watch(LOCAL, [False] * 99)[2]
    _, _, line = watch(JOINED, [False] * 99)
    assert " has not answered for 54 s: it has ended, or the network to it is down. Finished work" in line
    assert "; to go on once it answers: python " in line


def test_a_notebook_is_told_the_command_of_its_study(
    watch: Watch, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    handler = InterruptHandler()
    monkeypatch.setattr(graceful_interrupts, "interrupt_handler", handler)
    with graceful_interrupts.borrowed_signals("lora-orchestrator study --rank 4"):
        handler.print_resume_command()
        assert watch(LOCAL, [False] * 99)[2].endswith("; to go on: lora-orchestrator study --rank 4")
    assert "interrupted; to go on: lora-orchestrator study --rank 4\n" in capfd.readouterr().err
    assert handler.resume_command().startswith("python ")


def test_a_line_that_cannot_be_shown_does_not_end_the_watch(watch: Watch) -> None:
    def notify(line: str) -> None:
        raise BrokenPipeError

    assert watch(LOCAL, [False] * 99, notify)[1] is not None
