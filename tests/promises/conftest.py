"""Fixtures that the tests of several promises share. They make a thing once for all test processes."""

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
    """Return a function that returns a folder by name; the first test process that asks for it makes it."""
    base = tmp_path_factory.getbasetemp()
    session = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def get(name: str, make: Callable[[Path], None], shared: Path = session) -> Path:
        folder, made = shared / name, shared / f"{name}.made"
        with FileLock(f"{folder}.lock"):
            if not made.exists():  # not made under another name, because a study's files name its folder
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                made.touch()
        return folder

    return get


@pytest.fixture(scope="session")
def with_base(made_once: Callable[..., Path]) -> Path:
    """Return a working folder whose `results/` holds the base model of the dry run, and nothing else.

    Read only: `home` copies it. Sessions with the same folder PROMISES_CACHE share it.
    """

    def fetch(folder: Path) -> None:
        as_a_user.succeed("fetch", "model", "letters-base", cwd=folder)

    if "PROMISES_CACHE" in os.environ:
        return made_once("with-base", fetch, Path(os.environ["PROMISES_CACHE"]))
    return made_once("with-base", fetch)


@pytest.fixture
def home(with_base: Path, tmp_path: Path) -> Path:
    """Return a working folder of the test's own in which the dry run's base model is there already."""
    shutil.copytree(with_base, tmp_path / "home")
    return tmp_path / "home"


@pytest.fixture(scope="session")
def dry_run(made_once: Callable[..., Path], with_base: Path) -> Path:
    """Return the working folder of a shorter dry run, with `said.txt`, what it printed.

    Read only: other tests copy it.
    """

    def make(folder: Path) -> None:
        shutil.copytree(with_base, folder, dirs_exist_ok=True)
        script = Path(__file__).parents[2] / "experiments" / "lr_sensitivity.py"
        (folder / "said.txt").write_text(as_a_user.succeed(script, *as_a_user.DRY_RUN, cwd=folder))

    return made_once("dry-run", make)
