"""Parked lanes make room for waiting ones, and resume later."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from scripted import Queue, configuration, leases, numbers_of, solo, train

from orchestrator.finetune.engine.lane_source import Directive, LeaseGrant
from orchestrator.record.schema import Record
from orchestrator.record.store import Store


def numbers(store: Store, fingerprint: str) -> Record:
    record = store.get(fingerprint)
    assert record is not None
    return numbers_of(record)


@pytest.mark.parametrize("variant", ["lora", pytest.param("pissa", marks=pytest.mark.slow)])
def test_parked_lanes_make_room_and_resume(variant: str, store: Store, tmp_path: Path) -> None:
    five = [
        configuration(variant=variant, seed=seed, steps=9, evaluations=3, dropout=0.1) for seed in range(5)
    ]
    source = Queue(leases(five))
    train(source, store, lanes=2, spill_seconds=-1.0)
    assert source.spilled
    assert source.most == 2
    for one in five:
        assert numbers(store, one.fingerprint) == numbers_of(solo(one, tmp_path))
    assert source.taken == 5 * 9  # evicted lanes lose no step


def test_a_parked_lane_keeps_its_slot_while_no_lane_waits(store: Store) -> None:
    three = [configuration(seed=seed, steps=6, evaluations=3) for seed in range(3)]
    source = Queue(leases(three))
    train(source, store, lanes=3, spill_seconds=-1.0)
    assert source.spilled == []
    assert {attempt for _, attempt, _ in source.ended} == {1}


def test_the_longest_parked_lane_makes_room_first_and_no_more_than_needed(store: Store) -> None:
    early, late = configuration(seed=0, steps=4, evaluations=4), configuration(seed=1, steps=4, evaluations=2)
    third = configuration(seed=2, steps=4, evaluations=1)
    source = Queue(leases([early, late, third]), park_exchanges=4)
    source.start_at = {third.fingerprint: 2}  # at step 2 both lanes are parked, `early` since step 1
    train(source, store, lanes=2, spill_seconds=-1.0)
    assert source.spilled[0] == (early.fingerprint, 1)
    assert late.fingerprint not in dict(source.spilled[:1])
    assert {state for _, _, state in source.ended} == {"finished"}


def test_a_group_that_is_parked_as_a_whole_makes_room_for_another_group_key(
    store: Store, tmp_path: Path
) -> None:
    """Otherwise a scheduler that needs reports of lanes of the other group key would wait forever."""
    small, large = configuration(rank=2, steps=4), configuration(rank=4, steps=4)

    class Bracket(Queue):
        def exchange(self, steps_taken: int) -> Mapping[str, Directive]:
            directives = super().exchange(steps_taken)
            return (
                directives
                if {r.fingerprint for r in self.reports} == {small.fingerprint, large.fingerprint}
                else {}
            )

        def lease(self, group_key: str | None, capacity: int, steps_taken: int) -> LeaseGrant:
            if small.fingerprint in self.away and len(self.reports) < 2:
                self.away[small.fingerprint] = len(self.held)
            return super().lease(group_key, capacity, steps_taken)

    source = Bracket(leases([small, large]))
    train(source, store, lanes=4, spill_seconds=-1.0)
    assert source.spilled[0] == (small.fingerprint, 1)
    for one in (small, large):
        assert numbers(store, one.fingerprint) == numbers_of(solo(one, tmp_path))


def test_a_lane_that_is_not_parked_for_long_stays(store: Store) -> None:
    three = [configuration(seed=seed, steps=4, evaluations=2) for seed in range(3)]
    source = Queue(leases(three))
    train(source, store, lanes=2, spill_seconds=3600.0)
    assert source.spilled == []
    assert len(source.ended) == 3


def test_a_saved_lane_is_not_written_again(store: Store) -> None:
    """An eviction right after an evaluation or a resumption writes no checkpoint, because one exists."""
    two = [configuration(seed=seed, steps=4, evaluations=2) for seed in range(2)]
    written: list[tuple[str, int]] = []

    class Watching(Queue):
        def return_lease(self, fingerprint: str, attempt: int) -> None:
            super().return_lease(fingerprint, attempt)
            files = (store.checkpoints / fingerprint).glob("*/*.safetensors")
            written.append((fingerprint, len(list(files))))

    source = Watching(leases(two))
    train(source, store, lanes=1, spill_seconds=-1.0)
    assert written
    assert {count for _, count in written} == {1}
