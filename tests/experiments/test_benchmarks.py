"""Every benchmark of speed runs at tiny size, and what they count is right. No test asserts on a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import filling
import gpu
import lanes as lanes_benchmark
import makespan
import meta_step
import overhead
import process_times
import psutil
import pytest
import step
import torch
from alternatives_peft import FineTune, Run, Study
from scripted import configuration, tiny_base_model
from synthetic_task import StepSize, draw_rows
from tensor_counts import TensorCounter

from orchestrator.finetune.data.batches import encode_examples, shuffled_indices
from orchestrator.finetune.tasks import catalogue as tasks
from orchestrator.finetune.tasks.local.letters import tokenizer
from orchestrator.record.store import Store
from orchestrator.study.configuration import ModelChoice
from variants import catalogue
from variants.taxonomy import read_methods

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "experiments" / "benchmarks"
CPU = torch.device("cpu")
NOT_ON_A_BARE_MACHINE = (
    "ray",
    "mlflow",
    "datasets",
    "optuna",
    "tyro",
    "pandas",
    "math_verify",
    "matplotlib",
    "pyarrow",
)


def count_product(rows: int) -> TensorCounter:
    """Count x @ w and a sum in float32, forward and backward, for w of (8, 4)."""
    x, w = torch.ones(rows, 8), torch.ones(8, 4, requires_grad=True)
    with TensorCounter("cpu", [x, w]) as counter:
        (x @ w).sum().backward()
    return counter


def test_products_and_their_bytes_are_counted() -> None:
    counts = count_product(16).counts
    # Forward: the product and the sum. Backward: the ones, the expanded gradient (a view), w's gradient.
    assert counts.by_operator["mm"] == 2
    assert counts.gemm_flops == 2 * (2 * 16 * 8 * 4)
    assert counts.launches == 4
    assert counts.peak_bytes > 4 * (16 * 8 + 8 * 4)


def test_freed_tensors_are_not_live() -> None:
    with TensorCounter("cpu") as counter:
        kept = torch.zeros(100)
        for _ in range(10):
            torch.zeros(1000)
    assert counter.live_bytes == kept.nbytes
    assert counter.counts.peak_bytes == kept.nbytes + 4000


def test_drawn_rows_have_the_lengths_of_metamathqa() -> None:
    rows = draw_rows(1000, 2000)
    lengths = [len(row.ids) for row in rows]
    assert 240 < sum(lengths) / len(lengths) < 260
    assert max(lengths) == 511


@pytest.fixture(scope="module")
def counted() -> dict[tuple[int, bool], dict[str, Any]]:
    """Return the counts of a step of one or two lanes, with and without fused operators."""
    size = StepSize(2, 2, 32)
    return {
        (lanes, fused): meta_step.count_step("tiny", "lora", lanes, fused, size)
        for lanes in (1, 2)
        for fused in (False, True)
    }


def test_fused_operators_have_fewer_launches_and_move_less(counted: dict[Any, dict[str, Any]]) -> None:
    for lanes in (1, 2):
        plain, fused = counted[lanes, False], counted[lanes, True]
        assert fused["launches"] < plain["launches"]
        assert fused["gigabytes"] < plain["gigabytes"]
        assert fused["peak_gib"] < plain["peak_gib"]
        assert fused["gemm_teraflops"] == plain["gemm_teraflops"]


def test_two_lanes_share_launches(counted: dict[Any, dict[str, Any]]) -> None:
    one, two = counted[1, False], counted[2, False]
    assert two["lanes"] == 2
    assert one["gigabytes"] < two["gigabytes"]


@pytest.mark.slow  # a process that imports torch and transformers
def test_another_tree_counts_the_same_if_it_is_the_same(counted: dict[Any, dict[str, Any]]) -> None:
    arguments = ["--models=tiny", "--variants=lora", "--lanes=1", "--rows=2", "--accumulation=2"]
    rows = meta_step.run_in_tree(ROOT, [*arguments, "--max-length=32"])
    assert rows[0] == json.loads(json.dumps(counted[1, False]))
    assert meta_step.format_table(rows).splitlines()[2].startswith(f"| {rows[0]['commit'][:8]} | tiny | lora")


def test_every_variant_of_the_survey_that_peft_has_is_compared() -> None:
    evaluated = {method.variant for method in read_methods() if method.evaluated}
    with_method = {name for name in evaluated if vars(type(catalogue.get(name))).get("peft")}
    assert len(with_method) > 6
    assert with_method <= step.PEFT_CONFIGS.keys()


@pytest.mark.parametrize(
    "variant",
    [name if name == "lora" else pytest.param(name, marks=pytest.mark.slow) for name in step.PEFT_CONFIGS],
)
def test_a_step_of_ours_and_of_peft_has_the_same_loss(variant: str) -> None:
    row = step.measure(variant, "tiny", step.CASES["tiny"], CPU, rounds=1)
    ours, peft = row["losses"]
    assert ours == pytest.approx(peft, rel=0.01)  # after steps of 1e-4 from the same function
    assert min(*row["kept_mib"], *row["peak_mib"]) > 0
    assert step.format_table([row]).count(f"| tiny | {variant} |") == 1


def test_lanes_are_compared_with_one() -> None:
    rows = [row for name in ("lora", "full") for row in lanes_benchmark.measure(name, "tiny", [1, 2], CPU, 1)]
    assert [(row["variant"], row["lanes"]) for row in rows] == [("lora", 1), ("lora", 2), ("full", 1)]
    assert rows[0]["throughput"].median == 1
    assert len(lanes_benchmark.format_table(rows).splitlines()) == 4


@pytest.mark.parametrize(("trainers", "open_trials"), [(1, 9), (1, 5), (8, 40)])
def test_the_broker_fills_the_lane_groups_of_the_default_study(trainers: int, open_trials: int) -> None:
    by_size, hours = filling.simulate(filling.default_study(4), trainers, 4, open_trials)
    total = sum(by_size.values())
    assert total == pytest.approx(165 * filling.STEPS)
    assert by_size[4] > 0.85 * total
    assert hours < 1.15 * total * filling.SECONDS_PER_LANE_STEP[-1] / trainers / 3600


def run_gpu_benchmark(folder: Path, *options: str) -> tuple[int, list[dict[str, Any]]]:
    """Run gpu.py at tiny size; modules in `folder` come first. Return the exit code and the rows."""
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), *options, "--device=cpu", "--tiny"]
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [*command, "--out", str(folder / "gpu.json")], env=environment, capture_output=True, text=True
    )
    assert "Traceback" not in done.stderr, done.stderr
    rows = json.loads((folder / "gpu.json").read_text())["rows"]
    assert rows == [json.loads(line) for line in done.stdout.splitlines()]
    return done.returncode, [row for row in rows if "predicted" not in row]


@pytest.mark.slow  # nine processes, each of which imports torch and transformers
def test_the_gpu_benchmark_runs_with_torch_transformers_and_peft_alone(tmp_path: Path) -> None:
    for name in NOT_ON_A_BARE_MACHINE:
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError('no {name} here')\n")
    code, rows = run_gpu_benchmark(tmp_path, *["--variants", "lora", "--lanes", "1", "2", "--steps", "2"])
    assert code == 0, rows
    assert {row["section"] for row in rows} == {
        "machine", "ceilings", "svd", "noise", "train", "step", "generate", "scoring", "oom"
    }  # fmt: skip
    noise = next(row for row in rows if "again" in row)
    assert noise["again"] == 0  # on a CPU a lane's numbers are the same every time
    assert noise["in_company"] == 0


@pytest.mark.slow  # six processes
def test_a_section_that_fails_or_dies_costs_no_other_section(tmp_path: Path) -> None:
    crash = "import os, sys\nif {'train', '--here'} <= {*sys.orig_argv}:\n    os._exit(7)\n"
    (tmp_path / "sitecustomize.py").write_text(crash)  # Python imports it when it starts
    code, (machine, train, svd) = run_gpu_benchmark(tmp_path, "train", "svd")
    assert code == 1
    assert machine["model"] == "tiny"
    assert train == {"section": "train", "error": "the process ended with code 7"}
    assert svd["ms"] > 0
    (tmp_path / "sitecustomize.py").unlink()
    code, (_, train, svd) = run_gpu_benchmark(tmp_path, "train", "svd", "--variants", "unknown")
    assert code == 1
    assert train["error"].startswith("ValueError: no variant 'unknown'")
    assert svd["ms"] > 0


@pytest.mark.slow  # processes that import torch and transformers
def test_a_librarys_message_in_json_is_no_measurement(tmp_path: Path) -> None:
    """The messages: a number, a list, and an object without a section."""
    say = "import sys\nif {'svd', '--here'} <= {*sys.orig_argv}:\n    print('3\\n[1]\\n{\"level\": 2}')\n"
    (tmp_path / "sitecustomize.py").write_text(say)
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "svd", "--tiny", "--device", "cpu"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "gpu.json")],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert {"3", "[1]", '{"level": 2}'} <= {*done.stdout.splitlines()}
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert {row["section"] for row in rows} == {"machine", "svd"}


def test_an_error_leaves_no_process_of_a_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    before = psutil.Process().children()
    output = gpu.Output(tmp_path / "no folder" / "gpu.json")
    with pytest.raises(FileNotFoundError):
        gpu.run_section("train", ["--tiny", "--device", "cpu"], time.monotonic() + 60, output)
    assert psutil.Process().children() == before


def test_sections_without_time_are_reported_as_not_run(tmp_path: Path) -> None:
    code, rows = run_gpu_benchmark(tmp_path, "svd", "--minutes", "0")
    assert code == 1
    assert rows[-1] == {"section": "svd", "error": "not run: no time left (--minutes)"}


def test_the_overhead_of_a_loop_is_what_its_records_do_not_spend(tmp_path: Path) -> None:
    store = Store(tmp_path)
    rows = [configuration(seed=seed, steps=4) for seed in range(3)]
    overhead.train_runs(store, rows, 2, tiny_base_model)
    found = overhead.summarize("tiny", list(store.records()))
    assert found["runs"] == 3
    assert 0 < found["warm_share"] < 1
    costs = [record.cost for record in store.records()]
    assert found["train_seconds"] == pytest.approx(sum(cost.train_seconds for cost in costs))
    assert len(overhead.format_table([found]).splitlines()) == 3


def peft_study(runs: list[Run]) -> Study:
    """Return a study on the tiny model: it has the vocabulary and the row length of `letters`."""
    task = tasks.get("letters")
    rows = {
        split: makespan._as_pairs(encode_examples(task.examples(split, 32), task, tokenizer()))
        for split in ("train", "validation", "test")
    }
    return Study("unused", rows, runs, steps=6, evaluations=3, batch_size=8)


@pytest.mark.parametrize("variant", makespan.STUDIES["small"].variants)
def test_the_hand_written_loop_trains_and_keeps_its_base(variant: str) -> None:
    base = tiny_base_model(ModelChoice("tiny", "0" * 64)).model
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    study = peft_study([Run(variant, 1e-2, 0)])
    fine_tune = FineTune(study, base, study.runs[0])
    untrained = fine_tune.score("validation")["loss"]
    scores = fine_tune.train()
    assert fine_tune.step == 6
    assert scores.keys() == {"validation loss", "validation exact_match", "test loss", "test exact_match"}
    assert scores["validation loss"] < untrained
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


def test_the_hand_written_loop_takes_the_rows_of_the_lane() -> None:
    study = peft_study([])
    lane_rows = shuffled_indices(3, 32, 5 * 8, 8)
    assert study.batch_rows(3, 5) == lane_rows


def test_a_table_of_rounds_pairs_the_sides() -> None:
    scores = {"lora 0.01 0": {"test exact_match": 0.95}}
    rows = [
        {"study": "small", "side": side, "round": number, "seconds": s, "total": s, "scores": scores}
        for number, times in enumerate([(10.0, 20.0), (30.0, 40.0), (50.0, 200.0)])
        for side, s in zip(("ours", "actors"), times, strict=True)
    ]
    lines = makespan.format_table(rows).splitlines()
    assert lines[3] == "| small | actors | 3 | 40 (30-120) | 0.5 (0.375-0.625) | +0.000 (3 runs) |"


@pytest.mark.ray
@pytest.mark.nightly
def test_all_sides_train_all_runs(tmp_path: Path) -> None:
    arguments = ["--studies", "tiny", "--sides", *makespan.SIDES, "--work", str(tmp_path / "work")]
    command = [sys.executable, str(BENCHMARKS / "makespan.py"), *arguments, "--out", str(tmp_path / "out")]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "out").read_text())
    assert {row["side"] for row in rows} == set(makespan.SIDES)
    assert all(len(row["scores"]) == 2 for row in rows)


def test_the_cpu_time_of_a_command_is_counted_by_role() -> None:
    """A driver computes for a second of CPU time and waits for a module that it starts."""
    program = """
import subprocess, sys, time
while time.process_time() < 1:
    pass
subprocess.run([sys.executable, "-m", "timeit", "-n", "1", "sum(range(10**7))"])
"""
    _, _, times = process_times.measure([sys.executable, "-c", program], interval=0.01)
    by_role = {one.role: one for one in times}
    assert set(by_role) == {"driver", "timeit"}
    assert by_role["driver"].cpu_seconds >= 0.9
    assert by_role["timeit"].started > by_role["driver"].started


@pytest.mark.parametrize(("end", "code"), [("sys.exit(5)", 5), ("os.kill(os.getpid(), 9)", 137)])
def test_the_table_of_a_command_that_fails_is_printed(end: str, code: int) -> None:
    script, program = str(BENCHMARKS / "process_times.py"), f"import os, sys\nsum(range(10**7))\n{end}"
    done = subprocess.run(
        [sys.executable, script, "--interval", "0.05", sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code
    assert "| driver |" in done.stdout


@pytest.mark.parametrize(
    ("command_line", "role"),
    [
        (["ray::RayTrainWorker.execute()"], "RayTrainWorker"),
        (["/x/python", "-u", "/x/ray/dashboard/agent.py", "--node"], "dashboard"),
        (["/x/raylet/raylet", "--raylet_socket_name=a"], "raylet"),
        (["/x/python", "-m", "orchestrator.execution.ray", "1"], "orchestrator.execution.ray"),
        (["python3", "some/script.py", "--x"], "script.py"),
        (["sleep", "1"], "sleep"),
    ],
)
def test_the_role_of_a_process_follows_from_its_command(command_line: list[str], role: str) -> None:
    assert process_times.role_of(command_line, Path(command_line[0]).name) == role
