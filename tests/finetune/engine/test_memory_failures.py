"""Lane groups and evaluations that run out of memory: how many lanes go on, and with which results."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import short_of_memory
import torch
from pair import process
from scripted import configuration, get_record, leases, numbers_of, solo, tiny_base_model, train
from short_of_memory import HUGE, LANES, LATER, WIDE, Again
from torch.optim.optimizer import register_optimizer_step_post_hook

from orchestrator.finetune.engine.lane import LaneState
from orchestrator.finetune.engine.leasing import LaneSlots
from orchestrator.finetune.engine.recovery import StoredLimits
from orchestrator.finetune.models.base_model import BaseModel
from orchestrator.finetune.tasks import letters
from orchestrator.record.store import Store
from orchestrator.util.atomic_files import verify_checksum
from variants import catalogue as variants

pytestmark = pytest.mark.xdist_group("pair")  # see pair.py: its server has torch imported already


def short_of(work: Callable[[Path], None], folder: Path) -> dict[str, Any]:
    """Return the results that a function of short_of_memory.py wrote."""
    done = process(work, folder)
    done.join()
    assert done.exitcode == 0, (folder / "said").read_text()
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Return the folder of the stores, and the results."""
    folder = tmp_path_factory.mktemp("short")
    return folder, short_of(short_of_memory.together, folder)


@pytest.mark.slow
def test_fewer_lanes_train_after_an_out_of_memory_error_with_equal_results(
    short: tuple[Path, dict[str, Any]],
) -> None:
    folder, results = short
    said = (folder / "said").read_text()
    assert f"out of memory with {LANES} lanes, now {LANES // 2} at once; remembered in" in said
    assert results["most"] == LANES
    given_back = {name for name, _ in results["given_back"]}
    assert len(given_back) == LANES // 2
    assert results["taken"] == LANES, "no step was lost, none taken twice"
    for point in WIDE:
        record = get_record(Store(folder / "short"), point)
        assert record.state == "finished"
        assert record.provenance.attempt == (2 if point.fingerprint in given_back else 1)
        assert numbers_of(record) == numbers_of(get_record(Store(folder / f"plenty-{LANES}"), point))


@pytest.mark.slow
def test_the_lane_limit_is_stored_for_the_next_trainer(short: tuple[Path, dict[str, Any]]) -> None:
    folder, results = short
    assert results["later_most"] == LANES // 2
    assert results["later_given_back"] == []
    store = Store(folder / "short")
    assert {get_record(store, point).state for point in LATER} == {"finished"}
    place = f"cpu, {round(psutil.virtual_memory().total / 2**30)} GiB"
    limits = StoredLimits(store.lane_capacity, WIDE[0].group_key, place).read()
    assert limits == {"training": LANES // 2}


def test_the_smallest_limit_is_stored_and_a_damaged_file_counts_as_missing(store: Store) -> None:
    limits = StoredLimits(store.lane_capacity, "group", "device")
    for number in (6, 2, 4):
        StoredLimits(store.lane_capacity, "group", "device").write("training", number)
    limits.write("evaluation", 3)
    assert limits.read() == {"training": 2, "evaluation": 3}
    limits.path.write_text("{")
    assert limits.read() == {}


@pytest.mark.parametrize(("tokens", "expected"), [(100, 8), (2_000, 4), (4_000, 2), (50_000, 2)])
def test_a_gpu_trains_no_more_lanes_than_save_time(tokens: int, expected: int) -> None:
    assert LaneSlots(8, is_automatic=True).count_useful(tokens) == expected
    assert LaneSlots(8).count_useful(tokens) == 8


def test_a_lane_that_does_not_fit_alone_fails_with_advice(tmp_path: Path) -> None:
    results = short_of(short_of_memory.alone, tmp_path)
    assert [state for _, _, state in results["ended"]] == ["failed", "finished"]
    record = get_record(Store(tmp_path / "alone"), HUGE)
    assert "out of memory with one lane alone: try --gradient-checkpointing, --accumulation" in record.reason
    assert "DefaultCPUAllocator" in record.traceback


@pytest.fixture
def small_general(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the split "general" of a lane have fewer rows than two lanes have in a forward pass."""
    monkeypatch.setattr(letters, "GENERAL_EXAMPLES", 15)


def out_of_memory_at(nth: int, is_wide: Callable[[int], bool]) -> tuple[BaseModel, list[int]]:
    """Return a base model whose nth forward pass of an evaluation with `is_wide(rows)` runs out of memory.

    The list is filled with the rows of each such pass.
    """
    base_model = tiny_base_model(configuration().model)
    forward, wide = base_model.model.base_model.forward, []

    def raises_out_of_memory(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() and is_wide(len(kwargs["input_ids"])):
            wide.append(len(kwargs["input_ids"]))
            if len(wide) == nth:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(*args, **kwargs)

    base_model.model.base_model.forward = raises_out_of_memory
    return base_model, wide


@pytest.mark.usefixtures("small_general")
@pytest.mark.parametrize("nth", [1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_an_evaluation_that_runs_out_of_memory_scores_fewer_lanes_at_once_and_none_leaves(
    nth: int, store: Store, tmp_path: Path
) -> None:
    """The nth forward pass that scores more than two lanes runs out of memory. This happens in the first
    split, or in the second split after the first was scored."""
    base_model, wide = out_of_memory_at(nth, lambda rows: rows > 2 * 16)
    points = [configuration(seed=seed, steps=4, evaluations=2) for seed in range(4)]
    source = Again(leases(points))
    train(source, store, load_base_model=lambda choice, task: base_model)
    assert source.spilled == []
    assert len(wide) == nth, "later evaluations score two lanes at once"
    assert min(len(steps) for steps in source.held if steps) == 4, "the lanes train together as before"
    (file,) = store.lane_capacity.glob("*.json")
    assert json.loads(verify_checksum(file.read_bytes())).get("training") is None
    for point in points:
        assert numbers_of(get_record(store, point)) == numbers_of(solo(point, tmp_path))


@pytest.mark.usefixtures("small_general")
@pytest.mark.parametrize("nth", [1, *(pytest.param(nth, marks=pytest.mark.slow) for nth in (2, 3))])
def test_lanes_evicted_in_their_last_evaluation_are_scored_later(
    nth: int, store: Store, tmp_path: Path
) -> None:
    """From the nth forward pass that scores several lanes on, each pass of an evaluation runs out of memory
    while the trainer holds four lanes, even a pass that scores one lane alone."""
    base_model, wide = out_of_memory_at(nth, lambda rows: rows > 16)
    forward = base_model.model.base_model.forward

    def raises_out_of_memory(*args: Any, **kwargs: Any) -> Any:
        held = sum(lane.state is not LaneState.ENDED for lane in source.lanes.values())
        if not torch.is_grad_enabled() and len(wide) >= nth and held == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(*args, **kwargs)

    base_model.model.base_model.forward = raises_out_of_memory
    points = [configuration(seed=seed, steps=4, evaluations=2) for seed in range(4)]
    source = Again(leases(points))
    train(source, store, load_base_model=lambda choice, task: base_model)
    assert len(source.spilled) == 2
    assert source.taken == 4 * len(points)
    for point in points:
        assert numbers_of(get_record(store, point)) == numbers_of(solo(point, tmp_path))


@pytest.mark.slow
def test_lanes_that_do_not_fit_at_their_start_are_leased_again(store: Store, tmp_path: Path) -> None:
    """The fifth lane of six runs out of memory; the lease of the sixth is returned before it starts."""
    base_model = tiny_base_model(configuration().model)
    forward, raised = base_model.model.base_model.forward, []

    def raises_out_of_memory(*args: Any, **kwargs: Any) -> Any:
        if len(source.lanes) == 5 and not raised:
            raised.append(True)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(*args, **kwargs)

    base_model.model.base_model.forward = raises_out_of_memory
    points = [configuration(variant="eva", seed=seed, steps=2, evaluations=1) for seed in range(6)]
    few = {**variants.get("eva").extra_defaults, "calibration_batches": 2}
    points = [replace(one, variant=replace(one.variant, extra=few)) for one in points]
    source = Again(leases(points))
    train(source, store, load_base_model=lambda choice, task: base_model)
    assert len(source.spilled) == 4
    assert max(map(len, source.held)) == 2
    assert source.taken == 2 * len(points)
    for point in points:
        assert numbers_of(get_record(store, point)) == numbers_of(solo(point, tmp_path))


def test_a_lane_interrupted_in_its_optimizer_step_resumes_from_its_checkpoint(
    store: Store, tmp_path: Path
) -> None:
    """The lane's optimizer runs out of memory after it has changed the parameters."""
    points = [configuration(seed=seed, steps=6, evaluations=3) for seed in range(3)]
    raised = []

    def raise_out_of_memory(optimizer: torch.optim.Optimizer, *rest: object) -> None:
        lane = next((lane for lane in source.lanes.values() if lane.optimizer is optimizer), None)
        if lane is not None and lane.fingerprint == points[1].fingerprint and lane.step == 4 and not raised:
            raised.append(lane.step)
            raise torch.OutOfMemoryError("CUDA out of memory")

    source = Again(leases(points))
    handle = register_optimizer_step_post_hook(raise_out_of_memory)
    try:
        train(source, store)
    finally:
        handle.remove()
    assert raised == [4]
    assert (points[1].fingerprint, 1) in source.spilled
    for point in points:
        assert numbers_of(get_record(store, point)) == numbers_of(solo(point, tmp_path))
    interrupted = get_record(store, points[1])
    assert interrupted.provenance.resumed_from == (4,)
