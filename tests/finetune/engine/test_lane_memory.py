"""The number of lanes by measurement: grown from one lane over two to what fits, stored, and used later."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scripted import Script, configuration, get_record, leases, numbers_of, solo, tiny_base_model, train

from orchestrator.finetune.engine.engine import Engine
from orchestrator.finetune.engine.lane_memory import MEASURED_STEPS, MEMORY_SHARE, LaneMemory
from orchestrator.record import lane_capacity
from orchestrator.record.lane_capacity import MeasuredLanes
from orchestrator.record.store import Store

GIB = 2**30


class MeasuredEngine(Engine):
    """An engine on the CPU whose steps have the peak memory of a GPU: 2 GiB, and 3 GiB for each lane.

    The first step after a lane was added needs 50 GiB more, as an initialization may.
    """

    memory_limit = 20 * GIB
    lanes_before = 0

    def take_peak_memory(self) -> int:
        lanes = len(self.lane_group.adapters.lanes) if self.has_lane_group else 0
        extra = 50 * GIB * (lanes > self.lanes_before)
        self.lanes_before = lanes
        return (2 + 3 * lanes) * GIB + extra


def peaks(one: int, two: int) -> LaneMemory:
    return LaneMemory({1: [10**15, *[one] * MEASURED_STEPS], 2: [10**15, *[two] * MEASURED_STEPS]})


@given(st.integers(1, 100), st.integers(1, 100), st.integers(1, 500), st.integers(0, 10_000))
def test_the_chosen_lanes_fit_and_one_more_would_not_or_would_not_pay(
    shared: int, lane: int, memory: int, tokens: int
) -> None:
    found = peaks(shared + lane, shared + 2 * lane).choose(memory, tokens)
    assert 1 <= found.lanes <= min(found.fitting, 8)
    assert found.fitting == 1 or shared + found.fitting * lane <= MEMORY_SHARE * memory
    assert shared + (found.fitting + 1) * lane > MEMORY_SHARE * memory
    if found.lanes < min(found.fitting, 8):
        assert found.lanes * tokens <= 9_000 or found.lanes == 2
        assert (found.lanes + 1) * tokens > 9_000


@pytest.mark.parametrize(("tokens", "lanes"), [(100, 8), (1_000, 8), (2_000, 4), (2_250, 4), (5_000, 2)])
def test_long_micro_batches_get_two_lanes_and_short_ones_up_to_eight(tokens: int, lanes: int) -> None:
    assert peaks(10, 11).choose(100, tokens).lanes == lanes


def test_a_trainer_measures_one_lane_then_two_then_grows_and_the_next_one_knows(
    store: Store, tmp_path: Path
) -> None:
    ten = [configuration(seed=seed, steps=12) for seed in range(10)]
    source = Script(leases(ten))
    train(source, store, lanes=8, is_measured=True, make_engine=MeasuredEngine)
    sizes = [len(steps) for steps in source.held]
    # 0.9 x 20 GiB hold 2 GiB and 5 lanes of 3 GiB.
    assert sizes[: 2 * (MEASURED_STEPS + 1)] == [1] * (MEASURED_STEPS + 1) + [2] * (MEASURED_STEPS + 1)
    assert max(sizes) == 5
    assert [line for line in source.said if "lanes at once" in line] == [
        f"5 lanes at once on {device_key(store)}: one lane needs 5.0 GiB, two 8.0: 5 fit"
    ]
    for one in ten:
        record = get_record(store, one)
        assert numbers_of(record) == numbers_of(solo(one, tmp_path)), "the number of lanes changes no result"
    later = Script(leases(configuration(seed=seed, steps=4) for seed in range(10, 20)))
    train(later, store, lanes=8, is_measured=True, make_engine=MeasuredEngine)
    assert len(later.held[0]) == 5
    typed = Script(leases(configuration(seed=seed, steps=4) for seed in range(20, 30)))
    train(typed, store, lanes=7, make_engine=MeasuredEngine)
    assert len(typed.held[0]) == 7, "a measurement is no limit of a typed number"


def device_key(store: Store) -> str:
    (path,) = store.lane_capacity.glob("*.json")
    return str(json.loads(path.read_text())["device_key"])


def test_a_variant_that_trains_alone_is_not_measured_further(store: Store) -> None:
    source = Script(leases(configuration(variant="full", seed=seed, steps=8) for seed in range(2)))
    train(source, store, lanes=8, is_measured=True, make_engine=MeasuredEngine)
    assert max(map(len, source.held)) == 1
    assert not store.lane_capacity.exists()


class Listener(Script):
    """A source that keeps what the trainer tells about its number of lanes."""

    def note_max_lanes(self, max_lanes: int) -> None:
        self.told = [*getattr(self, "told", []), max_lanes]


@pytest.mark.parametrize(("variant", "limits"), [("full", {1}), ("lora", {1, 2, 5})])
def test_a_trainer_tells_how_many_lanes_it_can_hold(variant: str, limits: set[int], store: Store) -> None:
    source = Listener(leases(configuration(variant=variant, seed=seed, steps=12) for seed in range(6)))
    train(source, store, lanes=8, is_measured=True, make_engine=MeasuredEngine)
    assert set(source.told) == limits


MEASURED = MeasuredLanes(lanes=5, fitting=6, one_lane_bytes=5, two_lanes_bytes=8, tokens=700)


def test_a_measurement_and_the_limit_of_an_out_of_memory_error_are_kept_beside_each_other(
    tmp_path: Path,
) -> None:
    path = lane_capacity.write_measured(tmp_path, "shape", "gpu", MEASURED)
    assert lane_capacity.read_measured(tmp_path, "shape", "gpu") == MEASURED
    assert lane_capacity.read_max_lanes(tmp_path, "shape", "gpu") is None
    assert lane_capacity.write_max_lanes(tmp_path, "shape", "gpu", 6, 12) == path
    assert lane_capacity.read_measured(tmp_path, "shape", "gpu") == MEASURED
    assert lane_capacity.read_max_lanes(tmp_path, "shape", "gpu") == 6
    lane_capacity.write_measured(tmp_path, "shape", "gpu", replace(MEASURED, lanes=2))
    assert lane_capacity.read_max_lanes(tmp_path, "shape", "gpu") == 6


def test_the_smaller_of_both_limits_counts(store: Store) -> None:
    five = [configuration(seed=seed, steps=4) for seed in range(5)]
    train(Script(leases(five)), store, lanes=8, is_measured=True, make_engine=MeasuredEngine)
    key = device_key(store)
    lane_capacity.write_measured(store.lane_capacity, five[0].group_key, key, MEASURED)
    lane_capacity.write_max_lanes(store.lane_capacity, five[0].group_key, key, 3, 6)
    source = Script(leases(configuration(seed=seed, steps=4) for seed in range(5, 15)))
    train(source, store, lanes=8, is_measured=True, make_engine=MeasuredEngine)
    assert max(map(len, source.held)) == 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, whose memory is measured")
def test_steps_on_a_gpu_are_measured(store: Store) -> None:
    def load(choice: object, task: object) -> object:
        base_model = tiny_base_model(configuration().model)
        return replace(base_model, model=base_model.model.cuda(), device=torch.device("cuda", 0))

    source = Script(leases(configuration(seed=seed, steps=12) for seed in range(10)))
    train(source, store, lanes=8, is_measured=True, load_base_model=load)
    (path,) = store.lane_capacity.glob("*.json")
    found = json.loads(path.read_text())["measured"]
    assert 0 < found["one_lane_bytes"] < found["two_lanes_bytes"] < GIB
    assert max(map(len, source.held)) == found["lanes"] == 8
