"""Fixtures that the tests of several promises share. A costly folder is made once for all test processes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import as_a_user
import pytest
from filelock import FileLock


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return the function `get(name, make)`, which returns the folder `name`.

    The first test process that asks for a folder calls `make` to fill it.
    """
    base = tmp_path_factory.getbasetemp()
    session = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def get(name: str, make: Callable[[Path], None], shared: Path = session) -> Path:
        folder, made = shared / name, shared / f"{name}.made"
        with FileLock(f"{folder}.lock"):
            if not made.exists():  # filled in place and never renamed: a study's files contain its path
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                made.touch()
        return folder

    return get


@pytest.fixture(scope="session")
def with_base(made_once: Callable[..., Path]) -> Path:
    """Return a working folder whose `results/` has only the base model of the dry run.

    Tests only read it; `home` is a copy. The environment variable PROMISES_CACHE can name a folder that keeps
    it for later test sessions.
    """

    def fetch(folder: Path) -> None:
        as_a_user.succeed("fetch", "model", "letters-base", cwd=folder)

    if "PROMISES_CACHE" in os.environ:
        return made_once("with-base", fetch, Path(os.environ["PROMISES_CACHE"]))
    return made_once("with-base", fetch)


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
