"""Every benchmark runs at its smallest size, and what it counts is right. No test asserts on a time."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import early_stopping
import lanes as lanes_benchmark
import makespan
import pytest
import step
import torch
from alternatives import FineTune, Run, Study, make_trainable
from scripted import tiny_base_model
from synthetic import study as synthetic_study
from synthetic_task import draw_rows

from orchestrator.finetune.data.batches import encode_examples, shuffled_indices
from orchestrator.finetune.tasks import catalogue as tasks
from orchestrator.finetune.tasks.letters import tokenizer
from orchestrator.record.store import Store
from orchestrator.record.study_file import StudyFile
from orchestrator.study.configuration import ModelChoice
from variants import catalogue
from variants.describe import read_methods

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "experiments" / "benchmarks"
CPU = torch.device("cpu")
NOT_ON_A_BARE_MACHINE = (
    *("ray", "mlflow", "datasets", "optuna", "pandas", "math_verify", "matplotlib", "pyarrow"),
)
SMALLEST = {
    "coverage.py": "--replicates 2 --processes 1 --rows factors claims ratios replacement",
    "gpu.py": "--tiny --device cpu --variants lora --lanes 1 --steps 1",
    "lanes.py": "--cases tiny --variants lora --lanes 1 2 --rounds 1",
    "step.py": "--cases tiny --variants lora --rounds 1",
}
"""Script -> the arguments of its smallest run, in this process."""
PARTS = ("alternatives.py", "early_stopping.py", "makespan.py", "scale.py")
"""Scripts that start Ray or pretrain a model: a `ray` test runs scale.py, tests below run parts of the
others, and a nightly test runs all of makespan.py."""


def test_every_script_has_a_run() -> None:
    scripts = {f.name for f in BENCHMARKS.glob("*.py") if 'if __name__ == "__main__"' in f.read_text()}
    assert scripts == {*SMALLEST, *PARTS}


@pytest.mark.slow
@pytest.mark.parametrize("script", SMALLEST)
def test_a_script_prints_its_table(
    script: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [script, *SMALLEST[script].split()])
    code: object = None
    try:
        runpy.run_path(str(BENCHMARKS / script), run_name="__main__")
    except SystemExit as end:
        code = end.code
    allowed = {None, 0, 1} if script == "coverage.py" else {None, 0}  # a few synthetic studies meet no limit
    assert code in allowed, capfd.readouterr().err
    assert "\n" in capfd.readouterr().out


# --- steps and lanes


def test_live_tensors_and_their_peak_are_counted() -> None:
    x, w = torch.ones(16, 8), torch.ones(8, 4, requires_grad=True)
    with step.LiveTensors([x, w]) as live:
        before = live.now
        (x @ w).sum().backward()
    assert live.peak > before == 4 * (16 * 8 + 8 * 4)
    with step.LiveTensors() as live:
        kept = torch.zeros(100)
        for _ in range(10):
            torch.zeros(1000)
    assert (live.now, live.peak) == (kept.nbytes, kept.nbytes + 4000)


def test_drawn_rows_have_the_lengths_of_metamathqa() -> None:
    rows = draw_rows(1000, 2000)
    lengths = [len(row.ids) for row in rows]
    assert 240 < sum(lengths) / len(lengths) < 260
    assert max(lengths) == 511


def test_every_variant_of_the_survey_that_peft_has_is_compared() -> None:
    evaluated = {method["variant"] for method in read_methods() if method["evaluated"]}
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


def test_lanes_are_compared_with_one() -> None:
    rows = [row for name in ("lora", "full") for row in lanes_benchmark.measure(name, "tiny", [1, 2], CPU, 1)]
    assert [(row["variant"], row["lanes"]) for row in rows] == [("lora", 1), ("lora", 2), ("full", 1)]
    assert rows[0]["throughput"].median == 1
    assert len(lanes_benchmark.format_table(rows).splitlines()) == 4


@pytest.mark.slow  # a process that imports torch and transformers
def test_the_gpu_benchmark_runs_with_torch_transformers_and_peft_alone(tmp_path: Path) -> None:
    for name in NOT_ON_A_BARE_MACHINE:
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError('no {name} here')\n")
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--device=cpu", "--tiny", "--lanes", "1", "2"]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [*command, "--variants", "lora", "full", "--steps", "1", "--out", str(tmp_path / "gpu.json")],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert rows == [json.loads(line) for line in done.stdout.splitlines()]
    sections = ["machine", "ceiling", "throughput", "throughput", "memory", "throughput"]
    assert [row["section"] for row in rows] == sections


# --- whole studies


def peft_study(runs: list[Run], base: str = "unused") -> Study:
    """Return a study on the tiny model: it has the vocabulary and the row length of `letters`."""
    task = tasks.get("letters")
    rows = {
        split: makespan._as_pairs(encode_examples(task.examples(split, 32), task, tokenizer()))
        for split in ("train", "validation", "test")
    }
    return Study(base, rows, runs, steps=6, evaluations=3, batch_size=8)


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


@pytest.fixture
def small(tmp_path: Path) -> Study:
    """Return a study of one run on a tiny base model that is saved in a folder."""
    tiny_base_model(ModelChoice("tiny", "0" * 64)).model.save_pretrained(tmp_path / "base")
    return peft_study(makespan.STUDIES["tiny"].runs[:1], str(tmp_path / "base"))


@pytest.mark.slow  # processes that import torch and transformers
def test_makespan_times_plain_processes(
    small: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run alternatives.py with another base model than the one that makespan.py pretrains."""
    monkeypatch.setattr(makespan, "prepare_study", lambda name, work: small)
    arguments = ["--studies", "tiny", "--sides", "processes", "--work", str(tmp_path / "work")]
    monkeypatch.setattr(sys, "argv", ["makespan.py", *arguments, "--out", str(tmp_path / "out")])
    monkeypatch.setattr(makespan.os, "cpu_count", lambda: 1)
    makespan.run()
    assert "| tiny | processes | 1 |" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "out").read_text())
    assert row["scores"].keys() == {small.runs[0].key}


def test_a_reused_actor_trains_a_run(small: Study, tmp_path: Path) -> None:
    """The class trains in this process: no Ray is started."""
    (tmp_path / "study.json").write_text(json.dumps(asdict(small)))
    config = {"study": str(tmp_path / "study.json"), "run": asdict(Run("lora", 1e-2, 0))}
    trainable = make_trainable()(config)
    while not (result := trainable.train())["done"]:
        pass
    assert result["run"] == "lora 0.01 0"


def test_a_table_of_rounds_pairs_the_sides() -> None:
    scores = {"lora 0.01 0": {"test exact_match": 0.95}}
    rows = [
        {"study": "small", "side": side, "round": number, "seconds": s, "scores": scores}
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


def test_early_stopping_is_compared_with_the_full_grid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The studies are synthetic; the first one lacks the best rate of HiRA."""
    full = synthetic_study()

    def train(name: str, output: Path, words: list[str]) -> None:
        assert words == (["--seeds", "3", "--scheduler", "asha"] if name == "early" else ["--seeds", "3"])
        kept = full
        if name == "early":  # without HiRA's best rate
            chosen = [r.configuration for r in full]
            best = [c for c in chosen if c.variant.name == "hira" and c.optimizer.learning_rate == 0.1]
            lacks = {c.fingerprint for c in best}
            kept = [r for r in full if r.fingerprint not in lacks]
        store = Store(output / "store")
        for each in kept:
            store.put(each)
        StudyFile(name, "Which?", "x", tuple(r.fingerprint for r in kept)).write(output / name)

    monkeypatch.setattr(early_stopping, "train", train)
    arguments = ["--output", str(tmp_path / "results"), "--out", str(tmp_path / "out"), "--", "--seeds", "3"]
    monkeypatch.setattr(sys, "argv", ["early_stopping.py", *arguments])
    early_stopping.run()
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    cells = {row[0]: row[1:] for row in rows}
    assert cells["lora letters"] == ["0.01", "0.01", "100%"]
    assert cells["hira letters"][:2] == ["0.03", "0.1"]
    assert cells["all"][0] == "the same for 4 of 5"
    with pytest.raises(SystemExit):
        early_stopping.run()
    assert "it exists" in capsys.readouterr().err
