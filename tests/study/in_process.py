"""Fixtures that run a command of this project in the test's own process, which is faster than a new one."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from orchestrator.finetune.sources import hub_data
from orchestrator.util import command

ROOT = Path(__file__).parents[2]
ORCHESTRATOR = ROOT / "orchestrator" / "__main__.py"
"""The script that `python -m orchestrator` runs."""
SWEEP = ROOT / "experiments" / "lr_sensitivity.py"


@dataclass(frozen=True)
class Ended:
    """The result of a command, with the attribute names of `subprocess.CompletedProcess`."""

    returncode: int
    stdout: str
    stderr: str

    def assert_refused(self, *words: str) -> None:
        """Assert that the command ended with exit code 2 and one error line that contains `words`."""
        assert self.returncode == 2, self.stdout + self.stderr
        assert self.stderr.startswith("error: "), self.stderr
        assert self.stderr.count("\n") == 1, self.stderr
        for word in words:
            assert word in self.stderr


Run = Callable[..., Ended]


class _LeavesSignals(command.InterruptHandler):
    """A handler that takes no signals, because it would outlive the command."""

    def install(self) -> None:
        pass


@pytest.fixture
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo what a command changes for the rest of its process, and hide GPUs and the user's settings."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # Tests assume that there is no GPU.
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "ORCHESTRATOR_OUTPUT", "ORCHESTRATOR_DATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(command, "interrupt_handler", _LeavesSignals())
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    for name in ("_pin_folder", "_add_pins"):
        monkeypatch.setattr(hub_data, name, getattr(hub_data, name))


@pytest.fixture
def run(
    restored: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """Return a function that runs a script with arguments, as a user would in the folder `tmp_path`.

    The function runs the whole file as `__main__`, so that the same code as for a user parses the options and
    turns errors into lines and exit codes. It asserts that neither Ray nor any other process was started.
    """
    monkeypatch.chdir(tmp_path)

    def run(script: Path, *arguments: str) -> Ended:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [str(script), *arguments])
        before, children = _ray(), _children()
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(script), run_name="__main__")
        assert _ray() == before, "the command has imported or started Ray"
        assert _children() <= children, "the command has started a process"
        code, printed = ended.value.code, capsys.readouterr()
        assert isinstance(code, int)
        return Ended(code, printed.out, printed.err)

    return run


def _ray() -> tuple[bool, bool]:
    """Return whether Ray is imported in this process, and whether it runs."""
    ray = sys.modules.get("ray")
    return ray is not None, ray is not None and ray.is_initialized()


def _children() -> set[int]:
    return {process.pid for process in psutil.Process().children()}
