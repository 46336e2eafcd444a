"""Time, hours and price in a plan, compared with calculations by hand, and the lanes of a trainer."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from points import configuration as small
from points import record, study_of

from orchestrator.execution import ray_cluster
from orchestrator.execution.settings import TrainerSettings
from orchestrator.finetune.models.catalogue import UNPREPARED
from orchestrator.launch import plan as plan_module
from orchestrator.launch.plan import CARDS, find_card, print_plan
from orchestrator.launch.run import choose_lanes
from orchestrator.record.schema import Cost, Provenance
from orchestrator.record.store import Store
from orchestrator.record.tables import write_parquet
from orchestrator.study.configuration import BatchConfig, Configuration, LRSchedule, ModelChoice
from orchestrator.study.options import Card, StudyOptions

A10G = "NVIDIA A10G"


def configuration(variant: str = "lora", **changes: Any) -> Configuration:
    """Return a configuration with a model that is not on this machine."""
    return replace(small(variant, **changes), model=ModelChoice("o/base", UNPREPARED))


HUNDRED = [configuration(seed=seed) for seed in range(100, 200)]
POINTS = [configuration(), configuration("hira")]
Plan = Callable[..., str]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def plan(store: Store, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """Return a function that returns the printed plan for a machine with two GPUs, or without (None)."""

    def said(gpu: str | None, left: Sequence[Configuration] = HUNDRED, **options: Any) -> str:
        machine = ray_cluster.Cluster((ray_cluster.Node(4, 0 if gpu is None else 2, 2.0**36),))
        monkeypatch.setattr(ray_cluster, "estimate_local_cluster", lambda: machine)
        monkeypatch.setattr(plan_module, "gpu_name", lambda: gpu or "")
        study = study_of(left, store, StudyOptions(**options), templates=tuple(left[:1]))
        print_plan(study)
        return study.console.export_text()

    monkeypatch.setattr(ray_cluster, "running_cluster_address", lambda: None)
    return said


def trained(
    store: Store, variant: str = "lora", device: str = A10G, seed: int = 0, seconds: float = 36.0
) -> None:
    """Store a finished lane of four steps, a sixth of whose time was spent in evaluations."""
    made = record(configuration(variant, seed=seed), "finished")
    cost = Cost(seconds * 5 / 6, seconds / 6)
    store.put(replace(made, evaluations=(), cost=cost, provenance=Provenance(device=device)))
    write_parquet(store)


def named(points: Sequence[Configuration], variant: str = "lora", model: str = "") -> list[Configuration]:
    """Return the points with another variant and another model."""
    changed = [replace(each, variant=replace(each.variant, name=variant)) for each in points]
    return [replace(each, model=ModelChoice(model, UNPREPARED)) for each in changed] if model else changed


def test_the_mean_of_finished_lanes_gives_time_hours_and_price(store: Store, plan: Plan) -> None:
    trained(store)
    trained(store, seed=1, seconds=48.0)
    trained(store, device="cpu", seed=2, seconds=1e6)
    said = plan(A10G, price_per_hour=2.0)
    # 100 lanes of 42 s take 4200 s; two trainers take half of it, and 25 s to start.
    assert (
        "Time            about 35 min 25 s with --trainers 2, from 2 lanes measured on NVIDIA A10G\n" in said
    )
    assert "GPU hours       about 1.2 on NVIDIA A10G\n" in said
    assert "Price           2.3 USD, at 2 USD for an hour of one GPU\n" in said
    assert "plan again" not in said
    longer = [replace(c, lr_schedule=LRSchedule(3 * c.lr_schedule.steps)) for c in HUNDRED]
    assert "GPU hours       about 3.5 on" in plan(A10G, longer)
    wide = [replace(c, batches=BatchConfig(2 * c.batches.batch_size)) for c in HUNDRED]
    assert "GPU hours       about 2.3 on" in plan(A10G, wide), "as many examples, as much time"
    assert "GPU hours       about 2.3 on" in plan(A10G, workers_per_trainer=2)
    assert "GPU hours       about 1.2 on NVIDIA A10G, less what early stopping saves\n" in plan(
        A10G, scheduler="asha"
    )
    assert "GPU hours       about 1.2 on NVIDIA A10G\n" in plan(None, plan=True, plan_gpu="A10G")


def test_what_was_not_measured_is_taken_as_the_mean_of_the_others(store: Store, plan: Plan) -> None:
    trained(store)
    trained(store, "pissa", seconds=72.0)
    said = plan(A10G, [*HUNDRED, *named(HUNDRED, "hira")])
    assert "from 2 lanes measured on NVIDIA A10G\n" in said
    assert "GPU hours       about 2.5 on NVIDIA A10G\n" in said, (
        "100 of 36 s and 100 of the mean of 36 and 72"
    )
    assert "GPU hours       unknown" in plan("NVIDIA L4", named(HUNDRED, model="an/unknown"))


def test_a_task_that_was_not_measured_is_named(store: Store, plan: Plan) -> None:
    trained(store, seconds=36.0)
    said = plan(A10G, [*HUNDRED, *(replace(c, task=replace(c.task, name="other")) for c in HUNDRED)])
    assert "GPU hours       about 1 on NVIDIA A10G\n" in said
    assert "from 1 lanes measured on NVIDIA A10G, without other (not measured)\n" in said


def test_an_unknown_time_is_reported_with_the_command_that_measures_it(store: Store, plan: Plan) -> None:
    trained(store, device="cpu")
    said = plan(A10G, [configuration(rate=1e-2), configuration(rate=3e-5)])
    assert "Time            unknown: no lane of this task and model has been trained on such a device" in said
    assert f"the same command with --only {configuration(rate=3e-5).fingerprint[:12]} in place of" in said


def test_hours_are_a_guess_between_two_shares_of_the_peak(plan: Plan) -> None:
    points = [replace(c, batches=BatchConfig(8, 2, max_length=512)) for c in named(HUNDRED, model="o/M-7B")]
    steps = points[0].lr_schedule.steps
    tokens = 100 * steps * 16 * 512
    said = plan(None, points, plan=True, plan_gpu="H100", price_per_hour=3.0)
    assert f"Tokens          at most {tokens:,}\n" in said
    assert f"FLOPs           at most {4 * 7e9 * tokens:.2g}, without evaluations\n" in said
    low, high = (4 * 7e9 * tokens / (share * 989e12) / 3600 for share in (0.4, 0.15))
    hours = f"{low:.2g} to {high:.2g} of one H100, at 40% to 15% of its peak of 989 TFLOP/s"
    assert f"GPU hours       a guess: {hours}\n" in said
    assert f"Price           {3 * low:.2g} to {3 * high:.2g} USD, at 3 USD for an hour of one GPU\n" in said
    whole = plan(A10G, named(points, "full", "o/M-7B"))
    assert f"FLOPs           at most {6 * 7e9 * tokens:.2g}," in whole, "the base model is trained"
    more = plan(A10G, points, gradient_checkpointing=True)
    assert f"FLOPs           at most {6 * 7e9 * tokens:.2g}," in more, "the forward pass is computed twice"
    assert "GPU hours       unknown: the model's size is not known" in plan(A10G, named(points, model="o/M"))
    assert "GPU hours" not in plan("A GPU", points), "its speed is not known"
    assert "GPU hours" not in plan(None, points)


@pytest.mark.parametrize(
    ("device", "card"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA A100-SXM4-40GB", "A100"), ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"), ("rtx 4090", "RTX 4090"), ("NVIDIA A10G MIG", None), ("NVIDIA A10", None),
    ],
)  # fmt: skip
def test_a_card_is_found_by_its_whole_name(device: str, card: str | None) -> None:
    assert find_card(device) == card


def test_each_card_of_the_option_has_a_speed() -> None:
    assert set(CARDS) == set(get_args(Card))


def test_a_plan_without_gpus_mentions_none(store: Store, plan: Plan) -> None:
    trained(store)
    said = plan(None, price_per_hour=2.0)
    assert not re.search("GPU|USD|plan again", said)
    assert "Time            unknown: no lane of this task and model has been trained on such a device" in said
    trained(store, device="cpu", seed=1)
    for gpu, options in ((None, {}), (A10G, {"device": "cpu"}), (A10G, {"gpus_per_worker": 0.0})):
        said = plan(gpu, **options)
        assert not re.search("GPU|USD", said)
        assert ", from 1 lanes measured on cpu\n" in said


def test_a_joined_cluster_is_assumed_to_have_the_gpus_of_the_records(
    store: Store, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_cluster, "running_cluster_address", lambda: "10.0.0.1:6379")
    trained(store, device="cpu", seed=1, seconds=1.0)
    assert "from 1 lanes measured on cpu\n" in plan(None)
    trained(store)
    said = plan(None)
    assert "Time            about 1 h divided by the number of trainers, from 1 lanes measured on" in said
    assert "GPU hours       about 1 on NVIDIA A10G\n" in said


def test_a_damaged_table_of_runs_is_no_measurement(store: Store, plan: Plan) -> None:
    trained(store)
    (store.root / "records.parquet").write_bytes(b"PAR1 no table")
    assert "Time            unknown" in plan(A10G)


def test_the_gpu_name_is_read_from_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path = tmp_path / "gpus"
    assert plan_module.gpu_name(tmp_path) == ""
    for slot in ("0", "1"):
        (tmp_path / slot).mkdir(parents=True)
        (tmp_path / slot / "information").write_text("Model: \t\t NVIDIA A10G\nIRQ:   \t\t 45\n")
    assert plan_module.gpu_name(tmp_path) == A10G
    for name in ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "MIG-GPU-8932f937-d72c/1/0")
            assert plan_module.gpu_name(tmp_path) == f"{A10G} MIG"
    slices = tmp_path.parent / "capabilities" / "gpu0" / "mig" / "gi1"
    slices.mkdir(parents=True)
    assert plan_module.gpu_name(tmp_path) == f"{A10G} MIG", "a slice that no variable names"
    slices.rmdir()
    (tmp_path / "1" / "information").write_text("Model: \t\t Tesla T4\n")
    assert plan_module.gpu_name(tmp_path) == "", "which of them, nobody knows"


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
    store: Store, options: StudyOptions, gpus: float, expected: tuple[int, bool]
) -> None:
    settings = TrainerSettings(options, 0, gpus, store.root, store.scratch)
    lanes = choose_lanes(study_of(20 * POINTS, store, options), 2, settings.uses_gpus)
    assert (lanes, settings.automatic_lanes) == expected


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
    store: Store, batches: BatchConfig, options: StudyOptions, expected: int
) -> None:
    points = [replace(POINTS[0], batches=BatchConfig(16, max_length=13)), replace(POINTS[1], batches=batches)]
    assert choose_lanes(study_of(20 * points, store, options), 2, False) == expected


@pytest.mark.parametrize(("num_per_trainer", "expected"), [(3, 4), (6, 6), (9, 8)])
def test_no_trainer_on_a_cpu_takes_more_than_its_share(
    store: Store, num_per_trainer: int, expected: int
) -> None:
    points = [replace(point, batches=BatchConfig(16, max_length=13)) for point in POINTS]
    assert choose_lanes(study_of(num_per_trainer * points, store), 2, False) == expected
