"""When a lane is saved, and what it leaves behind."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from scripted import (
    Script,
    configuration,
    get_record,
    leases,
    numbers_of,
    saved_step,
    solo,
    train,
)

from orchestrator.finetune.engine.lane import Lane
from orchestrator.finetune.engine.lane_source import Directive, Lease
from orchestrator.finetune.engine.recorder import LaneRecorder
from orchestrator.record.store import Store

pytestmark = pytest.mark.xdist_group("pair")  # see pair.py: its server has torch imported already

ONE = configuration(steps=12, evaluations=4)


@pytest.mark.parametrize(
    ("write_seconds", "expected"),
    [
        (0.0, 60.0),  # no write yet
        (0.005, 60.0),  # a small lane on a local disk
        (0.5, 400.0),  # 58 MiB on EFS; two lanes: 1 s of 400
        (2.0, 900.0),  # 240 MiB on EFS
    ],
)
def test_the_interval_follows_from_the_duration_of_a_write(write_seconds: float, expected: float) -> None:
    lanes = {seed: Lane(Lease(replace(ONE, seed=seed), 1)) for seed in range(2)}
    engine: Any = SimpleNamespace(lanes=lanes)
    recorder = LaneRecorder(Store(Path("unused")), engine, print, write_seconds=write_seconds)
    recorder.mark_saved(lanes[0])
    for lane, interval in ((lanes[0], expected), (lanes[1], 60.0)):
        lane.saved_at = time.monotonic() - interval - 1
        assert recorder.is_due(lane)
        lane.saved_at = time.monotonic() - interval + 30
        assert not recorder.is_due(lane)


def test_a_lane_that_leaves_or_is_stopped_is_saved_at_any_time(store: Store, tmp_path: Path) -> None:
    two = [replace(ONE, seed=seed) for seed in range(2)]

    def changes(steps: Mapping[str, int]) -> Mapping[str, Directive]:
        if 5 not in steps.values():
            return {}
        return {two[0].fingerprint: Directive.YIELD, two[1].fingerprint: Directive.STOP}

    never = {"min_checkpoint_seconds": 60.0, "max_checkpoint_seconds": 900.0}
    train(Script(leases(two), changes=changes), store, **never)
    for one in two:
        assert saved_step(store.checkpoints, one) == 5
    train(Script(leases(two, attempt=2)), store, **never)
    for one in two:
        record = get_record(store, one)
        assert numbers_of(record) == numbers_of(solo(one, tmp_path))


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
