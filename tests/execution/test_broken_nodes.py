"""The slot of a node or GPU on which no trainer can work is closed and named, and the others go on."""

from __future__ import annotations

import os
import re
from pathlib import Path

import alone
import pytest
import study
from machines import GPUS, Machines, trainers
from steps import TASK, Steps

pytestmark = [pytest.mark.ray, pytest.mark.nightly, pytest.mark.timeout(1800)]

SMALL = ("--variants", "lora", "--seeds", "2", "--learning-rates", "3e-3", "1e-2", "--steps", "20")
ONE_LANE = (*SMALL, "--task", str(TASK), "--lanes-per-trainer", "1")


def test_a_slot_on_a_node_with_a_damaged_installation_is_closed_and_named(
    machines: Machines, output: Path, letters_bases: Path, tmp_path: Path, steps: Steps
) -> None:
    damaged = tmp_path / "damaged"
    (damaged / "transformers").mkdir(parents=True)
    (damaged / "transformers" / "__init__.py").write_text("raise ImportError('a damaged installation')")
    bad = machines.add(PYTHONPATH=os.pathsep.join([str(damaged), os.environ.get("PYTHONPATH", "")]))
    good = machines.add()
    steps.slow_after(5)
    process = study.start(output, *ONE_LANE, *GPUS, address=machines.address)
    study.wait_for(lambda: "slot is closed" in study.log(output), process)
    study.wait_for(lambda: (trainers(bad), trainers(good)) == (0, 1), process)
    steps.run_free()
    code, out, err = study.end(process)
    assert code == 0, out + err
    (line,) = [line for line in out.splitlines() if "slot is closed" in line]
    assert re.search(rf"the last on GPU 0 of node [\d.]+ \({bad.node_id[:8]}\): .*a damaged inst", line)
    assert len(re.findall(r"trainer-\d+ died: .*a damaged installation", out)) == 2
    assert trainers(bad) == 0
    found = study.records(output)
    expected = alone.train(
        [record.configuration for record in found.values()], letters_bases, tmp_path / "alone"
    )
    assert [study.course(record) for record in found.values()] == [study.course(expected[f]) for f in found]
    assert len(found) == 4


def test_a_study_on_gpus_that_torch_cannot_use_ends_with_one_line_that_names_them(
    machines: Machines, output: Path
) -> None:
    nodes = [machines.add(), machines.add()]  # their GPUs exist only in Ray's accounting
    wanted = ("--gpus-per-worker", "1", "--trainer-timeout", "90")
    code, _, err = study.run(output, *ONE_LANE, *wanted, address=machines.address)
    assert code == 1
    assert err.startswith("error: No trainer is left: all failed 2 times in a row")
    assert any(f"({node.node_id[:8]}): RuntimeError: torch" in err for node in nodes), err
    assert len(err.splitlines()) == 1
    assert [trainers(node) for node in nodes] == [0, 0]
