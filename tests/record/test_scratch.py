"""Scratch folders. Only folders of drivers that no longer hold their lock are removed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.record.store import Store

HOLD = """
import sys
from orchestrator.record.store import Store
with Store(sys.argv[1]).scratch_folder() as folder:
    (folder / "tune").write_text("x")
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def driver(store: Store) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Start a process that holds a scratch folder until its standard input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(store.root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    yield process, Path(process.stdout.readline().strip())
    process.kill()
    process.wait()


def folder_names(store: Store) -> list[str]:
    return sorted(path.name for path in (store.root / "scratch").iterdir())


def test_the_folder_goes_with_the_study(store: Store, driver: tuple[subprocess.Popen[str], Path]) -> None:
    process, folder = driver
    assert folder.is_dir()
    process.communicate("")
    assert folder_names(store) == []


def test_the_folder_of_a_killed_driver_is_removed_by_the_next_command(
    store: Store, driver: tuple[subprocess.Popen[str], Path]
) -> None:
    process, folder = driver
    process.kill()
    process.wait()
    assert (folder / "tune").exists()
    store.remove_stale_scratch()
    assert folder_names(store) == []


def test_the_folder_of_a_running_driver_stays_even_if_no_process_has_its_number(
    store: Store, driver: tuple[subprocess.Popen[str], Path]
) -> None:
    """The driver may run in a container with this host's name, so no process here has its number."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    _, made = driver
    folder = made.with_name(f"{os.uname().nodename}-{gone.pid}-0123abcd")
    # The driver keeps the lock, because it is a lock of the file, not of its name.
    for suffix in ("", ".lock"):
        made.with_name(made.name + suffix).rename(folder.with_name(folder.name + suffix))
    store.remove_stale_scratch()
    assert (folder / "tune").exists()
    assert store.stale_scratch() == []


def test_folders_with_other_names_are_left_alone(store: Store) -> None:
    host = os.uname().nodename
    names = sorted([f"{host}-foo", f"{host}-", f"{host}-12-0123abcd.lock", "another-12-0123abcd", "notes"])
    for name in names:
        (store.root / "scratch" / name).mkdir(parents=True)
    store.remove_stale_scratch()
    assert folder_names(store) == names
