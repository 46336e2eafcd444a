"""Promise 10: a study runs on a cluster of `ray up cluster.yaml`, and its results come back.

A node that dies and one that is drained change no result. The cluster has a head and three workers: hosts in
namespaces of this machine (hosts.py), which cluster.yaml treats as machines that a user owns. The user's
machine runs `init` and Ray's own commands.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import as_a_user
import pytest
import tiny_models
import yaml
from hosts import Command, Host, Network, missing_requirements, until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]

PROJECT = "/root/project"
"""The folder that `lora-orchestrator init` makes on the user's machine. The others do not see the clone."""
ENVIRONMENT = {"RAY_UP_enable_autoscaler_v2": "0", "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
# With these values, Ray counts an unreachable node as dead after 15 s instead of a minute.
HEALTH = (
    "RAY_health_check_period_ms=1000 RAY_health_check_timeout_ms=5000 RAY_health_check_failure_threshold=3"
)
# Without these options, Ray would count all of this machine's CPUs and memory for each host. The GPUs do not
# exist; Ray only counts them.
HEAD_SIZE = "--num-cpus=2 --num-gpus=0 --memory=8000000000"
WORKER_SIZE = "--num-cpus=1 --num-gpus=1 --memory=2000000000"

TASK = '''
import os
import random
import time
from pathlib import Path

from orchestrator.finetune.tasks.base import Example, Split, Task, TaskDefaults

SHARED = Path("/shared")
graded = 0


class Held(Task):
    """The answer is the last letter. In its third evaluation, a trainer waits for the file /shared/go."""

    title = "letters, held"
    floor = 0.0
    max_new_tokens = 2
    defaults = TaskDefaults(
        train_size=64,
        validation_size=12,
        test_size=12,
        steps=40,
        batch_size=8,
        max_length=16,
        evaluations=10,
        learning_rates=(1e-2,),
    )

    def examples(self, split: Split, count: int) -> list[Example]:
        source = random.Random(f"held/{split}")
        found = []
        for _ in range(count):
            letters = [source.choice("abcdefgh") for _ in range(8)]
            found.append(Example(f"{' '.join(letters)} =", letters[-1]))
        return found

    def grade(self, example: Example, answer: str) -> float:
        global graded
        graded += 1
        host = os.uname().nodename
        while graded > 60 and not (SHARED / "go").exists():
            (SHARED / f"held-{host}").touch()
            if (SHARED / f"slow-{host}").exists():
                time.sleep(0.2)
                break
            time.sleep(0.1)
        return float(answer.strip() == example.answer)
'''
STUDY = "--dry-run --task /shared/held.py --model /shared/model --variants lora --learning-rates 3e-3 1e-2"
STUDY += " --seeds 2 --trainers 2 --lanes-per-trainer 2 --gpus-per-worker 1 --device cpu"
SCRIPT = "experiments/lr_sensitivity.py"

# A substitute for AWS's metadata service, with a notice that the spot machine ends in 20 minutes. AWS gives 2
# minutes, but a busy test machine may take longer to save lanes.
SPOT_NOTICE = """
import http.server, json, time

class Metadata(http.server.BaseHTTPRequestHandler):
    def do_PUT(self):
        self.answer("a token")

    def do_GET(self):
        end = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 1200))
        self.answer(json.dumps({"action": "terminate", "time": end}))

    def answer(self, text):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text.encode())

http.server.HTTPServer(("127.0.0.1", 8000), Metadata).serve_forever()
"""


def for_own_machines(config: dict[str, Any], head: str, workers: list[str]) -> dict[str, Any]:
    """Return the config of cluster.yaml for a user's machines, as its comment says, with small nodes."""
    changed = dict(config)
    changed["provider"] = {"type": "local", "head_ip": head, "worker_ips": workers}
    changed["auth"] = {"ssh_user": "root", "ssh_private_key": Network.KEY}
    for only_aws in ("available_node_types", "head_node_type", "max_workers"):
        del changed[only_aws]
    changed["head_start_ray_commands"] = [
        each.replace("ray start --head", f"{HEALTH} ray start --head {HEAD_SIZE}")
        for each in config["head_start_ray_commands"]
    ]
    changed["worker_start_ray_commands"] = [
        each.replace("ray start", f"ray start {WORKER_SIZE}")
        for each in config["worker_start_ray_commands"]
        if "spot" not in each
    ]
    return changed


class Cluster:
    """A running cluster, and the commands of its user."""

    def __init__(self, network: Network) -> None:
        self.network, self.shared = network, network.shared
        self.head, *self.workers = (network.host(name) for name in ("head", "w1", "w2", "w3"))
        network.run("lora-orchestrator", "init", PROJECT)
        file = network.path(PROJECT) / "cluster.yaml"
        config = yaml.safe_load(file.read_text())
        self.spot_command = next(each for each in config["worker_start_ray_commands"] if "spot" in each)
        local = for_own_machines(config, self.head.address, [worker.address for worker in self.workers])
        file.write_text(yaml.safe_dump(local))
        for host in network.hosts:
            host.install_environment()
        self.run("ray", "get-auth-token", "--generate")
        self.run("chmod", "600", "/root/.ray/auth_token")

    def start(self, *words: str) -> Command:
        """Start a command on the user's machine, in the project's folder."""
        return self.network.start(*words, cwd=PROJECT, **ENVIRONMENT)

    def run(self, *words: str) -> str:
        """Run a command that must succeed on the user's machine, and return its output."""
        return self.start(*words).wait()

    def start_on_head(self, command: str) -> Command:
        """Start a command on the head, in the project's folder there."""
        return self.start("ray", "exec", "cluster.yaml", f"cd ~/lora-orchestrator && {command}")

    def is_whole(self) -> bool:
        """Return whether Ray counts the head and all workers."""
        count = "import ray; ray.init('auto', logging_level='ERROR'); print('nodes:', len(ray.nodes()))"
        printed = self.start_on_head(f'python -c "{count}"').wait()
        return f"nodes: {len(self.network.hosts)}" in printed

    def training(self) -> list[Host]:
        """Return the workers that train."""
        return [worker for worker in self.workers if trains(worker)]


def trains(host: Host) -> bool:
    """Return whether a worker of a trainer runs on the host."""
    return any("RayTrainWorker" in line for line in host.processes())


def ray_processes(host: Host) -> list[str]:
    """Return the command lines of what `ray up` has started: all processes except SSH's.

    Ray's log monitor on a worker is left out. It ends when it cannot publish a line. Without new lines it
    stays until the next `ray stop`, as docs/cluster.md says.
    """
    is_worker = host.name != "head"
    return [
        line
        for line in host.processes()
        if not line.startswith("sshd") and not (is_worker and "ray/_private/log_monitor.py" in line)
    ]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Yield a cluster that `ray up cluster.yaml` has started."""
    if reason := missing_requirements():
        pytest.skip(reason)
    shared = tmp_path_factory.mktemp("shared")
    tiny_models.llama(shared / "model", width=16)
    (shared / "held.py").write_text(TASK)
    with Network(shared) as network:
        cluster = Cluster(network)
        cluster.run("ray", "up", "-y", "--no-config-cache", "cluster.yaml")
        until(cluster.is_whole)  # `ray up` returns before the workers have joined
        yield cluster


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster) -> dict[str, dict[str, Any]]:
    """Return the records of the study, trained on the cluster without a fault."""
    (cluster.shared / "go").touch()
    cluster.start_on_head(f"python {SCRIPT} {STUDY} --study calm").wait()
    (cluster.shared / "go").unlink()
    return as_a_user.records(cluster.shared)


def test_a_study_on_the_head_trains_on_the_workers_and_its_results_come_back(
    cluster: Cluster, undisturbed: dict[str, dict[str, Any]]
) -> None:
    assert [record["state"] for record in undisturbed.values()] == ["finished"] * 4
    assert {record["provenance"]["host"] for record in undisturbed.values()} <= {"w1", "w2", "w3"}
    cluster.run("ray", "rsync-down", "cluster.yaml", "/shared/results/", "results/")
    here = cluster.network.path(PROJECT)
    assert as_a_user.records(here) == undisturbed
    assert (here / "results" / "calm" / "report.html").exists()
    # The same study again, as a script that `ray submit` sends: nothing is trained a second time.
    cluster.run("ray", "submit", "cluster.yaml", SCRIPT, "--", *STUDY.split(), "--study", "calm")
    assert as_a_user.records(cluster.shared) == undisturbed


def test_a_worker_that_dies_and_one_that_is_taken_back_change_no_result(
    cluster: Cluster, undisturbed: dict[str, dict[str, Any]]
) -> None:
    tunnel = cluster.start("ray", "dashboard", "cluster.yaml")
    tunnel.until(lambda: cluster.network.reaches("127.0.0.1", 8265))
    study = f"python lora-orchestrator/{SCRIPT} {STUDY} --study disturbed --output /shared/disturbed/results"
    submit = ("ray", "job", "submit", "--address", "http://127.0.0.1:8265", "--", *study.split())
    job = cluster.start(*submit)
    held = cluster.shared.glob
    job.until(lambda: len(list(held("held-*"))) == 2)  # two trainers are in the middle of their lanes
    dies, drained = cluster.training()
    (other,) = set(cluster.workers) - {dies, drained}
    dies.kill()

    (cluster.shared / f"slow-{drained.name}").touch()
    notice = drained.start("python", "-c", SPOT_NOTICE)
    watch = "source ~/.bashrc; export AWS_EC2_METADATA_SERVICE_ENDPOINT=http://127.0.0.1:8000; "
    watch += cluster.spot_command
    drained.run("bash", "--login", "-c", "-i", watch)
    job.until(lambda: not trains(drained))
    (cluster.shared / "go").touch()
    job.wait()
    for command in (tunnel, notice):
        command.kill()

    disturbed = as_a_user.records(cluster.shared / "disturbed")
    assert {name: as_a_user.results(record) for name, record in disturbed.items()} == {
        name: as_a_user.results(record) for name, record in undisturbed.items()
    }
    assert {record["provenance"]["host"] for record in disturbed.values()} == {other.name}


def test_a_folder_that_the_workers_do_not_see_is_named(cluster: Cluster) -> None:
    checked = cluster.start_on_head("lora-orchestrator check --output /root/private")
    lines = checked.wait(code=1).splitlines()
    (line,) = [line for line in lines if "FAILED" in line and "/root/private" in line]
    assert "10.77.0." in line
    assert not cluster.head.path("/root/private").exists()


def test_ray_down_leaves_nothing(cluster: Cluster) -> None:
    before = [host for host in cluster.network.hosts if ray_processes(host)]
    assert cluster.head in before
    cluster.run("ray", "down", "-y", "cluster.yaml")
    until(
        lambda: not any(ray_processes(host) for host in before),
        lambda: {host.name: ray_processes(host) for host in before},
    )
