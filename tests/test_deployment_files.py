"""The files of docs/deploy: what they name exists, and their versions are those of the project."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "docs" / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ")
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_image_is_built_from_files_that_the_build_may_copy() -> None:
    copied = [name for line in re.findall(r"^COPY (.+)", DOCKERFILE, re.M) for name in line.split()[:-1]]
    allowed = re.findall(r"^!(.+)", (DEPLOY / "Dockerfile.dockerignore").read_text(), re.M)
    assert sorted(copied) == sorted(allowed)
    assert [name for name in copied if not (ROOT / name).exists()] == []


def test_the_image_has_the_versions_of_the_constraints() -> None:
    installs = re.findall(r"pip install ([^&;]+)", DOCKERFILE)
    resolving = [line for line in installs if "--no-deps" not in line]
    assert len(resolving) == 2
    assert all("-c constraints.txt" in line for line in resolving)
    extras = {extra for line in resolving for extra in re.findall(r"\[(.+)\]", line)[0].split(",")}
    assert extras <= PROJECT["optional-dependencies"].keys()


def test_the_commands_of_the_files_are_those_of_the_package() -> None:
    (entry,) = re.findall(r'^ENTRYPOINT \["(.+)"\]', DOCKERFILE, re.M)
    assert entry in PROJECT["scripts"]
    assert rayjob()["spec"]["entrypoint"].split()[0] == entry


def test_kuberay_starts_the_ray_that_the_image_has() -> None:
    constraints = (ROOT / "constraints.txt").read_text().splitlines()
    assert f"ray=={rayjob()['spec']['rayClusterSpec']['rayVersion']}" in constraints


def test_the_job_on_kubernetes_has_as_many_trainers_as_nodes() -> None:
    spec = rayjob()["spec"]
    (workers,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    assert f"--trainers {workers['maxReplicas']}" in spec["entrypoint"]


def test_the_batch_script_is_bash_with_its_options_before_its_commands() -> None:
    script = DEPLOY / "slurm.sh"
    subprocess.run(["bash", "-n", script], check=True)
    lines = script.read_text().splitlines()
    options = [number for number, line in enumerate(lines) if line.startswith("#SBATCH")]
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert options
    assert max(options) < first_command


def rayjob() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((DEPLOY / "rayjob.yaml").read_text())
    return loaded
