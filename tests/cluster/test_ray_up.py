"""A real `ray up` of cluster.yaml on hosts of a lab, which are treated as machines that a user owns.

Studies are started from another machine with `--on`. They are detached, followed again and stopped; one
worker is disconnected, another one gets a spot notice. Nothing is installed on the hosts: they use the
environment of these tests, as with a prepared image. The rest of cluster.yaml is executed as it is: files are
sent, PostgreSQL is set up, MLflow's server is supervised, and every node needs the token.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from aws_box import metadata_service
from events import until
from imds_server import Service
from lab import POSTGRESQL, ROOT, Host, Lab, lacks_postgresql
from laptop import CLUSTER, HEAD, LIMIT_SECONDS, ON, PROJECT, WORKERS, Laptop, local_config

from orchestrator.record.schema import Record
from orchestrator.record.store import Store

FIRST_CHECKPOINT = 300 // 15  # steps of held_task.py divided by its evaluations
TINY = ("--task", "/shared/held_task.py", "--model", "/shared/model", "--variants", "lora")
# Studies on the head, which has no GPU.
ON_HEAD = (*TINY, "--seeds", "1", "--trainers", "1", "--gpus-per-worker", "0")
SHORT = (*ON_HEAD, "--study", "short", "--learning-rates", "1e-3", "1e-2")
LONG = (*ON_HEAD, "--study", "long", "--learning-rates", "2e-3")
# A study on the workers, with a model of the laptop.
MODEL = f"{PROJECT}/my-model"
SHARED = ("--task", "/shared/held_task.py", "--model", "my-model", "--variants", "lora", "--seeds", "2")
SHARED += ("--gpus-per-worker", "1", "--device", "cpu", "--lanes-per-trainer", "2")
SHARED += ("--study", "shared", "--learning-rates", "3e-3", "5e-3")
NOTICE_SECONDS = 1200.0  # AWS gives 120; a busy machine may take longer to save lanes
YESTERDAY = time.time() - 86_400
# Processes that a host has before `ray up`, and PostgreSQL, which belongs to the system.
NOT_OF_RAY_UP = re.compile(r"^(sshd|postgres:|/usr/lib/postgresql/)")


def test_the_tested_cluster_file_differs_from_cluster_yaml_only_where_aws_is_needed() -> None:
    tested = local_config(CLUSTER, HEAD, list(WORKERS.values()), Lab.KEY)
    assert {key for key in CLUSTER if CLUSTER[key] != tested.get(key)} == {
        *("provider", "auth", "available_node_types", "head_node_type", "max_workers"),
        *("setup_commands", "head_start_ray_commands", "worker_start_ray_commands"),
    }
    assert set(tested) <= set(CLUSTER)
    assert differing(CLUSTER, tested, "setup_commands") == 1
    assert differing(CLUSTER, tested, "head_start_ray_commands") == 1
    # The command with the worker's size and the command of the spot watcher differ.
    assert differing(CLUSTER, tested, "worker_start_ray_commands") == 2


def differing(one: dict[str, Any], other: dict[str, Any], key: str) -> int:
    return sum(command not in other[key] for command in one[key])


@dataclass(frozen=True)
class Cluster:
    """A running cluster of cluster.yaml: a head and two workers."""

    lab: Lab
    laptop: Laptop
    head: Host
    one: Host
    two: Host
    shared: Path

    @property
    def store(self) -> Store:
        return Store(self.shared / "results" / "store")

    def hold(self) -> None:
        """Make lanes wait at their first checkpoint until `go` is called."""
        for file in (self.shared / "go", *self.shared.glob("slow-*")):
            file.unlink(missing_ok=True)

    def go(self) -> None:
        (self.shared / "go").touch()

    def go_slowly(self, *hosts: Host) -> None:
        for host in hosts:
            (self.shared / f"slow-{host.name}").touch()


@pytest.fixture(scope="module")
def cluster(
    can_have_a_lab: None, shared: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    if reason := lacks_postgresql():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("shared")
    shutil.copytree(shared / "model", folder / "model")
    shutil.copy(ROOT / "tests/cluster/held_task.py", folder)
    shutil.copy(ROOT / "tests/execution/prompt_checkpoints.py", folder)  # held_task.py imports it
    with Lab(read_only=[ROOT], shared=folder) as lab:
        head = lab.host("head", HEAD, empty=POSTGRESQL)
        head.create_postgresql()
        one, two = (lab.host(name, address) for name, address in WORKERS.items())
        for host in (head, one, two):
            host.install_environment()
        laptop = Laptop(lab, local_config(CLUSTER, HEAD, list(WORKERS.values()), lab.KEY))
        shutil.copytree(folder / "model", lab.path(MODEL))
        # The head has a token from an earlier use of Ray. It is dated yesterday, because rsync would not
        # replace a file of the same size and second.
        head.run("mkdir", "/root/.ray")
        stray = head.path("/root/.ray/auth_token")
        stray.write_text("0" * 64)
        os.utime(stray, (YESTERDAY, YESTERDAY))
        laptop.run("ray", "up", "-y", "--no-config-cache", "cluster.yaml")
        yield Cluster(lab, laptop, head, one, two, folder)


def ray_processes(host: Host, name: str = "") -> list[str]:
    """Return the command lines of Ray's processes on the host that contain `name`."""
    return [
        line
        for line in host.processes().values()
        if ("/ray/" in line or "ray::" in line or "bin/ray " in line) and name in line
    ]


def drivers(host: Host) -> list[str]:
    return [line for line in host.processes().values() if line.startswith("python experiments/")]


# Without `--on`, the look-up of a running cluster has a time-out that is too short for a busy machine.
WITH_LONG_LOOKUP = """
import runpy, sys
from orchestrator.util import timeouts
timeouts.CLUSTER_LOOKUP_SECONDS = 600.0
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.cluster
@pytest.mark.timeout(1800)
def test_a_remote_study_survives_a_lost_connection_a_lost_worker_a_spot_notice_and_ctrl_c(
    cluster: Cluster,
) -> None:
    lab, head, one, two = cluster.lab, cluster.head, cluster.one, cluster.two
    start = cluster.laptop.start_study
    cluster.hold()
    unnamed = start(*SHARED, python=("python", "-c", WITH_LONG_LOOKUP))
    study = start(*SHARED, *ON)  # the study waits for the workers
    unnamed.wait_for_refusal("lora-orchestrator is up", "--on cluster.yaml", "--on here")
    study.until(lambda: trains(one) and trains(two))
    study.until(lambda: len(half_trained(cluster)) == 4)

    # The connection is lost, and the study is followed again.
    for pid, line in lab.processes().items():
        if line.startswith("ssh"):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    study.wait(1)
    assert "the study goes on there, and the same command follows it" in study.err
    another, study = start(*SHARED, "--rank", "4", *ON), start(*SHARED, *ON)
    another.wait_for_refusal("'lr_sensitivity-shared' runs there with other options")
    study.until_output_has("shared: 0 of 4 known")  # the output starts from the beginning
    assert "runs there" in study.out
    assert len(drivers(head)) == 1, "no second study has started"

    # A worker is disconnected and returns.
    before = set(ray_processes(two, "raylet/raylet"))
    lab.disconnect(two)
    study.until(lambda: "was lost with a node" in log(cluster))
    lab.reconnect(two)
    study.until(lambda: set(ray_processes(two, "raylet/raylet")) - before)
    study.until(lambda: trains(two))

    # The other worker gets a spot notice, and the user presses Ctrl-C.
    cluster.go_slowly(one)
    with spot_watcher(one) as metadata:
        metadata.give_notice(NOTICE_SECONDS)
        study.until(lambda: "is drained" in spot_log(one))
        study.until(lambda: not trains(one))

        study.interrupt()
        study.wait(130)
        (line,) = study.err.splitlines()
        assert "goes on on lora-orchestrator" in line
        assert line.endswith("--on cluster.yaml --stop")
        cluster.go()
        until(lambda: not drivers(head), lambda: log(cluster), LIMIT_SECONDS)
    output = start(*SHARED, *ON).wait(0)
    for words in (
        "has ended there",
        "1 node left: 2 there",
        "4 trained in",
        "Report   /shared/results/shared/report.html",
        "MLflow   http://",
        "/runs?workflowType=machine_learning&viewStateShareKey=ranking",
        "Here     results/shared/report.html",
    ):
        assert words in output, output
    downloaded = lab.path(f"{PROJECT}/results")
    files = {path.name for path in (downloaded / "shared").iterdir()}
    assert files >= {"report.html", "curves.png", "summary.json", "study.json"}
    assert not (downloaded / "store").exists()

    records = records_of(cluster)
    assert len(records) == 4
    assert {record.state for record in records.values()} <= {"finished", "diverged"}
    assert "w2" in {record.provenance.host for record in records.values()} <= {"w1", "w2"}
    assert all(record.provenance.resumed_from for record in records.values())
    steps = sum(record.steps for record in records.values())
    counted = re.search(r"(\d+) optimizer steps of", output)
    assert counted, output
    # The disconnected worker had two lanes at their first checkpoints. Steps that it had not reported yet are
    # in the checkpoints, but not in this count.
    assert steps - 2 * FIRST_CHECKPOINT <= int(counted[1]) <= steps, "no step is repeated"
    assert len(re.findall(r"trainer-\d+ (?:died|was lost)", output)) == 1, "the drained trainer left before"
    logged = [child for child in children(head) if child[0] in records]
    assert sorted(logged) == sorted((name, "FINISHED") for name in records)


@contextmanager
def spot_watcher(host: Host) -> Iterator[Service]:
    """Start the spot watcher with cluster.yaml's command, and yield the host's metadata service."""
    metadata = metadata_service(host)
    (command,) = [command for command in CLUSTER["worker_start_ray_commands"] if "spot_watcher" in command]
    host.run("bash", "--login", "-c", "-i", f"source ~/.bashrc; ({command})")
    yield metadata
    for pid, line in host.processes().items():
        if "orchestrator.cluster.node.spot_watcher" in line:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    metadata.close()


def spot_log(host: Host) -> str:
    file = host.path("/root/.lora-orchestrator/spot.log")
    return file.read_text() if file.exists() else ""


@pytest.mark.cluster
@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_a_remote_study_is_stopped_and_run_again_and_its_errors_reach_the_user(cluster: Cluster) -> None:
    head, start = cluster.head, cluster.laptop.start_study
    cluster.hold()
    one = start(*LONG, *ON)
    one.until_output_has("1 training")
    cluster.go_slowly(head, cluster.one, cluster.two)
    stop = start("--study", "long", *ON, "--stop")
    assert "Stopped: 0 of 1 configurations are done" in stop.wait(130)
    assert "Stopped: 0 of 1 configurations are done" in one.wait(130)
    assert not drivers(head)
    assert list(cluster.store.checkpoints.iterdir()), "its checkpoint is kept"

    cluster.go()
    start(*SHORT, *ON).wait(0)
    # A study that has ended, and whose end the user has seen, runs again.
    again = start(*SHORT, "3e-2", "--max-hours", "1e-7", *ON)
    none = start(*ON_HEAD, "--model", "/shared/none", *ON)
    plan = start(*SHORT, "--plan", *ON)
    assert "2 of 3 known" in again.wait(3)
    none.wait_for_refusal("/shared/none")
    assert "2, of them 2 known" in plan.wait(0)
    rows = [
        f"{' '.join(letters)},{letters[0]}" for letters in permutations("abcdefg", 3)
    ]  # known to the model
    cluster.lab.path(f"{PROJECT}/rows.csv").write_text("\n".join(["text,label", *rows]))
    own = (*ON_HEAD[2:], "--study", "own", "--learning-rates", "1e-3", "--steps", "4")
    output = start("--data", "rows.csv", *own, *ON).wait(0)
    assert re.search(r"receives rows.csv \([\d.]+ kB\)", output)
    assert "1 trained in" in output
    variant = cluster.lab.path(f"{PROJECT}/variants/another.py")
    variant.touch()
    start(*SHORT, *ON).wait_for_refusal("variants/another.py differ", "ray up cluster.yaml")
    variant.unlink()
    lines = cluster.lab.processes().values()
    assert not [line for line in lines if "dashboard" in line], "no tunnel is left"


@pytest.mark.cluster
@pytest.mark.timeout(1800)
def test_ray_down_leaves_nothing(cluster: Cluster) -> None:
    # `ray down` ends Ray on the head only; the watchdogs on the workers notice it and end Ray there. The
    # autoscaler restarts the drained worker, so wait until both workers have a watchdog.
    for worker in (cluster.one, cluster.two):
        until(lambda worker=worker: any("raylet_watchdog" in line for line in worker.processes().values()))
    cluster.laptop.run("ray", "down", "-y", "cluster.yaml")
    machines = (cluster.head, cluster.one, cluster.two)
    until(
        lambda: not any(started(host) for host in machines),
        lambda: [started(host) for host in machines],
        LIMIT_SECONDS,
    )


def trains(host: Host) -> bool:
    return bool(ray_processes(host, "RayTrainWorker"))


def of_the_study(cluster: Cluster) -> set[str]:
    """Return the fingerprints of the study `shared`."""
    return set(json.loads((cluster.shared / "results/shared/study.json").read_text())["configurations"])


def records_of(cluster: Cluster) -> dict[str, Record]:
    requested = of_the_study(cluster)
    return {r.fingerprint: r for r in cluster.store.records() if r.fingerprint in requested}


def started(host: Host) -> list[str]:
    """Return the command lines of the processes that `ray up` has started."""
    return [line for line in host.processes().values() if not NOT_OF_RAY_UP.match(line)]


def half_trained(cluster: Cluster) -> set[str]:
    """Return the configurations that have a checkpoint and no record."""
    store = cluster.store
    known = {path.parts[-3] for path in store.checkpoints.glob("*/*/*.safetensors")}
    return (known & of_the_study(cluster)) - set(store.states())


def log(cluster: Cluster) -> str:
    return (cluster.shared / "results/shared/study.log").read_text()


def children(head: Host) -> list[tuple[str, ...]]:
    """Return the (fingerprint, status) of every run that has a fingerprint, from MLflow's database."""
    query = "select value, status from tags join runs using (run_uuid) where key = 'fingerprint'"
    rows = head.run("psql", "-At", "-h", "/var/run/postgresql", "mlflow", "-c", query)
    return [tuple(line.split("|")) for line in rows.split()]
