"""A user's machine in the lab, from which `ray up` and studies are started, and the lab's cluster file."""

from __future__ import annotations

import copy
import itertools
import os
import shlex
import shutil
import signal
from collections.abc import Callable, Sequence
from typing import Any

import yaml
from events import until
from lab import ROOT, Lab

CLUSTER: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text())
HEAD, WORKERS = "10.77.0.2", {"w1": "10.77.0.3", "w2": "10.77.0.4"}
PROJECT = "/root/project"
"""The user's copy of the project on the laptop."""
# The variables that cluster.yaml asks for, and authentication with the token.
ENVIRONMENT = {"RAY_UP_enable_autoscaler_v2": "0", "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
# With these values, Ray counts an unreachable node as dead after 15 s instead of a minute, and connections to
# such a node fail after 20 s instead of seven minutes. Shorter limits would fail on a busy machine.
HEALTH = (
    "RAY_health_check_period_ms=1000 RAY_health_check_timeout_ms=5000 RAY_health_check_failure_threshold=3"
)
KEEPALIVE = "RAY_grpc_client_keepalive_time_ms=10000 RAY_grpc_client_keepalive_timeout_ms=10000"
# Without these options, Ray would count all of this machine's CPUs and memory for each host. The GPUs do not
# exist; Ray only counts them.
HEAD_SIZE = "--num-cpus=2 --num-gpus=0 --memory=8000000000"
WORKER_SIZE = "--num-cpus=1 --num-gpus=1 --memory=2000000000"

ON = ("--on", "cluster.yaml")
LIMIT_SECONDS = 900.0


def local_config(cluster: dict[str, Any], head: str, workers: Sequence[str], key: str) -> dict[str, Any]:
    """Return cluster.yaml for existing machines, changed as the file's comment says, with small nodes."""
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


class Laptop:
    """The lab's own machine, with a user's copy of the project."""

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
        return self.lab.run(*command, cwd=PROJECT, timeout=LIMIT_SECONDS, **ENVIRONMENT, **environment)

    def start_study(self, *arguments: str, python: tuple[str, ...] = ("python",)) -> TypedCommand:
        """Start lr_sensitivity.py with these arguments, as a user types it."""
        return TypedCommand(self.lab, [*python, "experiments/lr_sensitivity.py", *arguments])


class TypedCommand:
    """A command on the laptop, in a process group of its own as in a terminal."""

    _number = itertools.count()

    def __init__(self, lab: Lab, command: Sequence[str]) -> None:
        self.lab = lab
        number = next(self._number)
        self._output_files = [lab.path(f"/tmp/{number}.{name}") for name in ("out", "err")]
        for file in self._output_files:
            file.touch()
        words = shlex.join(["setsid", "-w", *command])
        shell = f"exec {words} >/tmp/{self._output_files[0].name} 2>/tmp/{self._output_files[1].name}"
        environment = {**ENVIRONMENT, "PYTHONPATH": PROJECT}
        del environment["RAY_AUTH_MODE"]  # users do not set it
        self._process = lab.start("sh", "-c", shell, cwd=PROJECT, **environment)

    @property
    def out(self) -> str:
        return self._output_files[0].read_text()

    @property
    def err(self) -> str:
        return self._output_files[1].read_text()

    def output(self) -> str:
        return f"{self.out}\n{self.err}"

    def until(self, condition: Callable[[], object]) -> None:
        """Wait until the condition holds. Fails if the command ends first."""
        until(lambda: condition() or self._process.poll() is not None, self.output, LIMIT_SECONDS)
        assert condition(), f"it ended first:\n{self.output()}"

    def until_output_has(self, words: str) -> None:
        self.until(lambda: words in self.out)

    def wait(self, code: int) -> str:
        """Wait for the end with this exit code. Returns the standard output."""
        until(lambda: self._process.poll() is not None, self.output, LIMIT_SECONDS)
        assert self._process.returncode == code, self.output()
        assert "Traceback" not in self.err, f"exit code {code}, but a traceback:\n{self.err}"
        return self.out

    def wait_for_refusal(self, *words: str) -> None:
        """Wait for exit code 2, and check that stderr is one error line that contains these words."""
        self.wait(2)
        (line,) = self.err.splitlines()
        assert line.startswith("error: "), line
        for word in words:
            assert word in line, line

    def interrupt(self) -> None:
        """Send Ctrl-C to the process group."""
        (group,) = [
            pid
            for pid, line in self.lab.processes().items()
            if line.startswith("python experiments/") and os.getpgid(pid) == pid
        ]
        os.killpg(group, signal.SIGINT)
