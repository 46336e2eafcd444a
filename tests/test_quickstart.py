"""docs/quickstart.md: its commands, as they stand there, in their order."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HANG_SECONDS = 3000.0


@pytest.mark.ray
@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_the_commands_of_the_quickstart_end_with_a_prediction(tmp_path: Path) -> None:
    """From the data on; the installation is what .ci/install does. The base model comes from PyPI."""
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
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert "delivery" in lines
    assert "'label': 'billing'" in lines[-1]
    assert (tmp_path / "results" / "mails" / "report.html").exists()
