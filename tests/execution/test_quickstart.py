"""docs/quickstart.md, as a new user follows it: data, study, report, adapter, prediction."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HANG_SECONDS = 3000.0
pytestmark = [
    pytest.mark.ray,
    pytest.mark.nightly,
    pytest.mark.usefixtures("no_cluster"),
    pytest.mark.timeout(3600),
]


def test_the_commands_of_the_quickstart_end_with_a_prediction(tmp_path: Path) -> None:
    """Run the page from the data on. The installation is what .ci/install does; the model is from PyPI."""
    page = (ROOT / "docs" / "quickstart.md").read_text().partition("## 2.")[2]
    commands = re.findall(r"^```sh\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert len(commands) == 6
    programs = tmp_path / "bin"
    programs.mkdir()
    program = programs / "lora-orchestrator"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m orchestrator "$@"\n')
    program.chmod(0o755)
    path = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    hidden = ("RAY_ADDRESS", "ORCHESTRATOR_OUTPUT", "ORCHESTRATOR_DATA", "MLFLOW_TRACKING_URI")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(commands)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**environment, "PATH": path, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        timeout=HANG_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert "of them 0 known" in done.stdout, "the plan"
    assert "delivery" in lines
    assert "'label': 'billing'" in lines[-1]
    study = tmp_path / "results" / "mails"
    assert "export mails" in (study / "report.html").read_text()
    best = json.loads((study / "summary.json").read_text())["best"]
    assert {curve["variant"] for curve in best} == {"lora", "dora"}
    assert "library_name: peft" in (tmp_path / "my-adapter" / "README.md").read_text()
