"""GPU hours and price in a plan, compared with calculations by hand."""

from __future__ import annotations

import re
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from points import STEPS, configuration, record
from rich.console import Console

from orchestrator.execution.ray import runtime
from orchestrator.finetune.models.catalogue import UNPREPARED
from orchestrator.launch import prices
from orchestrator.launch.cost import format_range
from orchestrator.launch.estimate import TRAINER_OVERHEAD, estimate_times
from orchestrator.launch.plan import print_plan
from orchestrator.launch.settled_records import SettledRecords
from orchestrator.launch.work import StudyWork
from orchestrator.record.schema import Cost, Provenance, StepMetrics
from orchestrator.record.store import Store
from orchestrator.study.configuration import BatchConfig, Configuration, LRSchedule, ModelChoice
from orchestrator.study.options import StudyOptions
from orchestrator.util.errors import UsageError

A10G = "NVIDIA A10G"
HUNDRED = [configuration(seed=seed) for seed in range(100, 200)]
Plan = Callable[..., str]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def plan(store: Store, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """Return a function that returns the printed plan for a machine with the GPU `gpu`.

    If `gpu` is None, the machine has no GPU. If `gpu` is empty, the name of the GPU is not known.
    """

    def said(gpu: str | None, left: Sequence[Configuration] = HUNDRED, **options: Any) -> str:
        gpus = 0 if gpu is None else 2
        machine = runtime.Cluster((runtime.Node(4, gpus, 2.0**36),))
        monkeypatch.setattr(runtime, "estimate_local_cluster", lambda: machine)
        monkeypatch.setattr(runtime, "gpu_name", lambda: gpu or "")
        console = Console(file=StringIO(), width=300)
        work = StudyWork(list(left), [], [], list(left), None)
        command = "python experiments/lr_sensitivity.py --plan --study 'my own'"
        print_plan(console, left[:1], work, store, StudyOptions(**options), command)
        return console.file.getvalue()  # type: ignore[attr-defined]

    monkeypatch.setattr(runtime, "running_cluster_address", lambda: None)
    return said


def trained(
    store: Store,
    variant: str = "lora",
    device: str = A10G,
    seed: int = 0,
    train: float = 30.0,
    lanes: int = 4,
    workers: int = 1,
) -> None:
    """Store a finished lane of four steps that took `train` seconds to train and 6 to score."""
    made = record(configuration(variant, seed=seed), "finished")
    provenance = Provenance(device=device, lane_group_size=lanes, workers=workers)
    store.put(replace(made, cost=Cost(train, 6.0), provenance=provenance))


def seconds(store: Store, *left: Configuration, lanes: int = 4, workers: int = 1) -> tuple[float, float]:
    """Return the estimated seconds per lane, without the trainer's overhead."""
    (estimate,) = estimate_times(left or HUNDRED, store, lanes, workers)
    return estimate.low_seconds / len(left or HUNDRED), estimate.high_seconds / TRAINER_OVERHEAD / len(
        left or HUNDRED
    )


@pytest.mark.parametrize("reader", ["estimate", "design"])
def test_a_plan_holds_no_curves_of_the_records_that_it_reads(store: Store, reader: str) -> None:
    curve = tuple(StepMetrics(step, 0.1, 0.1, 0.1) for step in range(1000))
    names = []
    for seed in range(10):
        made = replace(record(configuration(seed=seed), "finished"), curve=curve)
        store.put(made)
        names.append(made.fingerprint)

    def peak(number: int) -> int:
        """Return the peak of the memory while `number` records are read."""
        tracemalloc.start()
        if reader == "estimate":
            some = Store(store.root)
            some.states = lambda: dict.fromkeys(names[:number], "finished")  # type: ignore[method-assign]
            estimate_times(HUNDRED, some, 4, 1)
        else:
            list(map(SettledRecords(store, "none").get, names[:number]))
        high = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return high

    peak(1)  # imports
    assert peak(10) < 2.5 * peak(1)


def test_hours_and_price_of_configurations_like_those_measured(store: Store, plan: Plan) -> None:
    trained(store)
    trained(store, seed=1, train=42.0)  # On average, the two lanes take 36 s to train and 6 s to score.
    trained(store, device="cpu", seed=2, train=1e6)
    said = plan(A10G)
    # 100 lanes of 42 s take 4200 s to 5250 s, a quarter more. Two trainers take half of this time, and 25 s
    # to start. The 1.17 to 1.46 GPU hours cost 0.45 to 1.006 USD each.
    assert (
        "Time            about 35 min 25 s to 44 min 10 s, on NVIDIA A10G, from 2 lanes trained there\n"
        in said
    )
    assert "GPU hours       about 1.2 to 1.5 on NVIDIA A10G\n" in said
    rate = "0.45 (spot) to 1.01 (on demand) USD a GPU hour, g5.xlarge, AWS us-east-1 in 2026-06"
    assert f"Price           about 0.53 to 1.5 USD, at {rate}; check before you spend\n" in said
    assert "trains one" not in said


def test_a_given_price_overrides_the_table(store: Store, plan: Plan) -> None:
    trained(store, train=3594.0)  # The lane takes an hour with its evaluations.
    said = plan(A10G, price_per_gpu_hour="2:3.5")
    assert "Price           about 200 to 440 USD, at 2 to 3.5 USD a GPU hour, as given\n" in said
    said = plan(A10G, price_per_gpu_hour="2", scheduler="asha")
    assert "GPU hours       about 100 to 120 on NVIDIA A10G, less what early stopping saves\n" in said
    assert "Price           about 200 to 250 USD, at 2 USD a GPU hour, as given\n" in said


def test_another_lane_group_size_makes_a_range_from_no_cost_to_proportional_cost(store: Store) -> None:
    trained(store, lanes=1)
    assert seconds(store) == pytest.approx((36 / 4, 36))
    assert seconds(store, lanes=1) == pytest.approx((36, 36))
    assert seconds(store, HUNDRED[0], HUNDRED[1], lanes=4) == pytest.approx((36 / 2, 36)), (
        "two do not fill a group of four"
    )
    whole = replace(HUNDRED[0], variant=replace(HUNDRED[0].variant, name="full"))
    assert seconds(store, whole, whole) == pytest.approx((36, 36)), "it never shares a lane group"


def test_time_scales_with_steps_and_evaluations_and_another_batch_makes_a_range(store: Store) -> None:
    trained(store)
    longer = [replace(c, lr_schedule=LRSchedule(3 * STEPS)) for c in HUNDRED]
    assert seconds(store, *longer) == pytest.approx((96, 96)), "three times the steps, scored as often"
    seldom = [replace(c, evaluations=1) for c in HUNDRED]
    assert seconds(store, *seldom) == pytest.approx((30 + 6 * 2 / 5,) * 2), "one validation, not 4"
    tested = [replace(c, test_evaluations="every") for c in HUNDRED]
    assert seconds(store, *tested) == pytest.approx((30 + 6 * 8 / 5,) * 2), "four tests, not one"
    wide = [replace(c, batches=BatchConfig(16)) for c in HUNDRED]
    assert seconds(store, *wide) == pytest.approx((36, 66))
    parts = [replace(c, batches=BatchConfig(4, 2)) for c in HUNDRED]
    assert seconds(store, *parts) == pytest.approx((36, 66)), "two passes may take twice as long"


def test_workers_and_shares_of_a_gpu_make_a_range(store: Store, plan: Plan) -> None:
    trained(store)
    assert seconds(store, workers=2) == pytest.approx((18, 36))
    assert "GPU hours       about 1 to 2.5 on" in plan(A10G, workers_per_trainer=2)
    assert "GPU hours       about 0.5 to 1.2 on" in plan(A10G, gpus_per_worker=0.5)


def test_a_variant_that_was_not_measured_lies_between_the_others_and_is_named(
    store: Store, plan: Plan
) -> None:
    trained(store)
    trained(store, "pissa", train=66.0)
    hira = [replace(c, variant=replace(c.variant, name="hira")) for c in HUNDRED]
    assert seconds(store, *hira) == pytest.approx((36, 72))
    said = plan(A10G, [*HUNDRED, *hira])
    assert "from 2 lanes trained there, none of hira (taken as the others)\n" in said
    assert "GPU hours       about 2 to 3.8 on NVIDIA A10G\n" in said


def test_an_unknown_time_is_reported_with_the_command_that_measures_it(store: Store, plan: Plan) -> None:
    trained(store, device="cpu")
    trained(store, device="NVIDIA L4", seed=1)
    high, low = configuration(rate=1e-2), configuration(rate=3e-5)
    said = plan(A10G, [high, low])
    assert "Time            unknown: no lane of this task and model has been trained on such a device" in said
    assert "GPU hours       unknown\n" in said
    assert "Price           0.45 (spot) to 1.01 (on demand) USD a GPU hour, g5.xlarge" in said
    command = "experiments/lr_sensitivity.py --variants lora --learning-rates 3e-05 --seeds 1"
    assert said.endswith(f"train one of them, then plan again:\n  python {command}\n")


def bfloat16(points: Sequence[Configuration]) -> list[Configuration]:
    """Return the points with the default study's model, whose files are not on this machine."""
    model = ModelChoice("Qwen/Qwen3-0.6B-Base", UNPREPARED, "bfloat16")
    return [replace(point, model=model) for point in points]


def test_hours_are_predicted_and_marked_until_a_lane_was_measured(store: Store, plan: Plan) -> None:
    points = bfloat16(HUNDRED)
    for gpu, name, options in (
        (None, "H100", {}),
        (None, "A10G", {"plan": True, "plan_gpu": "A10G"}),
        (A10G, "A10G", {}),
        (A10G, "L40S", {"plan": True, "plan_gpu": "L40S"}),
        ("", "H100", {}),
    ):
        said = plan(gpu, points, **options)
        assert re.search(
            rf"^GPU hours       predicted: \S+ to \S+ on one {name}, .* --kernels liger$", said, re.M
        )
        assert re.search(r"^Prediction .* tokens on average; nothing was measured", said, re.M)
        assert re.search(r"^Price           predicted: ", said, re.M)
        assert "about" not in said, "as an estimate from measurements is"
    for seed, device in enumerate(("cpu", A10G)):
        made = record(bfloat16([configuration(seed=seed)])[0], "finished")
        store.put(
            replace(made, cost=Cost(30.0, 6.0), provenance=Provenance(device=device, lane_group_size=4))
        )
    assert "predicted" in plan(None, points), "a CPU's time says nothing about a GPU"
    for gpu, options in ((A10G, {}), (None, {"plan": True, "plan_gpu": "A10G"})):
        said = plan(gpu, points, lanes_per_trainer=4, **options)  # as many as the measured lane had
        assert "predicted" not in said
        assert "GPU hours       about 1 to 1.2 on NVIDIA A10G\n" in said
    assert "predicted" in plan("NVIDIA L4", points), "another GPU was measured"


def test_a_prediction_names_what_it_leaves_out(plan: Plan) -> None:
    points = bfloat16(HUNDRED)
    vera = [replace(point, variant=replace(point.variant, name="vera")) for point in points]
    said = plan(None, [*points, *vera])
    part = "for 100 of 200 configurations, without vera"
    assert re.search(rf"^GPU hours .* on one H100, .* with --kernels liger {part}$", said, re.M)
    assert re.search(rf"^Price  .* USD {part}, at ", said, re.M)
    assert "; does not include vera: its kernels have not been counted; --plan-gpu" in said
    early = plan(None, points, scheduler="asha")
    assert re.search("^GPU hours .* with --kernels liger, less what early stopping saves$", early, re.M)
    (hours,) = (line for line in plan(None, points).splitlines() if line.startswith("GPU hours"))
    assert hours in said
    for unpredicted in (vera, HUNDRED):  # the second is in float32
        assert "predicted" not in plan(None, unpredicted)
    assert "GPU hours       unknown\n" in plan("Tesla T4", points), "a GPU without bfloat16"
    assert "GPU hours       unknown\n" in plan(f"{A10G} MIG", points), "a slice is not its card"


def test_a_plan_says_why_nothing_is_predicted(plan: Plan) -> None:
    points = bfloat16(HUNDRED)
    vera = [replace(point, variant=replace(point.variant, name="vera")) for point in points]
    unknown = [replace(point, model=replace(point.model, name="an/unknown-model")) for point in points]
    for gpu, left, reason in (
        (None, vera, "steps of vera have not been counted"),
        (A10G, vera, "steps of vera have not been counted"),
        (A10G, HUNDRED, f"{HUNDRED[0].model.name} is in float32, and only steps in bfloat16 were counted"),
        (None, unknown, "the sizes of an/unknown-model are unknown until it is here"),
        ("Tesla T4", points, "a T4 has no bfloat16"),
        ("NVIDIA B200", points, "the table of GPUs has no NVIDIA B200"),
    ):
        said = plan(gpu, left)
        assert f"Prediction      none: {reason}\n" in said, said
        assert "predicted: " not in said


def test_a_plan_of_cpus_has_no_gpu_hours(plan: Plan) -> None:
    points = bfloat16(HUNDRED)
    for options in ({"device": "cpu"}, {"gpus_per_worker": 0.0}):
        assert "GPU hours" not in plan(A10G, points, **options)


def test_a_gpu_that_is_not_in_the_table_is_refused(plan: Plan) -> None:
    assert "on one L4," in plan(None, bfloat16(HUNDRED), plan=True, plan_gpu="l4")
    with pytest.raises(UsageError, match=r"'A100' is not in the table of GPUs\. Did you mean 'A100-[48]0G'"):
        plan(None, plan=True, plan_gpu="A100")
    for options, typed in (
        ({"device": "cpu"}, "--device cpu"),
        ({"gpus_per_worker": 0.0}, "--gpus-per-worker 0"),
    ):
        with pytest.raises(UsageError, match=f"--plan-gpu 'H100' with {typed}: take one of the two away"):
            StudyOptions(plan=True, plan_gpu="H100", **options)  # type: ignore[arg-type]
    with pytest.raises(
        UsageError, match=r"--plan-gpu 'H10' is not in the table of GPUs\. Did you mean 'H100'"
    ):
        plan(None, plan=True, plan_gpu="H10")
    with pytest.raises(UsageError, match="--plan-gpu 'H100': it changes the plan only; add --plan"):
        StudyOptions(plan_gpu="H100")


def test_a_shared_gpu_is_planned_as_such(plan: Plan) -> None:
    said = plan(None, plan=True, plan_gpu="H100", gpus_per_worker=0.5)
    assert "Trainers        as many as have room on GPUs of type H100, up to 2 share one GPU\n" in said
    assert "measures how many fit into 0.5 of its GPU's memory\n" in said


def test_a_plan_without_gpus_mentions_none(store: Store, plan: Plan) -> None:
    trained(store)
    said = plan(None, price_per_gpu_hour="2")
    assert not re.search("GPU|USD|plan again", said)
    assert "Time            unknown: no lane of this task and model has been trained on such a device" in said
    trained(store, device="cpu", seed=1)
    for gpu, options in ((None, {}), (A10G, {"device": "cpu"}), (A10G, {"gpus_per_worker": 0.0})):
        said = plan(gpu, **options)
        assert not re.search("GPU|USD", said)
        assert ", on cpu, from 1 lanes trained there\n" in said


def test_a_joined_cluster_is_assumed_to_have_the_gpus_of_the_records_or_options(
    store: Store, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "running_cluster_address", lambda: "10.0.0.1:6379")
    assert "GPU hours       say --gpus-per-worker 1 if that cluster has GPUs" in plan(None)
    assert "Driver's node" not in plan(None)
    said = plan(None, gpus_per_worker=1.0, trainers=64)
    assert "Driver's node   32 GiB of memory for Ray, for this number of trainers\n" in said
    assert "GPU hours       unknown\n" in said
    assert "Price           0.21 (T4, spot) to 7.91 (H200, on demand) USD a GPU hour, AWS us-east-1" in said
    trained(store)
    trained(store, device="NVIDIA H100 80GB HBM3", seed=1, train=3.0)
    said = plan(None)
    time = "about 1 h to 1 h 15 min divided by the number of trainers, on NVIDIA A10G, from 1 lanes"
    assert f"Time            {time}" in said
    assert "GPU hours       about 1 to 1.2 on NVIDIA A10G\n" in said
    assert "GPU hours       about 0.25 to 0.31 on NVIDIA H100 80GB HBM3\n" in said
    assert "USD a GPU hour, p5.48xlarge of 8 GPUs, paid whole, AWS" in said


def test_a_gpu_without_a_price_asks_for_one(store: Store, plan: Plan) -> None:
    trained(store, device="NVIDIA GeForce RTX 4090")
    said = plan("NVIDIA GeForce RTX 4090")
    wanted = "the table has no NVIDIA GeForce RTX 4090; say --price-per-gpu-hour LOW:HIGH"
    assert f"Price           unknown: {wanted}\n" in said


def test_the_table_is_dated_and_every_name_has_one_price() -> None:
    names = [name for each in prices.load_prices() for name in (each.gpu, *each.names)]
    assert len(names) == len(set(names))
    for each in prices.load_prices():
        assert 0 < each.spot < each.on_demand
        assert re.fullmatch(r"20\d\d-[01]\d", each.date)
    assert [prices.find_price(n).gpu for n in ("Tesla T4", "A100-80G")] == ["T4", "A100-80G"]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("cheap", "'cheap' is not a number"),
        ("", "'' is not a number"),
        ("0", "'0' must be a finite number above 0"),
        ("1:inf", "'inf' must be a finite number above 0"),
        ("3:1", "'3:1' is reversed; did you mean 1:3?"),
        ("1:2:3", "'1:2:3' must be LOW:HIGH or one number"),
    ],
)
def test_a_wrong_price_is_a_one_line_error(typed: str, said: str) -> None:
    with pytest.raises(UsageError) as error:
        StudyOptions(price_per_gpu_hour=typed)
    assert str(error.value).startswith(f"--price-per-gpu-hour: {said}")
    assert "\n" not in str(error.value)


def test_the_gpu_name_is_read_from_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path = tmp_path / "gpus"
    assert runtime.gpu_name(tmp_path) == ""
    for slot in ("0", "1"):
        (tmp_path / slot).mkdir(parents=True)
        (tmp_path / slot / "information").write_text("Model: \t\t NVIDIA A10G\nIRQ:   \t\t 45\n")
    assert runtime.gpu_name(tmp_path) == A10G
    for name in ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "MIG-GPU-8932f937-d72c/1/0")
            assert runtime.gpu_name(tmp_path) == f"{A10G} MIG"
    slices = tmp_path.parent / "capabilities" / "gpu0" / "mig" / "gi1"
    slices.mkdir(parents=True)
    assert runtime.gpu_name(tmp_path) == f"{A10G} MIG", "a slice that no variable names"
    slices.rmdir()
    (tmp_path / "1" / "information").write_text("Model: \t\t Tesla T4\n")
    assert runtime.gpu_name(tmp_path) == "", "which of them, nobody knows"


def test_a_range_has_two_significant_digits() -> None:
    assert [format_range(0.0123, 0.0123), format_range(1234, 56789)] == ["0.012", "1200 to 57000"]
