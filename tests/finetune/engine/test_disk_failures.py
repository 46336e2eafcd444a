"""A disk that is full, or that refuses a file: what is skipped, what waits, and what ends."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from full_disk import Disk, mounted
from scripted import Script, configuration, get_record, leases, numbers_of, saved_step, solo, train
from short_of_memory import Again

from orchestrator.finetune.engine.lane_source import Directive, Lease
from orchestrator.finetune.failures import StoreFullError
from orchestrator.record.schema import Record
from orchestrator.record.store import Store


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with mounted(tmp_path / "disk", megabytes=2) as disk:
        yield disk


class Filling(Again):
    """A lane source that fills the disk when a lane has reached step `full`, and frees it at step `freed`."""

    disk: Disk
    full, freed = 0, 0
    is_full = False

    def exchange(self, steps_taken: int) -> Mapping[str, Directive]:
        answers = super().exchange(steps_taken)
        furthest = max(self.steps.values(), default=0)
        if self.full and furthest >= self.full:
            self.disk.fill()
            self.full, self.is_full = 0, True
        if self.is_full and self.freed and furthest >= self.freed:
            self.disk.free()
            self.is_full = False
        return answers


def test_a_checkpoint_on_a_full_disk_is_skipped(
    disk: Disk, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Only the checkpoints are on the full disk. A lane that yields then resumes from an older checkpoint."""
    store = Store(tmp_path / "store")
    store.checkpoints = disk.folder
    points = [configuration(seed=seed, steps=12, evaluations=6) for seed in range(2)]
    source = Filling(leases(points))
    source.disk, source.full, source.freed = disk, 3, 9
    seen: dict[int, int] = {}

    def changes(steps: Mapping[str, int]) -> Mapping[str, Directive]:
        step = steps.get(points[0].fingerprint, 0)
        seen.setdefault(step, saved_step(disk.folder, points[0]))
        leaves = step == 7 and not source.spilled
        return {points[0].fingerprint: Directive.YIELD} if leaves else {}

    source.changes = changes
    with caplog.at_level(logging.WARNING):
        train(source, store)
    said = [record.getMessage() for record in caplog.records]
    assert len([line for line in said if "cannot save lanes" in line and "No space left" in line]) == 1
    assert not [line for line in said if "skipping" in line], "no incomplete file under a final name"
    assert seen[6] == 2, "the lane trained on and could not be saved"
    assert seen[11] == 10, "the lane was saved again when there was space"
    assert (points[0].fingerprint, 1) in source.spilled
    for point in points:
        assert numbers_of(get_record(store, point)) == numbers_of(solo(point, tmp_path))
    assert get_record(store, points[0]).provenance.resumed_from == (2,)


def test_a_record_waits_for_space_on_a_full_disk(disk: Disk, tmp_path: Path) -> None:
    store = Store(disk.folder / "store")
    points = [configuration(seed=seed, steps=4, evaluations=1) for seed in range(2)]
    source = Filling(leases(points))
    source.disk, source.full = disk, 2
    said: list[str] = []

    class Frees(logging.Handler):
        """A handler that frees the disk when the loop logs that it waits for space."""

        def emit(self, record: logging.LogRecord) -> None:
            if "waiting for space" in record.getMessage():
                said.append(record.getMessage())
                disk.free()

    handler = Frees()
    logging.getLogger("orchestrator.finetune.engine.recorder").addHandler(handler)
    try:
        train(source, store, store_full_seconds=1.0)
    finally:
        logging.getLogger("orchestrator.finetune.engine.recorder").removeHandler(handler)
    assert len(said) == 1
    assert [state for _, _, state in source.ended] == ["finished", "finished"]
    for point in points:
        assert numbers_of(get_record(store, point)) == numbers_of(solo(point, tmp_path))


def test_an_adapter_makes_room_for_its_record(disk: Disk, tmp_path: Path) -> None:
    """The adapter was written into the last free space; it is removed, so that the record can be written."""
    store, one = Store(disk.folder / "store"), configuration(steps=2, evaluations=1)
    source, put = Script(leases([one])), store.put

    def put_on_a_full_disk(record: Record) -> bool:
        if not (disk.folder / "filler").exists():
            disk.fill()
        return put(record)

    store.put = put_on_a_full_disk  # type: ignore[method-assign]
    train(source, store, adapters=store.adapters, store_full_seconds=0.3)
    assert list(store.adapters.iterdir()) == []
    assert any("is not kept" in line for line in source.said)
    assert numbers_of(get_record(store, one)) == numbers_of(solo(one, tmp_path))


def test_a_disk_that_stays_full_ends_the_trainer_and_loses_no_lane(disk: Disk, tmp_path: Path) -> None:
    store = Store(disk.folder / "store")
    points = [
        configuration(seed=seed, steps=steps, evaluations=1) for seed, steps in ((0, 2), (1, 6), (2, 9))
    ]
    source = Filling(leases(points))
    source.disk, source.full = disk, 4
    with pytest.raises(
        StoreFullError, match=r"no space left on .*/store; free some, then run the command again"
    ):
        train(source, store, store_full_seconds=0.3)
    assert [fingerprint for fingerprint, _, _ in source.ended] == [points[0].fingerprint]
    assert {f for f, _ in source.spilled} == {points[1].fingerprint, points[2].fingerprint}
    assert store.states() == {points[0].fingerprint: "finished"}
    assert not [path for path in store.records_folder.rglob("*.json") if points[1].fingerprint in path.name]
    disk.free()
    train(Script([Lease(point, 2) for point in points]), store)
    for point in points:
        assert numbers_of(get_record(store, point)) == numbers_of(solo(point, tmp_path))
