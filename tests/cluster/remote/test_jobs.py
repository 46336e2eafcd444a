"""Jobs on a real Ray head with its dashboard: their output, exit codes and unique names."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from events import reserved_port
from ray.cluster_utils import Cluster

from orchestrator.cluster.remote.jobs import JobClient
from orchestrator.util.errors import StudyError

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]
# The program sleeps, because Ray may write lines of its own after the program's first lines.
PROGRAM = "sh -c 'for i in 1 2 3; do echo line $i; done; echo error: wrong; sleep 3; printf partial; exit 5'"


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JobClient]:
    with reserved_port() as dashboard_port, reserved_port() as agent_port:
        pass  # Ray binds them next. Another Ray of this machine may have the agent's default port.
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 1,
            "include_dashboard": True,
            "dashboard_port": dashboard_port,
            "dashboard_agent_listen_port": agent_port,
        },
    )
    yield JobClient(f"http://{cluster.webui_url}", str(tmp_path_factory.mktemp("project")))
    cluster.shutdown()


def test_a_job_is_followed_twice_and_deleted(jobs: JobClient, capfd: pytest.CaptureFixture[str]) -> None:
    jobs.submit_job(PROGRAM, "study-1")
    with pytest.raises(StudyError):
        jobs.submit_job(PROGRAM, "study-1")  # a job with this name exists
    for _ in range(2):
        capfd.readouterr()
        assert jobs.follow_job("study-1") == 5
        out, err = capfd.readouterr()
        assert out.splitlines() == ["line 1", "line 2", "line 3", "partial"], "each line once, none of Ray's"
        assert err == "error: wrong\n"
    found = jobs.find_job("study-1")
    assert found is not None
    assert (found.metadata or {})["command"] == PROGRAM
    jobs.delete_job("study-1")
    assert jobs.find_job("study-1") is None
    jobs.delete_job("study-1")


def test_a_query_returns_the_last_line_and_reports_failures(jobs: JobClient) -> None:
    assert jobs.run_query("sh -c 'echo first; echo last'") == "last"
    with pytest.raises(StudyError, match=r"nothing; exit 3': nothing \(exit code 3\)$"):
        jobs.run_query("sh -c 'echo nothing; exit 3'")


def test_a_stopped_job_has_the_exit_code_of_an_interrupt(jobs: JobClient) -> None:
    lines: list[str] = []
    jobs.submit_job("sh -c 'echo up; sleep 600'", "study-2")

    def stop_when_up(line: str) -> None:
        lines.append(line)
        jobs.stop_job("study-2")

    assert jobs.follow_job("study-2", stop_when_up) == 130
    assert lines == ["up"]
