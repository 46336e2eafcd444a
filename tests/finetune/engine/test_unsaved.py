"""Checkpoints that cannot be written for reasons other than a full disk, and remembered lane capacities.

The tests of a full disk are in test_disk_failures.py.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from scripted import Script, configuration, leases, numbers_of, solo, tiny_base_model, train

from orchestrator.finetune.engine.engine import Engine
from orchestrator.record import lane_capacity
from orchestrator.record.schema import Record
from orchestrator.record.store import Store
from orchestrator.study.configuration import Configuration

POINT = configuration(steps=8, evaluations=4)


def finished(store: Store, point: Configuration) -> Record:
    record = store.get(point.fingerprint)
    assert record is not None
    assert record.state == "finished"
    return record


def lines(caplog: pytest.LogCaptureFixture, words: str) -> list[str]:
    return [text for text in caplog.messages if words in text]


@pytest.mark.parametrize("moment", ["before the file is made", "before it has its name"])
def test_a_checkpoint_folder_removed_during_a_write_is_created_again(
    moment: str,
    store: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The test removes the folder during a write, like another study that ends the same lane."""
    wanted = numbers_of(solo(POINT, tmp_path))
    folder = store.checkpoints / POINT.fingerprint
    removed: list[str] = []

    def removing(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            if not removed and folder.exists():
                removed.extend(os.listdir(folder / "1"))
                removed.append("the folder")
                shutil.rmtree(folder)
            return real(*args)

        return call

    if moment == "before the file is made":
        monkeypatch.setattr(uuid, "uuid4", removing(uuid.uuid4))
    else:
        monkeypatch.setattr(os, "fsync", removing(os.fsync))
    train(Script(leases([POINT])), store)
    assert len(removed) == (1 if moment == "before the file is made" else 2)
    assert numbers_of(finished(store, POINT)) == wanted
    assert not lines(caplog, "cannot save lanes"), "it was written at once in the new folder"


@pytest.fixture(params=["read-only", "a file"])
def refusing(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """Return a folder in which no checkpoint can be written.

    Either a file is in the place of the folder, or the folder is read-only. Root ignores permissions, so for
    root the folder is a read-only file system.
    """
    folder = tmp_path / "refusing"
    if request.param == "a file":
        folder.write_text("")
        yield folder
        return
    folder.mkdir()
    folder.chmod(0o500)
    if os.geteuid() != 0:
        yield folder
        return
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)], capture_output=True
    ).returncode:
        pytest.skip("needs the right to mount a file system, or a user who is not root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_checkpoints_that_the_disk_refuses_are_skipped_with_one_warning(
    refusing: Path, store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    points = [POINT, configuration(seed=1, steps=8, evaluations=4)]
    store.checkpoints = refusing
    with caplog.at_level(logging.WARNING):
        train(Script(leases(points)), store)
    assert len(lines(caplog, "cannot save lanes")) == 1
    for point in points:
        assert numbers_of(finished(store, point)) == numbers_of(solo(point, tmp_path))


# -- memory -------------------------------------------------------------------------------------------------


def place(share: float, folder: Path) -> str:
    made = Engine(
        lambda choice, task: replace(tiny_base_model(choice), memory_fraction=share),
        folder / "calibration",
        folder / "data",
    )
    made.prepare_lane_group(POINT)
    return made.device_key


def test_the_device_key_names_the_memory_and_the_share_of_it(tmp_path: Path) -> None:
    size = f"{round(psutil.virtual_memory().total / 2**30)} GiB"
    assert place(1.0, tmp_path) == f"cpu, {size}"
    assert place(0.5, tmp_path) == f"cpu, {size}, share 0.5"
    lane_capacity.write_max_lanes(tmp_path, POINT.group_key, place(0.5, tmp_path), 2, 4)
    assert lane_capacity.read_max_lanes(tmp_path, POINT.group_key, place(1.0, tmp_path)) is None


def test_a_stored_limit_is_reported_once_with_its_file(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    points = [configuration(seed=seed, steps=2) for seed in range(4)]
    path = lane_capacity.write_max_lanes(store.lane_capacity, POINT.group_key, place(1.0, tmp_path), 2, 4)
    few = Script(leases(points))
    with caplog.at_level(logging.WARNING):
        train(few, store, lanes=2)
        assert not lines(caplog, "at most"), "the limit is not lower than the requested number"
        store = Store(tmp_path / "another")
        shutil.copytree(path.parent, store.lane_capacity)
        source = Script(leases(points))
        train(source, store, lanes=4)
    (said,) = lines(caplog, "at most 2 lanes at once")
    assert str(store.lane_capacity / path.name) in said
    assert max(map(len, source.held)) == 2
    for point in points:
        finished(store, point)
