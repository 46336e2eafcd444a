"""The wheel in a fresh environment and in an empty folder outside the clone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import notebook
import pytest

from orchestrator.record.store import Store

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "docs" / "python.ipynb"
HANG_SECONDS = 600.0


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the `bin` folder of an environment with the wheel and, for the rest, this process's packages.

    The wheel is built from a copy, because the build writes beside the sources.
    """
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("experiments", "orchestrator", "variants"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    pip = [sys.executable, "-m", "pip"]
    build = [*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder)]
    subprocess.run([*build, str(folder / "source")], check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "env")], check=True)
    python = folder / "env" / "bin" / "python"
    (wheel,) = folder.glob("*.whl")
    options = ["-q", "--no-deps", "--no-index", "--no-compile"]
    subprocess.run([*pip, "--python", str(python), "install", *options, str(wheel)], check=True)
    # Python does not read the *.pth files of a folder that a *.pth file adds, so an editable installation of
    # this project there is not seen.
    (site,) = (folder / "env").glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return python.parent


def command(installed: Path, folder: Path, *words: str) -> str:
    """Run a program of the environment in a folder, and return what it prints."""
    hidden = ("PYTHONPATH", "RAY_ADDRESS", "ORCHESTRATOR_OUTPUT", "ORCHESTRATOR_DATA", "MLFLOW_TRACKING_URI")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run(
        [str(installed / words[0]), *words[1:]],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**environment, "COLUMNS": "80", "CUDA_VISIBLE_DEVICES": ""},
        timeout=HANG_SECONDS,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_installed_command_shows_help_and_plans_a_study(installed: Path, tmp_path: Path) -> None:
    file = command(installed, tmp_path, "python", "-c", "import orchestrator; print(orchestrator.__file__)")
    assert Path(file).is_relative_to(installed.parent)
    assert "lora-orchestrator study --dry-run" in command(installed, tmp_path, "lora-orchestrator", "--help")
    version = command(installed, tmp_path, "lora-orchestrator", "--version")
    module = "import orchestrator; print('lora-orchestrator', orchestrator.__version__)"
    assert version == command(installed, tmp_path, "python", "-c", module) != "lora-orchestrator unknown\n"
    plan = command(installed, tmp_path, "lora-orchestrator", "study", "--dry-run", "--plan")
    assert "Configurations  132, of them 0 known" in plan
    assert "Tuned LoRA matches" in command(installed, tmp_path, "lora-orchestrator", "published")
    assert (tmp_path / "results" / "published" / "report.html").stat().st_size > 100_000


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_the_notebook_trains_and_its_study_is_repeated_from_its_file(
    installed: Path, tmp_path: Path, letters_bases: Path
) -> None:
    """Ray's workers import the installed package too, because no clone is in the folder."""
    shutil.copytree(letters_bases, tmp_path / "results" / "store" / "bases")
    command(installed, tmp_path, "python", str(Path(__file__).with_name("notebook.py")), str(NOTEBOOK))
    results = tmp_path / "results"
    assert (results / "quickstart" / "report.html").exists()
    records = {record.fingerprint: record.state for record in Store(results / "store").records()}
    assert list(records.values()) == ["finished"] * 4
    config = ("--config", "results/quickstart/study.yaml")
    printed = command(installed, tmp_path, "lora-orchestrator", "study", *config)
    assert "4 of 4 known, nothing to train" in printed
    study = json.loads((results / "quickstart" / "study.json").read_text())
    assert set(study["configurations"]) == set(records)
    assert study["command"] == "lora-orchestrator study --config results/quickstart/study.yaml"


def test_the_notebook_holds_its_outputs_and_no_path_of_a_machine() -> None:
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] for cell in cells)
    text = json.dumps([cell["outputs"] for cell in cells])
    assert not [word for word in ("/home", "/tmp", "/root", "/var") if word in text]
    assert notebook.run_cell("".join(cells[0]["source"]), {}) == "".join(cells[0]["outputs"][0]["text"])
