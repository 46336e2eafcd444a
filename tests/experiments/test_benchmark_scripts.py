"""Each script in experiments/benchmarks runs at its smallest size; no test is on a time."""

from __future__ import annotations

import json
import runpy
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import makespan
import pytest
from alternatives_actors import PeftTrainable
from alternatives_peft import Run, Study
from alternatives_trainers import train_worker
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer
from scripted import Script, configuration, leases, tiny_base_model, train
from simulated_curves import SimulationPlan
from simulated_training import SimulatedEngine

from orchestrator.finetune.data.batches import encode_examples
from orchestrator.finetune.tasks import catalogue as tasks
from orchestrator.finetune.tasks.local.letters import tokenizer
from orchestrator.record.store import Store
from orchestrator.study.configuration import ModelChoice

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "experiments" / "benchmarks"
STORE, FOLDER = "STORE", "FOLDER"
"""Stand in an argument for the folder of a small store, and for an empty folder."""
SMALLEST = {
    "coverage.py": "--replicates 2 --processes 1 --rows items",
    "decode_steps.py": "",
    "factor_coverage.py": "--replicates 2 --seeds 3 --claim-seeds 3",
    "filling.py": "--trainers 2",
    "gpu.py": "svd --here --tiny --device cpu",
    "lanes.py": "--cases tiny --variants lora --lanes 1 2 --rounds 1",
    "meta_step.py": "--models tiny --variants lora --lanes 1 --rows 2 --accumulation 2 --max-length 32",
    "overhead.py": f"--store {STORE}",
    "process_times.py": "--interval 0.05 sleep 0.2",
    "replay_schedulers.py": f"{STORE} --output {FOLDER} --rates 3 --schedulers asha --without-ray",
    "step.py": "--cases tiny --variants lora --rounds 1",
    "variant_costs.py": "--sections steps --case tiny --variants lora --rounds 1",
    "variant_learning.py": "",
}
"""Script -> the arguments of its smallest run, in this process."""
PARTS = (
    "alternatives_actors.py",
    "alternatives_processes.py",
    "alternatives_trainers.py",
    "makespan.py",
    "scale.py",
)
"""Scripts that start Ray or pretrain a model: a `ray` test runs scale.py, the tests below run parts of the
others, and a nightly test runs all of makespan.py."""


def test_every_script_has_a_run() -> None:
    scripts = {f.name for f in BENCHMARKS.glob("*.py") if 'if __name__ == "__main__"' in f.read_text()}
    assert scripts == {*SMALLEST, *PARTS}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Return a store of three simulated runs."""
    store = Store(tmp_path_factory.mktemp("small"))
    points = [configuration(rate=rate, steps=6, evaluations=3) for rate in (1e-3, 1e-2, 1e-1)]
    train(Script(leases(points)), store, make_engine=partial(SimulatedEngine, SimulationPlan()))
    return store


@pytest.mark.parametrize("script", SMALLEST)
def test_a_script_prints_its_table(
    script: str,
    store: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    places = {STORE: str(store.root), FOLDER: str(tmp_path / "out")}
    arguments = [places.get(word, word) for word in SMALLEST[script].split()]
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    code: object = None
    try:
        runpy.run_path(str(BENCHMARKS / script), run_name="__main__")
    except SystemExit as end:
        code = end.code
    allowed = {None, 0, 1} if script == "coverage.py" else {None, 0}  # a few synthetic studies meet no limit
    assert code in allowed, capfd.readouterr().err
    assert "\n" in capfd.readouterr().out


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """Return a study of one run on a tiny base model."""
    base, task = tiny_base_model(ModelChoice("tiny", "0" * 64)), tasks.get("letters")
    base.model.save_pretrained(tmp_path / "base")
    rows = {
        split: makespan._as_pairs(encode_examples(task.examples(split, 16), task, tokenizer()))
        for split in ("train", "validation", "test")
    }
    runs = makespan.STUDIES["tiny"].runs[:1]
    return Study(str(tmp_path / "base"), rows, runs, steps=2, evaluations=1, batch_size=4)


def test_makespan_times_plain_processes(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run alternatives_processes.py with another base model than the one that makespan.py pretrains."""
    monkeypatch.setattr(makespan, "prepare_study", lambda name, work: study)
    arguments = ["--studies", "tiny", "--sides", "processes", "--work", str(tmp_path / "work")]
    monkeypatch.setattr(sys, "argv", ["makespan.py", *arguments, "--out", str(tmp_path / "out")])
    monkeypatch.setattr(makespan.os, "cpu_count", lambda: 1)
    makespan.run()
    assert "| tiny | processes | 1 |" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "out").read_text())
    assert row["scores"].keys() == {study.runs[0].key}


def test_the_alternatives_with_ray_train_a_run(study: Study, tmp_path: Path) -> None:
    """Their own code trains in this process: no Ray is started."""
    (tmp_path / "study.json").write_text(json.dumps(asdict(study)))
    config = {"study": str(tmp_path / "study.json"), "run": asdict(Run("lora", 1e-2, 0))}
    result = PeftTrainable(config).train()
    assert result["done"]
    trainer = TorchTrainer(
        train_worker, train_loop_config=config, scaling_config=ScalingConfig(num_workers=0)
    )
    assert trainer.fit().metrics["run"] == result["run"] == "lora 0.01 0"


def test_lanes_that_end_while_others_train_are_simulated(tmp_path: Path) -> None:
    """The trainer of scale.py grades a lane with fewer steps while another one trains."""
    store, point = Store(tmp_path / "store"), configuration(steps=6, evaluations=3)
    points = [point, replace(point, lr_schedule=replace(point.lr_schedule, steps=12))]
    train(Script(leases(points)), store, make_engine=partial(SimulatedEngine, SimulationPlan()))
    assert {record.state for record in store.records()} == {"finished"}
