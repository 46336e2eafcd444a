"""The benchmarks that fill in the catalogue's costs and the page of best scores; no test is on a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import variant_costs
import variant_learning
from synthetic import RATES, STUDY, study

import orchestrator
from orchestrator.record.store import Store
from orchestrator.record.study_file import StudyFile
from variants import catalogue

CPU = torch.device("cpu")
CONDITIONS: dict[str, Any] = {"machine": {"device": "cpu", "commit": "a", "load": 0.1}, "side": 4096}


@pytest.mark.slow  # three measurements of a step
def test_the_memory_of_a_step_is_relative_to_loras() -> None:
    tiny = variant_costs.CASES["tiny"]
    rslora = variant_costs.measure_step("rslora", tiny, CPU, rounds=1)
    assert rslora["memory"] == 1.0, "rsLoRA has LoRA's tensors"
    assert rslora["step_time"] > 0
    assert variant_costs.measure_step("vera", tiny, CPU, rounds=1)["memory"] > 1.5, "at rank 256"


def test_an_initialization_is_measured_in_a_process_of_its_own() -> None:
    found = variant_costs.measure_initialization("pissa", 512, "cpu", 1)
    assert found["seconds"] > 0
    assert found["peak_mib"] > 1, "U alone has 512 x 512 values of 4 bytes"


def test_initializations_from_the_weight_gradients_and_inputs_are_measured() -> None:
    measured = {name for name in catalogue.names() if variant_costs.needs_computation(name)}
    assert {"pissa", "lora_ga", "eva"} <= measured
    assert not measured & {"lora", "hira", "full"}


@pytest.mark.parametrize(
    ("machine", "kept"),
    [
        ({"device": "cpu", "commit": "b", "load": 9.0}, {"dora", "lora"}),
        ({"device": "cuda H100", "commit": "a", "load": 0.1}, {"dora"}),
    ],
)
def test_measurements_of_another_machine_are_replaced(machine: dict[str, Any], kept: set[str]) -> None:
    first = variant_costs.update_costs({}, "steps", CONDITIONS, {"lora": {"step_time": 1.0}})
    second = {**CONDITIONS, "machine": machine}
    costs = variant_costs.update_costs(first, "steps", second, {"dora": {"step_time": 2.0}})
    assert set(costs["steps"]["variants"]) == kept
    assert costs["steps"]["machine"] == {"device": machine["device"]}
    assert costs["steps"]["variants"]["dora"] == {
        "step_time": 2.0,
        "commit": machine["commit"],
        "load": machine["load"],
    }
    assert json.loads(json.dumps(costs)) == costs


def test_the_printed_studies_have_each_variant_once_at_its_own_rates() -> None:
    commands = variant_learning.study_commands("letters", catalogue.names())
    names = [name for command in commands.values() for name in command.split(" --variants ")[1].split()]
    assert sorted(names) == sorted(set(catalogue.names()) - {"head_only"})
    scale = catalogue.get("hira").typical_lr_scale
    hira = next(command for command in commands.values() if " hira" in command)
    assert f"--learning-rates {0.001 * scale:g} " in hira
    reviews = variant_learning.study_commands("reviews", ["lora", "head_only"])
    assert any("head_only" in command for command in reviews.values())


def test_the_table_has_each_variants_best_rate_and_its_gain(tmp_path: Path) -> None:
    records = study()
    store = Store(tmp_path / "store")
    for each in records:
        store.put(each)
    StudyFile("rates", "Which?", "x", tuple(r.fingerprint for r in records)).write(tmp_path / "rates")
    panels = orchestrator.load("rates", output=tmp_path).summary.panels
    lines = variant_learning.describe_panels(panels).splitlines()
    assert lines[0].startswith("Task `letters`")
    split = [line.strip("| ").split(" | ") for line in lines if line.startswith("| `")]
    rows = {cells[0]: cells[1:] for cells in split}
    assert set(rows) == {f"`{name}`" for name in STUDY}
    assert next(iter(rows)) == "`lora`"
    best_rate, validation, *_, learns = rows["`lora`"]
    assert (best_rate, learns) == ("1e-2", "yes")
    assert float(validation) == pytest.approx(sum(STUDY["lora"][3]) / 3, abs=1e-3)  # type: ignore[arg-type]
    assert rows["`lora`"][4].endswith(f" of {3 * len(RATES)}")


def test_a_variant_without_a_gain_is_marked(tmp_path: Path) -> None:
    records = [each for each in study() if each.configuration.optimizer.learning_rate == RATES[0]]
    store = Store(tmp_path / "store")
    for each in records:
        store.put(each)
    StudyFile("low", "Which?", "x", tuple(r.fingerprint for r in records)).write(tmp_path / "low")
    panels = orchestrator.load("low", output=tmp_path).summary.panels
    row = next(line for line in variant_learning.describe_panels(panels).splitlines() if "`hira`" in line)
    assert row.endswith("| **no** |"), "hira scores 0 at the lowest rate, as the untrained base model does"
