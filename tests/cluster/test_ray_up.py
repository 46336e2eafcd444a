"""A real `ray up` of cluster.yaml: on hosts of a lab, as on machines that somebody has.

What differs from AWS is only what has to. Nothing is installed on the hosts: they find the environment of
these tests, as a prepared image would have one. All else of the description is done as it stands: files are
sent, PostgreSQL is set up, MLflow's server is kept, every node wants the token.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from subprocess import Popen
from typing import IO, Any

import pytest
import yaml
from lab import POSTGRESQL, ROOT, Host, Lab, lacks_postgresql

from orchestrator.record.schema import Record
from orchestrator.record.store import Store

CLUSTER: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text())
HEAD, WORKERS = "10.77.0.2", {"w1": "10.77.0.3", "w2": "10.77.0.4"}
PROJECT = "/root/project"  # where `ray up` is typed
# What cluster.yaml says to type, and the token, as on a laptop that has used one.
LOCAL = {"RAY_UP_enable_autoscaler_v2": "0", "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
# Ray then takes a node for dead after 15 s out of reach, not after a minute, and who spoke to it hears of
# that after 20 s, not after seven minutes. A busy machine may need that long for an answer.
HEALTH = (
    "RAY_health_check_period_ms=1000 RAY_health_check_timeout_ms=5000 RAY_health_check_failure_threshold=3"
)
KEEPALIVE = "RAY_grpc_client_keepalive_time_ms=10000 RAY_grpc_client_keepalive_timeout_ms=10000"
# A host's CPUs and memory are all of this machine's. GPUs are in Ray's books only.
HEAD_SIZE = "--num-cpus=2 --num-gpus=0 --memory=8000000000"
WORKER_SIZE = "--num-cpus=1 --num-gpus=1 --memory=2000000000"

STUDY = (
    "--dry-run",
    "--gpus-per-seat",
    "1",
    "--device",
    "cpu",
    "--lanes-per-seat",
    "2",
    "--variants",
    "lora",
)
STUDY += ("--steps", "300", "--learning-rates", "3e-3", "1e-2")
NAME = "lr_sensitivity-letters-letters-base"
GONE_SECONDS = 90  # from `ray down` to the last of its processes: docs/cluster.md promises it
YESTERDAY = time.time() - 86_400
# What a host has before `ray up`, and PostgreSQL, which is the system's.
STAYS = re.compile(r"^(sshd|postgres:|/usr/lib/postgresql/)")


def local(cluster: dict[str, Any], head: str, workers: Sequence[str], key: str) -> dict[str, Any]:
    """The description for machines that are there, as cluster.yaml says to change it, and small."""
    config = copy.deepcopy(cluster)
    config["provider"] = {"type": "local", "head_ip": head, "worker_ips": list(workers)}
    config["auth"] = {"ssh_user": "root", "ssh_private_key": key}
    for only_aws in ("available_node_types", "head_node_type", "max_workers"):
        del config[only_aws]
    setup = config["setup_commands"]
    (region,) = [command for command in setup if "AWS_DEFAULT_REGION" in command]
    setup[setup.index(region)] = f"echo 'export {KEEPALIVE}' >> ~/.lora_env"
    config["head_start_ray_commands"] = [
        command.replace("ray start --head", f"{HEALTH} ray start --head {HEAD_SIZE}")
        for command in config["head_start_ray_commands"]
    ]
    config["worker_start_ray_commands"] = [
        command.replace("ray start", f"ray start {WORKER_SIZE}")
        for command in config["worker_start_ray_commands"]
        if "cluster.spot" not in command
    ]
    return config


def test_what_runs_here_is_cluster_yaml_but_for_what_aws_alone_has() -> None:
    here = local(CLUSTER, HEAD, list(WORKERS.values()), Lab.KEY)
    assert {key for key in CLUSTER if CLUSTER[key] != here.get(key)} == {
        *("provider", "auth", "available_node_types", "head_node_type", "max_workers"),
        *("setup_commands", "head_start_ray_commands", "worker_start_ray_commands"),
    }
    assert set(here) <= set(CLUSTER)
    assert differing(CLUSTER, here, "setup_commands") == 1
    assert differing(CLUSTER, here, "head_start_ray_commands") == 1
    # The spot watcher, too.
    assert differing(CLUSTER, here, "worker_start_ray_commands") == 2


def differing(one: dict[str, Any], other: dict[str, Any], key: str) -> int:
    return sum(command not in other[key] for command in one[key])


class Laptop:
    """The lab's own machine, with the project as somebody has it who types `ray up`."""

    def __init__(self, lab: Lab, config: dict[str, Any]) -> None:
        self.lab = lab
        project = lab.path(PROJECT)
        project.mkdir()
        for name in config["file_mounts"].values():
            if not name.startswith("~"):
                copied = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
                copied(ROOT / name, project / name)
        (project / "cluster.yaml").write_text(yaml.safe_dump(config))
        self.run("ray", "get-auth-token", "--generate")
        self.run("chmod", "600", "/root/.ray/auth_token")
        assert "local" in self.run("python", "-m", "orchestrator.cluster.description", PYTHONPATH=PROJECT)

    def run(self, *command: str, **environment: str) -> str:
        return self.lab.run(*command, cwd=PROJECT, timeout=1200, **LOCAL, **environment)

    @contextmanager
    def study(self, *arguments: str) -> Iterator[Running]:
        """The study, typed here: it runs on the head."""
        command = ["python", "experiments/lr_sensitivity.py", *STUDY, *arguments, "--on", "cluster.yaml"]
        with tempfile.TemporaryFile() as output:
            started = self.lab.start(*command, cwd=PROJECT, output=output, PYTHONPATH=PROJECT, **LOCAL)
            yield Running(started, output)
            assert started.poll() is not None


class Running:
    """A command that has been started."""

    def __init__(self, process: Popen[bytes], output: IO[bytes]) -> None:
        self._process, self._output = process, output

    def until(self, what: Callable[[], bool]) -> None:
        """Waits until then, as long as it runs."""
        while not what():
            assert self._process.poll() is None, f"it ended first:\n{self._said()}"
            time.sleep(0.2)

    def end(self) -> str:
        """What it has said. It must end well."""
        assert self._process.wait() == 0, self._said()
        return self._said()

    def _said(self) -> str:
        self._output.seek(0)
        return self._output.read().decode(errors="replace")


def until(what: Callable[[], bool]) -> None:
    while not what():
        time.sleep(0.2)


def ray_s(host: Host, name: str = "") -> list[str]:
    """Command lines of Ray's processes there."""
    return [
        line
        for line in host.processes().values()
        if ("/ray/" in line or "ray::" in line or "bin/ray " in line) and name in line
    ]


@pytest.mark.timeout(1200)
def test_a_study_on_machines_of_which_one_is_cut_off_and_returns(
    lab: Lab, letters_bases: Path, tmp_path: Path
) -> None:
    if reason := lacks_postgresql():
        pytest.skip(reason)
    results = tmp_path / "shared" / "results"
    shutil.copytree(letters_bases, results / "store" / "bases")
    store = Store(results / "store")
    head = lab.host("head", HEAD, empty=POSTGRESQL)
    head.has_postgresql()
    one, two = (lab.host(name, address) for name, address in WORKERS.items())
    for host in (head, one, two):
        host.installed()
    laptop = Laptop(lab, local(CLUSTER, HEAD, list(WORKERS.values()), lab.KEY))
    # Whoever used Ray there before has left a token, which is not this cluster's. It is of another day: rsync
    # takes files of one size and one second for the same.
    head.run("mkdir", "/root/.ray")
    stray = head.path("/root/.ray/auth_token")
    stray.write_text("0" * 64)
    os.utime(stray, (YESTERDAY, YESTERDAY))
    laptop.run("ray", "up", "-y", "--no-config-cache", "cluster.yaml")

    with laptop.study("--seeds", "4") as study:  # it waits for the workers
        study.until(lambda: bool(ray_s(one, "RayTrainWorker") and ray_s(two, "RayTrainWorker")))
        study.until(lambda: len(half_trained(store)) >= 3)  # of both seats, then
        lab.cut(two)
        study.until(lambda: "was lost with a node" in log(results))
        said = study.end()
    assert "1 node left: 2 there" in said
    first = {record.fingerprint: record for record in store.records()}
    assert len(first) == 8
    assert {record.state for record in first.values()} <= {"finished", "diverged"}
    assert hosts(first) >= {"w1"}
    assert "head" not in hosts(first), "it has no GPU"
    assert sorted(children(head)) == sorted((fingerprint, "FINISHED") for fingerprint in first)

    before = set(ray_s(two, "raylet/raylet"))
    lab.mend(two)
    until(lambda: bool(set(ray_s(two, "raylet/raylet")) - before))
    with laptop.study("--seeds", "8") as study:
        study.until(lambda: bool(ray_s(two, "RayTrainWorker")))
        said = study.end()
    assert "8 of 16 known" in said
    second = {record.fingerprint: record for record in store.records()}
    assert len(second) == 16
    assert {fingerprint: second[fingerprint] for fingerprint in first} == first, "nothing is trained twice"
    new = {fingerprint: record for fingerprint, record in second.items() if fingerprint not in first}
    assert hosts(new) == {"w1", "w2"}

    laptop.run("ray", "down", "-y", "cluster.yaml")
    gone = time.monotonic() + GONE_SECONDS
    while left := [line for host in (head, one, two) for line in started(host)]:
        assert time.monotonic() < gone, f"{GONE_SECONDS} s after `ray down` there is {left}"
        time.sleep(0.5)


def started(host: Host) -> list[str]:
    """Command lines of what `ray up` has brought."""
    return [line for line in host.processes().values() if not STAYS.match(line)]


def half_trained(store: Store) -> set[str]:
    """Those that have a checkpoint and no record."""
    return {path.parts[-3] for path in store.checkpoints.glob("*/*/*.safetensors")} - set(store.states())


def log(results: Path) -> str:
    return (results / NAME / "study.log").read_text()


def hosts(records: dict[str, Record]) -> set[str]:
    return {record.provenance.host for record in records.values()}


def children(head: Host) -> list[tuple[str, str]]:
    """(fingerprint, status) of every child of the study in MLflow, whose server the head alone can ask."""
    asks = "import json, mlflow; mlflow.set_tracking_uri('http://127.0.0.1:5000'); "
    asks += f"runs = mlflow.search_runs(experiment_names=['{NAME}'], output_format='list'); "
    asks += "print(json.dumps([(r.data.tags.get('fingerprint'), r.info.status) for r in runs]))"
    said = head.run("/root/venv/bin/python", "-c", asks, timeout=1200)
    found = re.search(r"^\[.*\]$", said, re.MULTILINE)
    assert found, said
    return [(fingerprint, status) for fingerprint, status in json.loads(found[0]) if fingerprint]
