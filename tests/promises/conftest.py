"""Fixtures that the tests of several promises share. A costly folder is made once for all test processes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import as_a_user
import pytest


@pytest.fixture
def home(with_base: Path, tmp_path: Path) -> Path:
    """Return a new working folder for one test. Its `results/` has the base model of the dry run."""
    shutil.copytree(with_base, tmp_path / "home")
    return tmp_path / "home"


@pytest.fixture(scope="session")
def dry_run(made_once: Callable[..., Path], with_base: Path) -> Path:
    """Return the working folder of a short dry run, whose output is in the file `said.txt`.

    Tests only read it.
    """

    def make(folder: Path) -> None:
        shutil.copytree(with_base, folder, dirs_exist_ok=True)
        script = Path(__file__).parents[2] / "experiments" / "lr_sensitivity.py"
        (folder / "said.txt").write_text(as_a_user.succeed(script, *as_a_user.DRY_RUN, cwd=folder))

    return made_once("dry-run", make)
