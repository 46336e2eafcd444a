"""The conclusions of the checks of a cluster; tests/promises/test_10_cluster.py runs them on real nodes."""

from __future__ import annotations

from pathlib import Path

import pytest
from in_process import ORCHESTRATOR, Run

from orchestrator.cluster import check
from orchestrator.execution import ray_cluster
from orchestrator.execution.ray_cluster import Cluster, Node
from orchestrator.util import timeouts
from orchestrator.util.errors import UsageError

GIB = 2**30
HEAD = Cluster((Node(2, 0, 4 * GIB, "a", "10.0.0.1"),), local=False)
GPUS = Cluster((*HEAD.nodes, Node(8, 4, 64 * GIB, "b", "10.0.0.2")), local=False)


@pytest.mark.parametrize(
    ("cluster", "asked", "words"),
    [
        (GPUS, (None, None, 1), "2 nodes, 10 CPUs, 4 GPUs: room for 4 of 4 trainers"),
        (GPUS, (9, None, 1), "room for 4 of 9 trainers; the others wait for nodes to join"),
        (HEAD, (None, None, 1), "1 node, 2 CPUs, 0 GPUs: room for 2 of 2 trainers"),
        (HEAD, (4, 1.0, 2), "room for 0 of 4 trainers; the others wait for nodes to join"),
    ],
)
def test_there_is_room_now_or_later(
    cluster: Cluster, asked: tuple[int | None, float | None, int], words: str
) -> None:
    assert words in check.check_capacity(cluster, *asked)


def test_different_and_missing_versions_are_failures() -> None:
    here = {"python": "3.12.1", "torch": "2.9.0"}
    assert "on 2 nodes" in check.compare_versions(here, {"10.0.0.1": here, "10.0.0.2": dict(here)})
    with pytest.raises(UsageError) as refusal:
        check.compare_versions(here, {"10.0.0.1": here, "10.0.0.2": {"python": "3.11.7"}})
    assert "python on 10.0.0.2 is 3.11.7, here 3.12.1" in str(refusal.value)
    assert "torch on 10.0.0.2 is none, here 2.9.0" in str(refusal.value)


def test_the_versions_are_those_of_the_libraries_and_of_the_sources() -> None:
    versions = check.node_versions()
    assert {"python", "torch", "ray", "transformers", "code"} <= set(versions)
    assert "+" not in versions["torch"], "a head without a GPU may have another build"


def test_a_node_writes_where_it_sees_the_file_of_the_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timeouts, "STORAGE_VISIBILITY_SECONDS", 0.0)
    assert check.write_node_file(tmp_path, "node-0") == "does not see it"
    (tmp_path / "driver").write_text("driver")
    assert check.write_node_file(tmp_path, "node-0") == ""
    assert check.missing_files(tmp_path, ["node-0", "node-1"]) == ["node-1"]
    (tmp_path / "node-0").write_text("another's")
    assert check.missing_files(tmp_path, ["node-0"]) == ["node-0"]
    (tmp_path / "node-2").mkdir()
    assert "cannot write" in check.write_node_file(tmp_path, "node-2")


def test_this_machine_is_checked_without_ray_and_nothing_is_left(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_cluster, "running_cluster_address", lambda: None)
    done = run(ORCHESTRATOR, "check")
    assert done.stderr == ""
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [["ok", "store"], ["ok", "nodes"]]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", ["--gpus-per-worker -1", "--workers-per-trainer 0", "tuned", "--seeds 3"])
def test_wrong_options_are_refused(words: str, run: Run) -> None:
    run(ORCHESTRATOR, "check", *words.split()).assert_refused(words.split()[0])
