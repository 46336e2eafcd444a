"""A full or read-only disk ends a command with one line.

tests/finetune/engine/test_disk_failures.py tests what trainers do on such a disk.
"""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import study
from full_disk import Disk, mounted
from in_process import ORCHESTRATOR, SWEEP, Run
from ray.cluster_utils import Cluster
from rich.console import Console

from orchestrator.execution.progress import Progress
from orchestrator.launch import reporting
from orchestrator.record.store import Store
from orchestrator.study.options import StudyOptions
from orchestrator.util import atomic_files
from orchestrator.util.errors import StudyError, describe_disk_error

ONE = ("--dry-run", "--variants", "lora", "--learning-rates", "1e-3", "--seeds", "1")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with mounted(tmp_path / "disk", megabytes=4) as disk:
        yield disk


@pytest.fixture
def known(letters_bases: Path, tmp_path: Path) -> Path:
    """Return a store that has all results of `ONE`."""
    options = StudyOptions(
        dry_run=True, variants=("lora",), learning_rates=("1e-3",), seeds=1, store=tmp_path / "store"
    )
    shutil.copytree(letters_bases, tmp_path / "store" / "bases")
    study.keep_known(options, loss=0.1)
    return tmp_path / "store"


@pytest.mark.parametrize(
    ("refuse", "why", "advice"),
    [
        (Disk.fill, "No space left on device", "free some space"),
        (Disk.close, "Read-only file system", "make it writable"),
    ],
)
def test_a_report_that_cannot_be_written(
    run: Run,
    disk: Disk,
    known: Path,
    monkeypatch: pytest.MonkeyPatch,
    refuse: Callable[[Disk], None],
    why: str,
    advice: str,
) -> None:
    """The disk with the studies' folders refuses writes once the records were read, before the report."""
    write = reporting.write_parquet

    def write_parquet(*stores: Any) -> None:
        write(*stores)
        refuse(disk)

    monkeypatch.setattr(reporting, "write_parquet", write_parquet)
    done = run(SWEEP, *ONE, "--output", str(disk.folder), "--store", str(known))
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert done.stderr.startswith(f"error: {disk.folder}/")
    assert why in done.stderr
    assert f"{advice}, then run the command again" in done.stderr


@pytest.mark.parametrize(
    ("refuse", "option", "said"),
    [
        (Disk.fill, "--store", "No space left on device; free some space"),
        (Disk.close, "--store", "Read-only file system; make it writable"),
        (Disk.close, "--output", "Read-only file system; make it writable"),
    ],
)
def test_a_disk_that_refuses_from_the_start(
    run: Run, disk: Disk, tmp_path: Path, refuse: Callable[[Disk], None], option: str, said: str
) -> None:
    """The option is right, so the exit code is 1: the same command continues once the disk works."""
    refuse(disk)
    at = {"--output": tmp_path / "output", "--store": tmp_path / "store"} | {option: disk.folder / "mine"}
    done = run(SWEEP, *ONE, "--plan", *(str(word) for each in at.items() for word in each))
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert done.stderr == f"error: {disk.folder / 'mine'}: {said}, then run the command again\n"


def test_a_study_file_that_finds_no_space(run: Run, disk: Disk, known: Path) -> None:
    """The error names the file, not its temporary file, and the earlier content is unchanged."""
    at = ("--output", str(disk.folder), "--store", str(known))
    assert run(SWEEP, *ONE, *at).returncode == 0
    (file,) = disk.folder.glob("*/study.json")
    before = file.read_bytes()
    disk.fill()
    done = run(SWEEP, *ONE, *at)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert done.stderr.startswith(f"error: {file}: No space left on device; free some space")
    assert file.read_bytes() == before


def test_a_store_of_which_a_part_cannot_be_written(run: Run, disk: Disk, known: Path, tmp_path: Path) -> None:
    other = disk.folder / "store"
    shutil.copytree(known, other)
    disk.fill()
    done = run(ORCHESTRATOR, "sync", "--output", str(tmp_path), "--store", str(other))
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert done.stderr.startswith(f"error: {other}/")
    assert "No space left on device" in done.stderr


def test_a_librarys_error_on_a_full_disk_names_the_disk(disk: Disk, tmp_path: Path) -> None:
    """Ray Tune, for example, raises an error about a missing file that it could not write before."""

    def fails() -> None:
        with atomic_files.report_unwritable_folders(tmp_path, disk.folder):
            raise ValueError("no such snapshot")

    with pytest.raises(ValueError, match="no such snapshot"):
        fails()
    disk.fill()
    with pytest.raises(OSError, match="No space left on device") as full:
        fails()
    assert describe_disk_error(full.value).startswith(
        f"{disk.folder}: No space left on device; free some space"
    )
    with (
        pytest.raises(StudyError, match=f"^{disk.folder}/gone is gone; mount"),
        atomic_files.report_unwritable_folders(disk.folder / "gone"),
    ):
        raise ValueError("no such snapshot")
    disk.free()
    with pytest.raises(ValueError, match="no such snapshot"):
        fails()


@pytest.mark.ray
@pytest.mark.nightly
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("refuse", "said"), [(Disk.fill, "No space left on device"), (Disk.close, "is gone")]
)
def test_a_store_that_refuses_for_long_ends_the_study_with_one_line(
    cluster: Cluster, letters_bases: Path, tmp_path: Path, refuse: Callable[[Disk], None], said: str
) -> None:
    """The disk refuses writes while a lane trains, for longer than a trainer tries to write a record."""
    with mounted(tmp_path / "disk", megabytes=64) as disk:
        output = disk.folder / "results"
        shutil.copytree(letters_bases, output / "store" / "bases")
        task = study.hold(tmp_path / "task", Store(output / "store"), records=1, step=10)
        arguments = (
            "--variants",
            "lora",
            "--seeds",
            "1",
            "--learning-rates",
            "1e-3",
            "1e-2",
            "--steps",
            "24",
        )
        arguments = (*arguments, "--trainers", "1", "--lanes-per-trainer", "1", "--task", str(task))
        process = study.start(output, *arguments, address=cluster.address)
        study.wait_for(lambda: study.held(task), process)
        refuse(disk)
        study.release(task)
        code, out, err = study.end(process)
        assert (code, len(err.splitlines())) == (1, 1), out + err
        assert err.startswith(f"error: {output}")
        assert said in err


def test_a_log_that_finds_no_space_ends_no_study(disk: Disk) -> None:
    shown = io.StringIO()
    with Progress(disk.folder, 2, 0, Console(file=shown)) as progress:
        progress.notify("before")
        print("noise before")
        disk.fill()
        progress.notify("meanwhile")
        print("noise " * 2000)
        print("more noise", file=sys.stderr)
        disk.free()
        progress.notify("after")
        print("noise after")
        disk.fill()
        progress.notify("at the end")
    assert shown.getvalue() == "before\nmeanwhile\nafter\nat the end\n"
    log = (disk.folder / "study.log").read_text()
    assert "before" in log
    assert "after" in log
    assert (disk.folder / "ray.log").read_text().splitlines()[0] == "noise before"
