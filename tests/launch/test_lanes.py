"""The number of lanes per trainer: typed, the default of a CPU, or measured on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from points import configuration

from orchestrator.launch.lanes import LanePlan, choose_lanes, plan_lanes
from orchestrator.launch.work import StudyWork
from orchestrator.record import lane_capacity
from orchestrator.record.lane_capacity import MeasuredLanes
from orchestrator.record.store import Store
from orchestrator.study.configuration import BatchConfig, Configuration
from orchestrator.study.options import StudyOptions

H100 = "NVIDIA H100 80GB HBM3"
POINTS = [configuration(), configuration("hira")]
SIX = MeasuredLanes(lanes=6, fitting=7, one_lane_bytes=11 * 2**30, two_lanes_bytes=21 * 2**30, tokens=640)


def work(configurations: Sequence[Configuration]) -> StudyWork:
    """Return the work of a grid of which nothing is known yet."""
    return StudyWork(list(configurations), [], [], list(configurations), None, len(configurations))


@pytest.mark.parametrize(
    ("options", "gpus", "expected"),
    [
        (StudyOptions(), 0.0, (4, False)),
        (StudyOptions(), 1.0, (8, True)),
        (StudyOptions(), 0.5, (8, True)),
        (StudyOptions(device="cpu"), 1.0, (4, False)),
        (StudyOptions(lanes_per_trainer=3), 1.0, (3, False)),
        (StudyOptions(lanes_per_trainer=12), 0.0, (12, False)),
    ],
)
def test_trainers_measure_on_gpus_unless_the_number_is_typed(
    options: StudyOptions, gpus: float, expected: tuple[int, bool]
) -> None:
    assert choose_lanes(options, gpus, POINTS, num_per_trainer=20) == expected


@pytest.mark.parametrize(
    ("batches", "options", "expected"),
    [
        (BatchConfig(16, max_length=16), StudyOptions(), 8),
        (BatchConfig(16, 2, max_length=16), StudyOptions(), 8),
        (BatchConfig(16, max_length=17), StudyOptions(), 4),
        (BatchConfig(16, max_length=0), StudyOptions(), 4),
        (BatchConfig(16, max_length=16), StudyOptions(search="optuna"), 4),
        (BatchConfig(16, max_length=16), StudyOptions(scheduler="asha"), 4),
    ],
    ids=["short", "two micro-batches", "long", "images", "search", "early stopping"],
)
def test_a_grid_of_short_micro_batches_has_more_lanes_on_a_cpu(
    batches: BatchConfig, options: StudyOptions, expected: int
) -> None:
    points = [replace(POINTS[0], batches=BatchConfig(16, max_length=13)), replace(POINTS[1], batches=batches)]
    assert choose_lanes(options, 0.0, points, num_per_trainer=20) == (expected, False)


@pytest.mark.parametrize(("num_per_trainer", "expected"), [(3, 4), (6, 6), (9, 8)])
def test_no_trainer_on_a_cpu_takes_more_than_its_share(num_per_trainer: int, expected: int) -> None:
    points = [replace(point, batches=BatchConfig(16, max_length=13)) for point in POINTS]
    assert choose_lanes(StudyOptions(), 0.0, points, num_per_trainer) == (expected, False)


def test_a_plan_says_the_number_of_lanes_and_why(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def plan(gpus: float | None, device: str = H100, **options: int) -> tuple[int, str]:
        chosen = StudyOptions(**options)  # type: ignore[arg-type]
        found = plan_lanes(chosen, gpus, device, POINTS, store, work(POINTS), 2)
        return found.lanes, found.text

    assert plan(1.0, lanes_per_trainer=3) == (3, "3 lanes each (--lanes-per-trainer)")
    assert plan(0.0) == (4, "4 lanes each (the default of a CPU)")
    short = [replace(point, batches=BatchConfig(8, max_length=16)) for point in POINTS]
    text = "8 lanes each (the default of a CPU for short micro-batches)"
    assert plan_lanes(StudyOptions(), 0.0, "", short, store, work(9 * short), 2) == LanePlan(8, text)
    text = "5 lanes each (the default of a CPU for short micro-batches)"
    assert plan_lanes(StudyOptions(), 0.0, "", short, store, work(5 * short), 2) == LanePlan(5, text)
    assert plan_lanes(StudyOptions(), 0.0, "", short, store, work(9 * [*short, POINTS[0]]), 2).lanes == 4
    unknown = 4, "up to 8 lanes each: the first trainer measures how many fit into its GPU's memory"
    assert plan(0.5)[1].endswith("how many fit into 0.5 of its GPU's memory")
    assert plan(1.0) == plan(None) == unknown
    folder, place = store.lane_capacity, f"{H100}, 79 GiB"
    lane_capacity.write_measured(folder, "another group key", place, SIX)
    lane_capacity.write_measured(folder, POINTS[0].group_key, "NVIDIA A10G, 22 GiB", replace(SIX, lanes=2))
    assert plan(1.0) == unknown, "measured for other lanes, or on another GPU"
    lane_capacity.write_measured(folder, POINTS[0].group_key, place, SIX)
    reason = f"measured on {place}: one lane needs 11.0 GiB, two 21.0: 7 fit, 640 tokens per lane"
    assert plan(1.0) == (6, f"6 lanes each ({reason} and micro-batch)")
    lane_capacity.write_measured(folder, POINTS[1].group_key, place, replace(SIX, lanes=3, fitting=3))
    assert plan(1.0)[0] == 3
    assert plan(1.0)[1].startswith(f"3 to 6 lanes each (measured on {place}: one lane needs 11.0 GiB")
    assert plan(1.0, "")[0] == 2, "without the name of the GPU, the smallest number of all is expected"
    assert plan(1.0, lanes_per_trainer=3)[0] == 3
