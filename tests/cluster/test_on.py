"""A study that is typed on one machine and runs on a cluster: started, let go, found again, ended. Ray, its
jobs and `ray up` are real, the machines are those of a lab."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from lab import ROOT, Host, Lab
from test_ray_up import CLUSTER, HEAD, LOCAL, PROJECT, Laptop, local, until

SCRIPT = ROOT / "experiments" / "lr_sensitivity.py"
ON = ("--on", "cluster.yaml")
TINY = ("--task", "/shared/words.py", "--model", "/shared/model", "--variants", "lora", "--seeds", "1")
SHORT = (*TINY, "--study", "short", "--learning-rates", "1e-3", "1e-2")
LONG = (*TINY, "--study", "long", "--learning-rates", "1e-3", "--steps", "200000")


class Typed:
    """A command on the laptop, in a terminal's own group of processes."""

    def __init__(self, lab: Lab, *arguments: str) -> None:
        self.lab = lab
        self._said = [lab.path(f"/tmp/{time.monotonic_ns()}.{name}") for name in ("out", "err")]
        for file in self._said:
            file.touch()
        words = shlex.join(["setsid", "-w", "python", "experiments/lr_sensitivity.py", *arguments])
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

    def until(self, words: str) -> None:
        while words not in self.out:
            assert self._process.poll() is None, f"it ended first:\n{self.out}\n{self.err}"
            time.sleep(0.1)

    def end(self, code: int) -> str:
        """What it has printed. Its exit code must be that."""
        assert self._process.wait() == code, f"{self.out}\n{self.err}"
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


def drivers(host: Host) -> list[str]:
    return [line for line in host.processes().values() if line.startswith("python experiments/")]


@pytest.mark.timeout(900)
def test_it_runs_there_and_is_followed_let_go_found_and_ended(lab: Lab, shared: Path, tmp_path: Path) -> None:
    there = tmp_path / "shared"
    for each in ("words.py", "model"):
        (shutil.copytree if (shared / each).is_dir() else shutil.copy)(shared / each, there / each)
    head = lab.host("head", HEAD)
    head.installed()
    laptop = Laptop(lab, local(CLUSTER, HEAD, [], lab.KEY))
    here = lab.path(f"{PROJECT}/results")

    Typed(lab, *SHORT, *ON).refused("'lora-orchestrator' must be up", "ray up cluster.yaml")
    laptop.run("ray", "up", "-y", "--no-config-cache", "cluster.yaml")
    Typed(lab, *SHORT).refused("lora-orchestrator is up", "--on cluster.yaml", "--on here")

    # Let go, found again, ended.
    one = Typed(lab, *LONG, *ON)
    one.until("1 training")
    one.interrupt()
    one.end(130)
    (line,) = one.err.splitlines()
    assert "goes on on lora-orchestrator" in line
    assert line.endswith("--on cluster.yaml --stop")
    assert len(drivers(head)) == 1
    Typed(lab, *LONG, "--rank", "4", *ON).refused("'lr_sensitivity-long' runs there with other options")
    one = Typed(lab, *LONG, *ON)
    one.until("1 training")
    assert "runs there" in one.out
    assert "long: 0 of 1 known" in one.out, "from the beginning"
    assert len(drivers(head)) == 1, "no second one"
    for pid, line in lab.processes().items():
        if line.startswith("ssh"):
            os.kill(pid, signal.SIGKILL)
    one.end(1)
    assert "the study goes on there, and the same command follows it" in one.err
    one = Typed(lab, *LONG, *ON)
    one.until("1 training")
    stop = Typed(lab, "--study", "long", *ON, "--stop")
    assert "Stopped: 0 of 1 configurations are done" in stop.end(130)
    assert "Stopped: 0 of 1 configurations are done" in one.end(130)
    assert not drivers(head)
    assert list((there / "results" / "store" / "checkpoints").iterdir()), "its lane is kept"

    # It ends while nobody looks.
    one = Typed(lab, *SHORT, *ON)
    one.until("0 of 2 known")
    one.interrupt()
    one.end(130)
    until(lambda: not drivers(head))
    said = Typed(lab, *SHORT, *ON).end(0)
    assert "has ended there" in said
    assert "2 trained in" in said
    assert "Report   /shared/results/short/report.html" in said
    assert "MLflow   runs are on the tracking server" in said
    assert "Here     results/short/report.html" in said
    brought = {path.name for path in (here / "short").iterdir()}
    assert brought >= {"report.html", "curves.png", "summary.json", "study.json"}
    assert not (here / "store").exists()

    # Seen once, it is run again. What fails there fails here, and a plan is made there.
    again = Typed(lab, *SHORT, "3e-2", "--max-hours", "1e-7", *ON)
    assert "2 of 3 known" in again.end(3)
    Typed(lab, *TINY, "--model", "/shared/none", *ON).refused("/shared/none")
    assert "2, of them 2 known" in Typed(lab, *SHORT, "--plan", *ON).end(0)
    lab.path(f"{PROJECT}/variants/lora.py").write_text("# another\n")
    Typed(lab, *SHORT, *ON).refused("variants/lora.py differ", "ray up cluster.yaml")
    assert not [line for line in lab.processes().values() if "dashboard" in line], "no tunnel is left"


def typed(folder: Path, *arguments: str) -> str:
    """The one line that refuses these."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        cwd=folder,
        env={key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"},
        check=False,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def description(folder: Path) -> None:
    """Of a cluster that is not up."""
    config = local(CLUSTER, HEAD, [], "key.pem") | {"cluster_name": f"test-{os.getpid()}"}
    mounts = {there: str(ROOT / here) for there, here in config["file_mounts"].items() if here[0] != "~"}
    (folder / "cluster.yaml").write_text(yaml.safe_dump(config | {"file_mounts": mounts}))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--on", "none.yaml"), ["none.yaml", "No such file", "ray up"]),
        ((*ON, "--store", "here"), ["--store 'here'", "leave it out"]),
        ((*ON, "--tracking-uri", "sqlite:///x.db"), ["'sqlite:///x.db'", "leave it out"]),
        ((*ON, "--tracking-uri", "http://u:secret@h:1"), ["u:***@h:1", "password", "MLFLOW_TRACKING_URI"]),
        ((*ON, "--model", "model"), ["--model 'model'", "rsync-up cluster.yaml model/"]),
        ((*ON, "--task", "words.py"), ["--task 'words.py'", "experiments"]),
        ((*ON,), ["test-", "must be up", "ray up cluster.yaml"]),
        (("--stop",), ["--stop", "--on cluster.yaml"]),
        (("--on", "here", "--stop"), ["--stop", "--on cluster.yaml"]),
        ((*ON, "--stop", "--plan"), ["--stop", "without --plan"]),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path: Path, arguments: tuple[str, ...], words: list[str]) -> None:
    description(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "words.py").touch()
    line = typed(tmp_path, *arguments)
    assert "secret" not in line
    for word in words:
        assert word in line


def test_a_script_that_is_not_sent_there_is_refused(tmp_path: Path) -> None:
    description(tmp_path)
    own = tmp_path / "own.py"
    shutil.copy(SCRIPT, own)
    done = subprocess.run(
        [sys.executable, str(own), *ON],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 2
    assert re.fullmatch(r"error: --on cluster.yaml: \S+own.py is not sent to a cluster; .*\n", done.stderr)


def test_a_cluster_that_is_not_up_or_not_known_is_not_asked_about(tmp_path: Path) -> None:
    """And takes no time to speak of."""
    needs = "needs a GPU or a Ray cluster"
    description(tmp_path)
    assert needs in typed(tmp_path)
    (tmp_path / "cluster.yaml").write_text("no: cluster\n")
    assert needs in typed(tmp_path)
    shutil.copy(ROOT / "cluster.yaml", tmp_path)
    began = time.monotonic()
    assert needs in typed(tmp_path)
    assert time.monotonic() - began < 10
