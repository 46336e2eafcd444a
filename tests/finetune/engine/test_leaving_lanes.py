"""Lanes that leave a trainer: the checkpoints that they save, and those that must not remain."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from scripted import Script, configuration, get_record, leases, numbers_of, solo, train

from orchestrator.finetune.engine.checkpoint import read_newest
from orchestrator.finetune.engine.lane_source import Directive
from orchestrator.record.store import Store


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


def test_a_lane_that_yields_is_saved_at_once_and_resumes_elsewhere(store: Store, tmp_path: Path) -> None:
    points = [configuration(seed=seed, steps=8, evaluations=2) for seed in range(2)]

    def changes(steps: Mapping[str, int]) -> Mapping[str, Directive]:
        return dict.fromkeys(steps, Directive.YIELD) if 3 in steps.values() else {}

    source = Script(leases(points), changes=changes)
    train(source, store)
    assert sorted(source.spilled) == sorted((point.fingerprint, 1) for point in points)
    assert source.ended == []
    for point in points:
        saved = read_newest(store.checkpoints / point.fingerprint, print)
        assert saved is not None
        assert saved.step == 3
    train(Script(leases(points, attempt=2)), store)
    for point in points:
        assert numbers_of(get_record(store, point)) == numbers_of(solo(point, tmp_path))
