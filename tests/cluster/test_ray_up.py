"""A real `ray up` of cluster.yaml: on hosts of a lab, as on machines that somebody has. Studies are typed on
another machine (`--on`): let go, found again, ended; a worker is cut off, one gets a spot notice.

What differs from AWS is only what has to. Nothing is installed on the hosts: they find the environment of
these tests, as a prepared image would have one. All else of the description is done as it stands: files are
sent, PostgreSQL is set up, MLflow's server is kept, every node wants the token.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from aws_box import metadata_service
from events import until
from imds_server import Service
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

ON = ("--on", "cluster.yaml")
FIRST_CHECKPOINT = 300 // 15  # steps of held_task.py, over its evaluations
TINY = ("--task", "/shared/held_task.py", "--model", "/shared/model", "--variants", "lora")
# On the head, which has no GPU.
ALONE = (*TINY, "--seeds", "1", "--trainers", "1", "--gpus-per-worker", "0")
SHORT = (*ALONE, "--study", "short", "--learning-rates", "1e-3", "1e-2")
LONG = (*ALONE, "--study", "long", "--learning-rates", "2e-3")
# On the workers.
SHARED = (*TINY, "--seeds", "2", "--gpus-per-worker", "1", "--device", "cpu", "--lanes-per-trainer", "2")
SHARED += ("--study", "shared", "--learning-rates", "3e-3", "5e-3")
LIMIT_SECONDS = 900.0
NOTICE_SECONDS = 1200.0  # AWS's is 120; a busy machine may take longer to save lanes
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
        if "spot_watcher" not in command
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

    def run(self, *command: str, **environment: str) -> str:
        return self.lab.run(*command, cwd=PROJECT, timeout=LIMIT_SECONDS, **LOCAL, **environment)

    def types(self, *arguments: str, python: tuple[str, ...] = ("python",)) -> Typed:
        return Typed(self.lab, [*python, "experiments/lr_sensitivity.py", *arguments])


class Typed:
    """A command on the laptop, in a terminal's own group of processes."""

    _number = itertools.count()

    def __init__(self, lab: Lab, command: Sequence[str]) -> None:
        self.lab = lab
        number = next(self._number)
        self._said = [lab.path(f"/tmp/{number}.{name}") for name in ("out", "err")]
        for file in self._said:
            file.touch()
        words = shlex.join(["setsid", "-w", *command])
        shell = f"exec {words} >/tmp/{self._said[0].name} 2>/tmp/{self._said[1].name}"
        environment = {**LOCAL, "PYTHONPATH": PROJECT}
        del environment["RAY_AUTH_MODE"]  # nobody types that
        self._process = lab.start("sh", "-c", shell, cwd=PROJECT, **environment)

    @property
    def out(self) -> str:
        return self._said[0].read_text()

    @property
    def err(self) -> str:
        return self._said[1].read_text()

    def said(self) -> str:
        return f"{self.out}\n{self.err}"

    def until(self, what: Callable[[], object]) -> None:
        """Waits until then, as long as it runs."""
        until(lambda: what() or self._process.poll() is not None, self.said, LIMIT_SECONDS)
        assert what(), f"it ended first:\n{self.said()}"

    def until_it_says(self, words: str) -> None:
        self.until(lambda: words in self.out)

    def end(self, code: int) -> str:
        """What it has printed. Its exit code must be that."""
        until(lambda: self._process.poll() is not None, self.said, LIMIT_SECONDS)
        assert self._process.returncode == code, self.said()
        assert "Traceback" not in self.err
        return self.out

    def refused(self, *words: str) -> None:
        """It must end with one line that says these."""
        self.end(2)
        (line,) = self.err.splitlines()
        assert line.startswith("error: ")
        for word in words:
            assert word in line, line

    def interrupt(self) -> None:
        """Ctrl-C: for all that the terminal has in front."""
        (group,) = [
            pid
            for pid, line in self.lab.processes().items()
            if line.startswith("python experiments/") and os.getpgid(pid) == pid
        ]
        os.killpg(group, signal.SIGINT)


@dataclass(frozen=True)
class Cluster:
    """cluster.yaml, up: a head and two workers."""

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
        """From now on lanes wait for `go`."""
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
    there = tmp_path_factory.mktemp("shared")
    shutil.copytree(shared / "model", there / "model")
    shutil.copy(ROOT / "tests/cluster/held_task.py", there)
    with Lab(seen=[ROOT], shared=there) as lab:
        head = lab.host("head", HEAD, empty=POSTGRESQL)
        head.has_postgresql()
        one, two = (lab.host(name, address) for name, address in WORKERS.items())
        for host in (head, one, two):
            host.installed()
        laptop = Laptop(lab, local(CLUSTER, HEAD, list(WORKERS.values()), lab.KEY))
        # Whoever used Ray there before has left a token, which is not this cluster's. It is of another day:
        # rsync takes files of one size and one second for the same.
        head.run("mkdir", "/root/.ray")
        stray = head.path("/root/.ray/auth_token")
        stray.write_text("0" * 64)
        os.utime(stray, (YESTERDAY, YESTERDAY))
        laptop.run("ray", "up", "-y", "--no-config-cache", "cluster.yaml")
        yield Cluster(lab, laptop, head, one, two, there)


def ray_s(host: Host, name: str = "") -> list[str]:
    """Command lines of Ray's processes there."""
    return [
        line
        for line in host.processes().values()
        if ("/ray/" in line or "ray::" in line or "bin/ray " in line) and name in line
    ]


def drivers(host: Host) -> list[str]:
    return [line for line in host.processes().values() if line.startswith("python experiments/")]


# Looking up a cluster that nobody has named has a short time-out; this test's machine may be busy.
PATIENTLY = """
import runpy, sys
from orchestrator.util import timeouts
timeouts.CLUSTER_LOOKUP_SECONDS = 600.0
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.cluster
@pytest.mark.timeout(1800)
def test_a_study_there_outlives_a_lost_connection_a_cut_off_worker_a_spot_notice_and_whoever_typed_it(
    cluster: Cluster,
) -> None:
    lab, head, one, two = cluster.lab, cluster.head, cluster.one, cluster.two
    types = cluster.laptop.types
    cluster.hold()
    unnamed = types(*SHARED, python=("python", "-c", PATIENTLY))
    study = types(*SHARED, *ON)  # it waits for the workers
    unnamed.refused("lora-orchestrator is up", "--on cluster.yaml", "--on here")
    study.until(lambda: trains(one) and trains(two))
    study.until(lambda: len(half_trained(cluster)) == 4)

    # A lost connection: it is found again.
    for pid, line in lab.processes().items():
        if line.startswith("ssh"):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    study.end(1)
    assert "the study goes on there, and the same command follows it" in study.err
    another, study = types(*SHARED, "--rank", "4", *ON), types(*SHARED, *ON)
    another.refused("'lr_sensitivity-shared' runs there with other options")
    study.until_it_says("shared: 0 of 4 known")  # from the beginning
    assert "runs there" in study.out
    assert len(drivers(head)) == 1, "no second one"

    # A worker is cut off and returns.
    before = set(ray_s(two, "raylet/raylet"))
    lab.cut(two)
    study.until(lambda: "was lost with a node" in log(cluster))
    lab.mend(two)
    study.until(lambda: set(ray_s(two, "raylet/raylet")) - before)
    study.until(lambda: trains(two))

    # The other one gets a spot notice, and whoever typed the command goes.
    cluster.go_slowly(one)
    with spot_watcher(one) as metadata:
        metadata.give_notice(NOTICE_SECONDS)
        study.until(lambda: "is drained" in spot_log(one))
        study.until(lambda: not trains(one))

        study.interrupt()
        study.end(130)
        (line,) = study.err.splitlines()
        assert "goes on on lora-orchestrator" in line
        assert line.endswith("--on cluster.yaml --stop")
        cluster.go()
        until(lambda: not drivers(head), lambda: log(cluster), LIMIT_SECONDS)
    said = types(*SHARED, *ON).end(0)
    for words in (
        "has ended there",
        "1 node left: 2 there",
        "4 trained in",
        "Report   /shared/results/shared/report.html",
        "MLflow   runs are on the tracking server",
        "Here     results/shared/report.html",
    ):
        assert words in said, said
    brought = lab.path(f"{PROJECT}/results")
    files = {path.name for path in (brought / "shared").iterdir()}
    assert files >= {"report.html", "curves.png", "summary.json", "study.json"}
    assert not (brought / "store").exists()

    records = records_of(cluster)
    assert len(records) == 4
    assert {record.state for record in records.values()} <= {"finished", "diverged"}
    assert "w2" in {record.provenance.host for record in records.values()} <= {"w1", "w2"}
    assert all(record.provenance.resumed_from for record in records.values())
    steps = sum(record.steps for record in records.values())
    counted = re.search(r"(\d+) optimizer steps of", said)
    assert counted, said
    # The worker that was cut off had two lanes at their first checkpoints. Steps that it had yet to report
    # are in the checkpoints and not in this count.
    assert steps - 2 * FIRST_CHECKPOINT <= int(counted[1]) <= steps, "not one is repeated"
    assert len(re.findall(r"trainer-\d+ (?:died|was lost)", said)) == 1, "that of the notice has left before"
    logged = [child for child in children(head) if child[0] in records]
    assert sorted(logged) == sorted((name, "FINISHED") for name in records)


@contextmanager
def spot_watcher(host: Host) -> Iterator[Service]:
    """Starts it by the command that cluster.yaml has for AWS. Yields the host's metadata service."""
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
def test_a_study_there_is_stopped_and_run_again_and_what_fails_there_fails_here(cluster: Cluster) -> None:
    head, types = cluster.head, cluster.laptop.types
    cluster.hold()
    one = types(*LONG, *ON)
    one.until_it_says("1 training")
    cluster.go_slowly(head, cluster.one, cluster.two)
    stop = types("--study", "long", *ON, "--stop")
    assert "Stopped: 0 of 1 configurations are done" in stop.end(130)
    assert "Stopped: 0 of 1 configurations are done" in one.end(130)
    assert not drivers(head)
    assert list(cluster.store.checkpoints.iterdir()), "its lane is kept"

    cluster.go()
    types(*SHORT, *ON).end(0)
    # Seen once, it is run again.
    again = types(*SHORT, "3e-2", "--max-hours", "1e-7", *ON)
    none = types(*ALONE, "--model", "/shared/none", *ON)
    plan = types(*SHORT, "--plan", *ON)
    assert "2 of 3 known" in again.end(3)
    none.refused("/shared/none")
    assert "2, of them 2 known" in plan.end(0)
    variant = cluster.lab.path(f"{PROJECT}/variants/another.py")
    variant.touch()
    types(*SHORT, *ON).refused("variants/another.py differ", "ray up cluster.yaml")
    variant.unlink()
    lines = cluster.lab.processes().values()
    assert not [line for line in lines if "dashboard" in line], "no tunnel is left"


@pytest.mark.cluster
@pytest.mark.timeout(1800)
def test_ray_down_leaves_nothing(cluster: Cluster) -> None:
    # Ray itself ends on the head alone. On a worker this watches for that. The autoscaler starts the drained
    # worker anew: a `ray down` in the middle of that would find no watcher there yet.
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
    return bool(ray_s(host, "RayTrainWorker"))


def of_the_study(cluster: Cluster) -> set[str]:
    """The configurations of the study `shared`."""
    return set(json.loads((cluster.shared / "results/shared/study.json").read_text())["configurations"])


def records_of(cluster: Cluster) -> dict[str, Record]:
    there = of_the_study(cluster)
    return {record.fingerprint: record for record in cluster.store.records() if record.fingerprint in there}


def started(host: Host) -> list[str]:
    """Command lines of what `ray up` has brought."""
    return [line for line in host.processes().values() if not STAYS.match(line)]


def half_trained(cluster: Cluster) -> set[str]:
    """Those that have a checkpoint and no record."""
    store = cluster.store
    known = {path.parts[-3] for path in store.checkpoints.glob("*/*/*.safetensors")}
    return (known & of_the_study(cluster)) - set(store.states())


def log(cluster: Cluster) -> str:
    return (cluster.shared / "results/shared/study.log").read_text()


def children(head: Host) -> list[tuple[str, ...]]:
    """(fingerprint, status) of every child of a study, from MLflow's database."""
    query = "select value, status from tags join runs using (run_uuid) where key = 'fingerprint'"
    said = head.run("psql", "-At", "-h", "/var/run/postgresql", "mlflow", "-c", query)
    return [tuple(line.split("|")) for line in said.split()]
