"""`--on cluster.yaml`: commands that are refused before anything runs on the cluster.

test_ray_up.py tests commands that run on a cluster.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from laptop import CLUSTER, HEAD, ON, local_config

from orchestrator.cluster.remote import head, source_digest
from orchestrator.util import timeouts
from orchestrator.util.errors import UsageError

ROOT = source_digest.PROJECT_ROOT
SCRIPT = ROOT / "experiments" / "lr_sensitivity.py"


@pytest.fixture(scope="module")
def script() -> Callable[[], int]:
    """Return the function that the script runs."""
    spec = importlib.util.spec_from_file_location("lr_sensitivity_of_test_on", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    run: Callable[[], int] = module.run
    return run


@pytest.fixture
def refused(script: Callable[[], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Return a function that runs a command and returns its error.

    The command runs in a folder whose cluster.yaml describes a cluster that is not up.
    """
    write_cluster_file(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))  # no token, no keys
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def refused(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
        with pytest.raises(UsageError) as refusal:
            script()
        (line,) = str(refusal.value).splitlines()
        return line

    return refused


def write_cluster_file(folder: Path) -> None:
    """Write the cluster.yaml of a cluster that is not up."""
    config = local_config(CLUSTER, HEAD, [], "key.pem") | {"cluster_name": f"test-{os.getpid()}"}
    mounts = {there: str(ROOT / here) for there, here in config["file_mounts"].items() if here[0] != "~"}
    (folder / "cluster.yaml").write_text(yaml.safe_dump(config | {"file_mounts": mounts}))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--on", "none.yaml"), ["none.yaml", "No such file", "ray up"]),
        ((*ON, "--store", "here"), ["--store 'here'", "leave it out"]),
        ((*ON, "--tracking-uri", "sqlite:///x.db"), ["'sqlite:///x.db'", "leave it out"]),
        ((*ON, "--tracking-uri", "http://u:secret@h:1"), ["u:***@h:1", "password", "MLFLOW_TRACKING_URI"]),
        ((*ON,), ["test-", "must be up", "ray up cluster.yaml"]),
        (("--stop",), ["--stop", "--on cluster.yaml"]),
        (("--on", "here", "--stop"), ["--stop", "--on cluster.yaml"]),
        ((*ON, "--stop", "--plan"), ["--stop", "without --plan"]),
    ],
)
def test_a_command_that_cannot_run_there_is_refused_in_one_line(
    refused: Callable[..., str], arguments: tuple[str, ...], words: list[str]
) -> None:
    line = refused(*arguments)
    assert "secret" not in line
    for word in words:
        assert word in line


def test_a_script_outside_the_project_is_refused(tmp_path: Path) -> None:
    """The script runs as a user runs it, in a process of its own."""
    write_cluster_file(tmp_path)
    own = tmp_path / "own.py"
    shutil.copy(SCRIPT, own)
    done = subprocess.run(
        [sys.executable, str(own), *ON],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: --on cluster.yaml: \S+own.py is not sent to a cluster; .*\n", done.stderr)


def test_without_a_running_cluster_the_user_is_not_asked(
    refused: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    needs = "needs a GPU or a Ray cluster"
    lookups: list[Path] = []
    find_head = head.find_head

    def patient_find_head(path: Path, config: dict[str, Any], timeout: float) -> str:
        assert timeout == timeouts.CLUSTER_LOOKUP_SECONDS
        lookups.append(path)
        return find_head(path, config, 600.0)  # a look-up takes longer on a busy machine

    monkeypatch.setattr(head, "find_head", patient_find_head)
    assert needs in refused()
    assert lookups == [Path("cluster.yaml")]
    (tmp_path / "cluster.yaml").write_text("no: cluster\n")
    assert needs in refused()
    shutil.copy(ROOT / "cluster.yaml", tmp_path)
    assert needs in refused()
    assert len(lookups) == 1, "a cluster that this machine cannot have started is not looked up"
    assert capsys.readouterr() == ("", "")
