"""`python -m orchestrator check` on a real Ray cluster of several nodes, with real causes of each failure.

All nodes are on this machine, each with an address of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import odd
import psutil
import pytest
import ray
from events import LIMIT_SECONDS, until
from ray.cluster_utils import Cluster

from orchestrator.cli.program import run_program
from orchestrator.execution.ray.runtime import usable_nodes
from orchestrator.execution.trainers.storage_visibility import StorageVisibility
from orchestrator.util.errors import UsageError

needs_mounts = pytest.mark.skipif(not odd.can_mount(), reason="needs root and mount namespaces")
# Drivers look for a node at the address that Ray finds for this machine, so the first node has that address.
FIRST, SECOND, ODD = ray.util.get_node_ip_address(), "127.0.0.2", "127.0.0.3"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Yield the home directory of all nodes, where `ray up` would write its cluster file."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("home")
        patch.setenv("HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def cluster(home: Path) -> Iterator[Cluster]:
    has = {"num_cpus": 1, "memory": 4 * 2**30, "object_store_memory": 80 * 2**20}
    head = {**has, "include_dashboard": False, "node_ip_address": FIRST}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(**has, node_ip_address=SECOND)
    yield cluster
    cluster.shutdown()


def command(shared: Path, *arguments: str) -> list[str]:
    study = ["--task", str(shared / "words.py"), "--model", str(shared / "model"), "--variants", "lora"]
    return [*study, "--output", str(shared / "results"), *arguments]


Check = Callable[..., tuple[int, dict[str, str]]]


@pytest.fixture
def check(restored: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Check:
    """Return a function that runs `python -m orchestrator check` with RAY_ADDRESS and options.

    The command runs in this process, because the imports of a new process take 8 s of CPU time. The function
    returns the exit code, and the output line of each check by the check's name.
    """

    def check(address: str, *arguments: str) -> tuple[int, dict[str, str]]:
        monkeypatch.setenv("RAY_ADDRESS", address)
        monkeypatch.setattr(sys, "argv", ["orchestrator", "check", *arguments])
        capsys.readouterr()
        try:
            code = run_program()
        finally:
            out, err = capsys.readouterr()
            print(out, err)
        return code, lines_by_name(out)

    return check


def lines_by_name(out: str) -> dict[str, str]:
    lines = [line.split(None, 2) for line in out.splitlines()]
    return {name: f"{mark} {text}" for mark, name, text in lines}


def check_process(address: str, *arguments: str, **environment: str) -> tuple[int, dict[str, str]]:
    """Run the check in a process of its own, with additional environment variables."""
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator", "check", *arguments],
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
        env={**os.environ, "RAY_ADDRESS": address, **environment},
    )
    assert "Traceback" not in done.stdout + done.stderr, done.stderr
    assert done.stdout, done.stderr
    print(done.stdout, done.stderr)
    return done.returncode, lines_by_name(done.stdout)


def files_in(folder: Path) -> set[Path]:
    """Return the paths below a folder, without the bytecode that Python writes beside an imported task."""
    return {path for path in folder.rglob("*") if "__pycache__" not in path.parts}


@pytest.mark.cluster
@pytest.mark.timeout(900)
def test_a_usable_cluster_passes_every_check_and_is_left_unchanged(
    cluster: Cluster, shared: Path, check: Check
) -> None:
    before = files_in(shared)
    code, lines = check(cluster.address, *command(shared, "--lanes-per-trainer", "2"))
    assert not {name: line for name, line in lines.items() if not line.startswith("ok ")}
    assert code == 0
    assert list(lines) == [
        "tracking",
        "model",
        "data",
        "nodes",
        "versions",
        "storage",
        "disk",
        "clock",
        "reach",
    ]
    assert "2 nodes, 2 CPUs, 0 GPUs: room for 2 trainers" in lines["nodes"]
    assert files_in(shared) == before


@pytest.mark.cluster
@pytest.mark.timeout(900)
def test_missing_server_model_data_and_gpus_are_failures(cluster: Cluster, shared: Path) -> None:
    away = ["--task", "glosses", "--model", "organisation/model", "--tracking-uri", "http://127.0.0.1:1"]
    output = ["--output", str(shared / "results"), "--gpus-per-worker", "1"]
    # The check runs in a new process, because libraries read these variables when they are imported.
    code, lines = check_process(
        cluster.address, *away, *output, WNSEARCHDIR="/nowhere", HF_ENDPOINT="http://127.0.0.1:1"
    )
    assert code == 1
    for name, words in {
        "tracking": ["FAILED", "'http://127.0.0.1:1': cannot be reached", "start that server"],
        "model": ["FAILED", "'organisation/model' cannot be read", "HF_TOKEN"],
        "data": ["FAILED", "/nowhere/data.noun", "apt-get install wordnet-base"],
        "nodes": ["FAILED", "no node has room for a trainer (1 GPU and a CPU)", "no autoscaler is known"],
    }.items():
        for word in words:
            assert word in lines[name], lines


@pytest.mark.cluster
def test_a_missing_model_folder_and_a_missing_cluster_are_failures(shared: Path, check: Check) -> None:
    """The check does not let Ray join such a cluster, which would take minutes and give another message."""
    gone = [word.replace(str(shared / "model"), "/nowhere/model") for word in command(shared)]
    code, lines = check("127.0.0.1:1", *gone)
    assert (code, list(lines)) == (1, ["tracking", "model", "data", "nodes"])
    assert "FAILED Unknown model '/nowhere/model': no such folder" in lines["model"]
    assert "FAILED RAY_ADDRESS '127.0.0.1:1' cannot be joined (nothing answers there)" in lines["nodes"]


AUTOSCALING = """
max_workers: 2
head_node_type: head
available_node_types:
  head: {resources: {CPU: 1}, max_workers: 0}
  gpu: {resources: {CPU: 8, GPU: 1}, max_workers: 2}
"""


@pytest.mark.cluster
@pytest.mark.timeout(900)
def test_startable_gpu_nodes_are_no_failure_but_a_local_store_is(
    cluster: Cluster, shared: Path, home: Path, check: Check
) -> None:
    (home / "ray_bootstrap_config.yaml").write_text(AUTOSCALING)
    try:
        _, lines = check(cluster.address, *command(shared, "--gpus-per-worker", "1", "--trainers", "2"))
    finally:
        (home / "ray_bootstrap_config.yaml").unlink()
    assert "the autoscaler may start 2 gpu, then room for 2 of 2 trainers" in lines["nodes"]
    assert "own disk, which nodes that start later do not see" in lines["storage"]
    assert {name for name, line in lines.items() if line.startswith("FAILED")} == {"storage"}


@needs_mounts
@pytest.mark.cluster
@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_a_node_that_differs_is_named_and_a_study_refuses_it(
    cluster: Cluster, shared: Path, tmp_path: Path, check: Check
) -> None:
    with odd.odd_node(cluster.address, ODD, shared, tmp_path):
        wait_for_nodes(cluster, 3, tmp_path / "odd.log")
        code, lines = check(cluster.address, *command(shared))
        assert code == 1, lines
        wrong = {
            "versions": f"transformers on {ODD} is 1.2.3, here ",
            "storage": f"{shared / 'results' / 'store'}: {ODD} does not see it; every node must",
            "clock": rf"clocks differ from this machine's: {ODD} by +",
            "reach": f"from {ODD}: Model",
        }
        for name, words in wrong.items():
            assert f"FAILED {words}" in lines[name], lines
        assert all(line.startswith("ok ") for name, line in lines.items() if name not in wrong), lines

        out = study(cluster, *command(shared, "--seeds", "1", "--learning-rates", "1e-2"))
        assert out.returncode == 2, out.stdout + out.stderr
        errors = [line for line in out.stderr.splitlines() if line.startswith("error: ")]  # not Ray's lines
        for line, name in zip(errors, ("versions", "storage", "clock", "reach"), strict=True):
            assert line.startswith(f"error: {name}: "), errors
        assert not list((shared / "results" / "store" / "records").glob("*/*"))


def study(cluster: Cluster, *arguments: str) -> subprocess.CompletedProcess[str]:
    script = Path(__file__).parents[3] / "experiments" / "lr_sensitivity.py"
    return subprocess.run(
        [sys.executable, str(script), *arguments],
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
        env={**os.environ, "RAY_ADDRESS": cluster.address},
    )


@needs_mounts
@pytest.mark.cluster
@pytest.mark.timeout(900)
def test_a_joining_node_that_does_not_see_the_store_is_not_used(
    cluster: Cluster, shared: Path, tmp_path: Path
) -> None:
    messages: list[str] = []
    ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
    try:
        here = ray.get_runtime_context().get_node_id()
        sight = StorageVisibility(shared / "model", (), messages.append)
        with stopped_raylet(SECOND):
            assert {node.address for node in sight.visible_nodes(usable_nodes(), here)} == {FIRST}, (
                "it does not wait for an answer"
            )
        with odd.odd_node(cluster.address, ODD, shared, tmp_path):

            def all_nodes_have_answered() -> bool:
                sight.visible_nodes(usable_nodes(), here)
                return len(sight.can_see) == 2 and bool(messages)

            until(all_nodes_have_answered, (tmp_path / "odd.log").read_text)
            for _ in range(2):
                assert {node.address for node in sight.visible_nodes(usable_nodes(), here)} == {FIRST, SECOND}
            assert {node.address for node in usable_nodes()} == {FIRST, SECOND, ODD}
    finally:
        ray.shutdown()
    assert len(messages) == 1
    assert (
        f"the node on {ODD} does not see this study's folder {shared / 'model'}: it is not counted"
        in messages[0]
    )


@contextmanager
def stopped_raylet(address: str) -> Iterator[None]:
    """Suspend the raylet of a node, so that no process starts there."""
    (raylet,) = [
        process
        for process in psutil.Process().children(recursive=True)
        if process.name() == "raylet" and f"--node_ip_address={address}" in process.cmdline()
    ]
    raylet.suspend()
    try:
        yield
    finally:
        raylet.resume()


def wait_for_nodes(cluster: Cluster, count: int, log: Path) -> None:
    ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
    try:
        until(lambda: sum(node["Alive"] for node in ray.nodes()) >= count, log.read_text)
    finally:
        ray.shutdown()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--trainers", "0"], "--trainers 0"),
        (["--task", "lettres"], "'letters'"),
        (["--no-probe"], "leave it out"),
    ],
)
def test_wrong_options_are_refused_before_any_check(
    arguments: list[str], word: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["orchestrator", "check", *arguments])
    with pytest.raises(UsageError) as refusal:
        run_program()
    assert len(str(refusal.value).splitlines()) == 1
    assert word in str(refusal.value)
    assert capsys.readouterr() == ("", "")
