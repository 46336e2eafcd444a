"""`--on cluster.yaml`: what is refused before anything runs there. That it runs there: test_ray_up.py."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from test_ray_up import CLUSTER, HEAD, ON, local

from orchestrator.cluster.remote import head, source_digest, target
from orchestrator.util.errors import UsageError

ROOT = source_digest.PROJECT_ROOT
SCRIPT = ROOT / "experiments" / "lr_sensitivity.py"


@pytest.fixture(scope="module")
def script() -> Callable[[], int]:
    """The study as the script runs it."""
    spec = importlib.util.spec_from_file_location("lr_sensitivity_of_test_on", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    run: Callable[[], int] = module.run
    return run


@pytest.fixture
def refused(script: Callable[[], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Type a command in a folder whose cluster.yaml is of a cluster that is not up. Return its one line."""
    description(tmp_path)
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
def test_what_cannot_be_is_one_line(
    refused: Callable[..., str], tmp_path: Path, arguments: tuple[str, ...], words: list[str]
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "words.py").touch()
    line = refused(*arguments)
    assert "secret" not in line
    for word in words:
        assert word in line


def test_a_script_that_is_not_sent_there_is_refused(tmp_path: Path) -> None:
    """As it is called, in a process of its own."""
    description(tmp_path)
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


def test_a_cluster_that_is_not_up_or_not_known_is_not_asked_about(
    refused: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    needs = "needs a GPU or a Ray cluster"
    looked_for: list[Path] = []
    find_head = head.find_head

    def noted(path: Path, seconds: float) -> tuple[str | None, str]:
        assert seconds == target.LOOKUP_TIMEOUT_SECONDS
        looked_for.append(path)
        return find_head(path, 600.0)  # on a busy machine it takes longer

    monkeypatch.setattr(head, "find_head", noted)
    assert needs in refused()
    assert looked_for == [Path("cluster.yaml")]
    (tmp_path / "cluster.yaml").write_text("no: cluster\n")
    assert needs in refused()
    shutil.copy(ROOT / "cluster.yaml", tmp_path)
    assert needs in refused()
    assert len(looked_for) == 1, "what this machine cannot have started is not looked for: it would take time"
    assert capsys.readouterr() == ("", "")
