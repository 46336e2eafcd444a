"""When a lane is saved, that it trains on while its checkpoint is written, and what it leaves behind."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scripted import (
    Script,
    SimulatedCrashError,
    configuration,
    get_record,
    leases,
    numbers_of,
    solo,
    train,
)

from orchestrator.finetune.engine import checkpoint
from orchestrator.finetune.engine.checkpoint import Checkpoint, read_newest
from orchestrator.finetune.engine.checkpoint_writer import CheckpointSchedule, copy_to_host
from orchestrator.finetune.engine.lane import Lane
from orchestrator.finetune.engine.lane_source import Directive, Lease
from orchestrator.record.store import Store

pytestmark = pytest.mark.xdist_group("pair")  # see pair.py: its server has torch imported already

ONE = configuration(steps=12, evaluations=4)
ALWAYS: Mapping[str, Any] = {"min_checkpoint_seconds": 0.0, "max_checkpoint_seconds": 0.0}
"""A lane is saved whenever no other write runs, as in a study that writes checkpoints at no cost."""


# -- when ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("write_seconds", "lanes", "expected"),
    [
        (0.0, 4, 60.0),  # no write yet, or the last one failed
        (0.005, 4, 60.0),  # a small lane on a local disk: sqrt(2 * 0.02 * 86400) = 59
        (0.5, 2, 415.7),  # 58 MiB on EFS
        (0.5, 4, 587.9),
        (2.0, 4, 900.0),  # 240 MiB on EFS: 1175
    ],
)
def test_the_interval_follows_from_the_duration_of_a_write(
    write_seconds: float, lanes: int, expected: float
) -> None:
    schedule = CheckpointSchedule(write_seconds)
    interval = schedule.compute_interval(lanes)
    assert interval == pytest.approx(expected, abs=0.1)
    lane = Lane(Lease(ONE, 1))
    lane.saved_at = time.monotonic() - interval - 1
    assert schedule.is_due(lane, lanes, is_first=False)
    lane.saved_at = time.monotonic() - interval + 30
    assert not schedule.is_due(lane, lanes, is_first=False)
    lane.saved_at = time.monotonic() - 60 - 1
    assert schedule.is_due(lane, lanes, is_first=True), "a trainer that dies often gets on"


def test_a_lane_that_leaves_or_is_stopped_is_saved_at_any_time(store: Store, tmp_path: Path) -> None:
    two = [replace(ONE, seed=seed) for seed in range(2)]

    def changes(steps: Mapping[str, int]) -> Mapping[str, Directive]:
        if 5 not in steps.values():
            return {}
        return {two[0].fingerprint: Directive.YIELD, two[1].fingerprint: Directive.STOP}

    never = {"min_checkpoint_seconds": 60.0, "max_checkpoint_seconds": 900.0}
    train(Script(leases(two), changes=changes), store, **never)
    for one in two:
        saved = read_newest(store.checkpoints / one.fingerprint, print)
        assert saved is not None
        assert saved.step == 5
    train(Script(leases(two, attempt=2)), store, **never)
    for one in two:
        record = get_record(store, one)
        assert numbers_of(record) == numbers_of(solo(one, tmp_path))


# -- in the background --------------------------------------------------------------------------------------


def wait_until(what: Callable[[], bool]) -> None:
    """Wait for another thread or process; the test's time limit ends a wait for nothing."""
    while not what():
        time.sleep(0.002)


class Writes:
    """Writes of checkpoints, each of which waits until `go` returns true for its checkpoint."""

    def __init__(self, patch: pytest.MonkeyPatch, go: Callable[[Checkpoint], bool]) -> None:
        self.events: list[str] = []
        write, discard = checkpoint.write, Store.discard_checkpoints

        def held(folder: Path, saved: Checkpoint) -> Path:
            wait_until(lambda: go(saved))
            path = write(folder, saved)
            self.events.append(f"written {saved.step}")
            return path

        def discarding(store: Store, fingerprint: str) -> None:
            self.events.append("discarded")
            discard(store, fingerprint)

        patch.setattr(checkpoint, "write", held)
        patch.setattr(Store, "discard_checkpoints", discarding)


def test_a_lane_trains_on_while_its_checkpoint_is_written(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint is written five steps after it was made. It has the state of the step at which it was
    made, as a lane that resumes from it shows."""
    wanted = numbers_of(solo(ONE, tmp_path))
    over: list[bool] = []
    writes = Writes(monkeypatch, lambda saved: saved.step == 0 or bool(over) or lane_step() >= saved.step + 5)

    def lane_step() -> int:
        return source.lanes[ONE.fingerprint].step

    def is_written() -> bool:
        return bool(writes.events) and writes.events[-1] != "written 0"

    def changes(steps: Mapping[str, int]) -> Mapping[str, Directive]:
        if steps:  # however slow the disk is, the next write starts early, and ends before the lane does
            wait_until(lambda: "written 0" in writes.events)
        if ONE.lr_schedule.steps - 2 in steps.values():
            wait_until(is_written)
        if is_written():
            over.append(True)  # the loop waits for the last write
            raise SimulatedCrashError
        return {}

    source = Script(leases([ONE]), changes=changes)
    with pytest.raises(SimulatedCrashError):
        train(source, store, **ALWAYS)
    made_at = int(next(event for event in writes.events if event != "written 0").split()[1])
    assert 1 <= made_at <= lane_step() - 5
    for file in (store.checkpoints / ONE.fingerprint).glob("*/*.safetensors"):
        if file.name > f"step-{made_at:08d}.safetensors":  # the last write
            file.unlink()
    train(Script(leases([ONE], attempt=2)), store)
    record = get_record(store, ONE)
    assert record.provenance.resumed_from == (made_at,)
    assert numbers_of(record) == wanted


def test_a_copy_keeps_its_values_when_the_lane_trains_on() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = torch.arange(12.0, device=device).reshape(3, 4)
    expected = weight.T.cpu().clone()
    saved = Checkpoint("f", 1, 3, {"a": weight.T}, {"b": weight}, {"exp_avg": {"a": weight.bfloat16()}})
    copied, wait_for_copy = copy_to_host(saved)
    weight.mul_(-1.0)
    wait_for_copy()
    assert torch.equal(copied.trainable["a"], expected)
    assert torch.equal(copied.frozen["b"], expected.T)
    assert torch.equal(copied.moments["exp_avg"]["a"], expected.T.bfloat16())
    assert copied.trainable["a"].is_pinned() == (device == "cuda")


def test_leftover_checkpoints_of_a_final_record_are_discarded(store: Store) -> None:
    """A writer that died before it removed them, or a trainer with an older lease, leaves checkpoints."""
    point = configuration(steps=4)
    train(Script(leases([point])), store)
    assert not (store.checkpoints / point.fingerprint).exists()
    left = store.checkpoints / point.fingerprint / "1" / "step-00000002.safetensors"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"left")
    source = Script(leases([point], attempt=2))
    train(source, store)
    assert source.ended == [(point.fingerprint, 2, "finished")]
    assert source.reports == []
    assert not (store.checkpoints / point.fingerprint).exists()


def test_a_lane_whose_record_another_trainer_wrote_leaves_no_checkpoint(store: Store, tmp_path: Path) -> None:
    point = configuration(steps=8, evaluations=4)

    def changes(steps: Mapping[str, int]) -> Mapping[str, Directive]:
        if steps.get(point.fingerprint) != 5:
            return {}
        store.put(solo(point, tmp_path))
        return {point.fingerprint: Directive.DROP}

    source = Script(leases([point]), changes=changes)
    train(source, store)
    assert source.ended == []
    assert not (store.checkpoints / point.fingerprint).exists()
