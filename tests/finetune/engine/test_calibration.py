"""Calibration tensors are computed once for a model, task, variant and seed, and equal in all lane groups."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kinds import others_slow
from scripted import Script, configuration, get_record, leases, numbers_of, solo, tiny_base_model, train

from orchestrator.finetune.models.base_model import BaseModel
from orchestrator.finetune.tasks.base import Task
from orchestrator.record.store import Store
from orchestrator.study.configuration import Configuration, ModelChoice
from variants import catalogue
from variants.hooks import statistic_of

CALIBRATED = [n for n in catalogue.names() if statistic_of(catalogue.get(n)).needs_data]


def point(variant: str, *, rate: float = 1e-2, seed: int = 0, batches: int = 3) -> Configuration:
    one = configuration(variant=variant, rate=rate, seed=seed, steps=4)
    extra = {**catalogue.get(variant).extra_defaults, "calibration_batches": batches}
    return replace(one, variant=replace(one.variant, extra=extra))


def modification_times(store: Store) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in store.calibration.iterdir()}


@pytest.mark.parametrize("variant", others_slow(CALIBRATED))
def test_all_learning_rates_share_a_file_and_each_seed_has_its_own(variant: str, store: Store) -> None:
    rates = [point(variant, rate=rate) for rate in (1e-3, 1e-2)]
    train(Script(leases(rates)), store)
    first = modification_times(store)
    assert len(first) == 1
    train(Script(leases([point(variant, rate=1e-1)])), store)
    assert modification_times(store) == first  # read, not written again
    train(Script(leases([point(variant, seed=1)])), store)
    assert len(modification_times(store)) == 2
    for c in rates:
        record = get_record(store, c)
        assert record.state == "finished", record.traceback


@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: data[:-9] + bytes(9)], ids=["cut", "zeros"]
)
def test_a_damaged_file_is_computed_again(store: Store, damage: Callable[[bytes], bytes]) -> None:
    train(Script(leases([point("eva")])), store)
    (file,) = store.calibration.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    again = point("eva", rate=1e-3)
    train(Script(leases([again])), store)
    assert file.read_bytes() == whole
    record = get_record(store, again)
    assert record.state == "finished", record.traceback


@pytest.mark.parametrize("variant", others_slow(CALIBRATED))
def test_calibrated_lanes_in_a_group_equal_lanes_alone(variant: str, store: Store, tmp_path: Path) -> None:
    lanes = [point(variant, seed=seed) for seed in range(3)]
    train(Script(leases(lanes)), store)
    for c in lanes:
        record = get_record(store, c)
        assert numbers_of(record) == numbers_of(solo(c, tmp_path))


@pytest.mark.parametrize("variant", others_slow(CALIBRATED))
def test_calibration_uses_the_batches_that_the_lane_trains_on(variant: str, store: Store) -> None:
    c = point(variant, batches=2)
    seen: list[torch.Tensor] = []

    def load(choice: ModelChoice, task: Task) -> BaseModel:
        base_model = tiny_base_model(choice, task)
        base_model.model.base_model.register_forward_pre_hook(
            lambda model, args, given: seen.append(given["input_ids"]), with_kwargs=True
        )
        return base_model

    train(Script(leases([c])), store, load_base_model=load)
    # Evaluation uses batches of another size.
    batches = [ids for ids in seen if len(ids) == c.batches.batch_size]
    assert len(batches) == 2 + c.lr_schedule.steps
    assert all(torch.equal(first, second) for first, second in zip(batches[:2], batches[2:4], strict=True))


@pytest.mark.parametrize("svd", ["exact", 2])
def test_another_trainer_computes_no_singular_triplets_again(
    svd: str | int, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first trainer keeps them in the store for all seeds and rates; another rank has its own."""
    decomposed: list[torch.Size] = []
    decompose = torch.linalg.svd

    def count(matrix: torch.Tensor, full_matrices: bool = True) -> object:
        decomposed.append(matrix.shape)
        return decompose(matrix, full_matrices=full_matrices)

    def lane(rate: float, seed: int, rank: int = 8) -> Configuration:
        one = configuration(variant="pissa", rate=rate, seed=seed, steps=2)
        return replace(one, variant=replace(one.variant, rank=rank, extra={"svd": svd}))

    monkeypatch.setattr(torch.linalg, "svd", count)
    train(Script(leases([lane(1e-3, 0), lane(1e-2, 1)])), store)
    assert len(decomposed) == 14  # layers
    again = lane(1e-1, 2)
    train(Script(leases([again])), store)
    assert len(decomposed) == 14
    train(Script(leases([lane(1e-2, 0, rank=4)])), store)
    assert len(decomposed) == 28
    record = get_record(store, again)
    assert record.state == "finished", record.traceback
    assert numbers_of(record) == numbers_of(solo(again, tmp_path))
