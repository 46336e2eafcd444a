"""Promise 13: what is published installs into an empty environment, by pip and by uv, and runs there.

The working folders of these tests are outside the clone.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import as_a_user
import notebook
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "docs" / "python.ipynb"
VERSION = (ROOT / "pyproject.toml").read_text().partition('\nversion = "')[2].partition('"')[0]
PROGRAM = {
    path.relative_to(ROOT).as_posix()
    for folder in ("orchestrator", "variants", "experiments")
    for path in (ROOT / folder).rglob("*.*")
    if not {"__pycache__", "benchmarks"} & set(path.parts)
}
TOP = {"LICENSE", "README.md", "cluster.yaml", "constraints.txt", "pyproject.toml"}
UV = Path(sys.executable).with_name("uv")
PIP_LINKS = (sys.executable, "-m", "pip", "config", "get", "global.find-links")
USERS = ("PYTHONPATH", "RAY_ADDRESS", "ORCHESTRATOR_OUTPUT", "ORCHESTRATOR_DATA", "MLFLOW_TRACKING_URI")


def call(*words: str | Path, cwd: Path, **variables: str) -> str:
    """Run a command that must succeed, and return what it prints."""
    environment = {name: value for name, value in os.environ.items() if name not in USERS}
    environment |= {"COLUMNS": "80", "CUDA_VISIBLE_DEVICES": ""} | variables
    limit = as_a_user.HANG_SECONDS
    done = subprocess.run(words, capture_output=True, text=True, cwd=cwd, env=environment, timeout=limit)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the source distribution, and with the wheel made from it."""
    folder = tmp_path_factory.mktemp("published")
    call(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    return folder


@pytest.fixture(scope="module", params=["pip", "uv"])
def programs(
    request: pytest.FixtureRequest, published: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return the programs of an empty environment into which pip or uv has installed the wheel."""
    folder = tmp_path_factory.mktemp(request.param)
    packages = ("-q", "-c", ROOT / "constraints.txt", *published.glob("*.whl"))
    if request.param == "pip":
        call(sys.executable, "-m", "venv", folder, cwd=folder)
        call(folder / "bin" / "pip", "install", "--no-compile", *packages, cwd=folder)
    else:
        # Where pip is told to find packages in a folder, too, uv is told the same.
        found = subprocess.run(PIP_LINKS, capture_output=True, text=True).stdout.strip()
        links = {"UV_FIND_LINKS": found} if found else {}
        call(UV, "venv", "-q", "--allow-existing", "--python", sys.executable, folder, cwd=folder)
        packages = ("--compile-bytecode", "--python", folder / "bin" / "python", *packages)
        call(UV, "pip", "install", *packages, cwd=folder, **links)
    return folder / "bin"


@pytest.mark.ray
def test_both_distributions_hold_every_file_of_the_program(published: Path, tmp_path: Path) -> None:
    (wheel,), (source,) = published.glob("*.whl"), published.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        names = [name.replace("orchestrator/project/", "") for name in archive.namelist()]
    assert sorted(name for name in names if ".dist-info/" not in name) == sorted(PROGRAM | TOP)
    with tarfile.open(source) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert held >= PROGRAM | TOP | {"CHANGELOG.md", "tests/conftest.py"}
    python = ("--no-build-isolation", "--python", sys.executable)
    call(UV, "build", "-q", "--wheel", *python, "--out-dir", tmp_path, ROOT, cwd=tmp_path)
    assert (tmp_path / wheel.name).read_bytes() == wheel.read_bytes(), "by uv, and from the files themselves"


@pytest.mark.ray
@pytest.mark.timeout(1800)
def test_the_installed_program_has_its_commands_files_and_a_cluster(programs: Path, tmp_path: Path) -> None:
    where = call(programs / "python", "-c", "import orchestrator as o; print(o.__file__)", cwd=tmp_path)
    assert Path(where).is_relative_to(programs.parent)
    assert call(programs / "lora-orchestrator", "--version", cwd=tmp_path) == f"lora-orchestrator {VERSION}\n"
    plan = call(programs / "lora-orchestrator", "study", "--dry-run", "--plan", cwd=tmp_path)
    assert "Configurations  132, of them 0 known" in plan
    assert "\nvera " in call(programs / "python", "-m", "variants", cwd=tmp_path)
    assert "Tuned LoRA matches" in call(programs / "lora-orchestrator", "published", cwd=tmp_path)
    assert (tmp_path / "results" / "published" / "report.html").stat().st_size > 100_000
    call(programs / "lora-orchestrator", "init", "mine", cwd=tmp_path)
    mine = tmp_path / "mine"
    config = yaml.safe_load((mine / "cluster.yaml").read_text())
    validate_config(prepare_config(config))
    mounted = {Path(each).name: mine / each for each in config["file_mounts"].values() if each[0] != "~"}
    assert mounted.keys() == {"orchestrator", "variants", "experiments"} | TOP
    assert all(path.exists() and not path.is_relative_to(ROOT) for path in mounted.values())
    script = mine / "experiments" / "lr_sensitivity.py"
    script.write_text(
        script.read_text().replace('dry_run_variants=("lora", "rslora"', 'dry_run_variants=("vera"')
    )
    plan = call(programs / "python", "experiments/lr_sensitivity.py", "--dry-run", "--plan", cwd=mine)
    assert "Configurations  99, of them 0 known" in plan, "the script of the user, with its three variants"


@pytest.mark.ray
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("programs", ["uv"], indirect=True)
def test_the_notebook_trains_and_its_study_is_repeated_from_its_file(
    programs: Path, tmp_path: Path, letters_bases: Path
) -> None:
    """Ray's workers import the installed package too, because no clone is in the folder."""
    results = tmp_path / "results"
    shutil.copytree(letters_bases, results / "store" / "bases")
    call(programs / "python", Path(notebook.__file__), NOTEBOOK, cwd=tmp_path)
    assert (results / "quickstart" / "report.html").exists()
    records = as_a_user.records(tmp_path)
    assert [record["state"] for record in records.values()] == ["finished"] * 4
    config = ("--config", "results/quickstart/study.yaml")
    printed = call(programs / "lora-orchestrator", "study", *config, cwd=tmp_path)
    assert "4 of 4 known, nothing to train" in printed
    assert "highest test score" in printed, "the verdict"
    study = json.loads((results / "quickstart" / "study.json").read_text())
    assert set(study["configurations"]) == set(records)
    assert study["command"] == "lora-orchestrator study --config results/quickstart/study.yaml"


def test_the_notebook_holds_its_outputs_and_no_path_of_a_machine() -> None:
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] for cell in cells)
    text = json.dumps([cell["outputs"] for cell in cells])
    assert not [word for word in ("/home", "/tmp", "/root", "/var") if word in text]
    assert notebook.run_cell("".join(cells[0]["source"]), {}) == "".join(cells[0]["outputs"][0]["text"])
