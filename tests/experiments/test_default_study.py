"""The plan of the default study, without the hub and with local folders."""

from __future__ import annotations

from pathlib import Path

import hub_folder
import pytest
from huggingface_hub import constants
from in_process import SWEEP, Run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write data with as many rows as the study uses. Return the folder."""
    root = tmp_path_factory.mktemp("data")
    rows = []
    for number in range(27_500):
        own = f"What is {number} + 1?"
        for kind in ("GSM_AnsAug", "GSM_Rephrased", "GSM_FOBAR", "MATH_AnsAug"):
            row = {"type": kind, "query": own, "original_question": own}
            rows.append({**row, "response": f"#### {number + 1}\nThe answer is: {number + 1}"})
    hub_folder.write(root, "meta-math/MetaMathQA", {"train": rows})
    test = [{"question": f"{n}?", "answer": f"It is {n}.\n#### {n}"} for n in range(1319)]
    hub_folder.write(root, "openai/gsm8k", {"test": test}, subset="main")
    return root


def test_an_unreachable_hub_is_refused_in_one_line(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    done = run(SWEEP, "--plan")
    done.assert_refused(
        "error: Task 'metamathqa': meta-math/MetaMathQA cannot be read from the data hub", "ORCHESTRATOR_DATA"
    )


def test_local_folders_are_planned_in_full(data: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCHESTRATOR_DATA", str(data))
    monkeypatch.setenv("COLUMNS", "200")
    done = run(SWEEP, "--plan")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if " " in line)
    assert lines["Task"] == "metamathqa, 1562 steps of 64"
    assert lines["Variants"] == "lora dora nzlora pissa milora"
    rates = "rates 2e-06 3.56e-06 6.32e-06 1.12e-05 2e-05 3.56e-05 6.32e-05 "
    rates += "0.000112 0.0002 0.000356 0.000632 0.00112 0.002"
    assert lines["Answer"].startswith("key      42 published numbers (28 scores, ")
    assert lines["Learning"].split() == rates.split()
    assert lines["Seeds"] == "3"
    assert lines["Configurations"] == "195, of them 0 known"
    assert lines["Steps"] == f"at most {195 * 1562}"


def test_a_plan_prints_what_it_cannot_check(data: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCHESTRATOR_DATA", str(data))
    monkeypatch.setenv("COLUMNS", "200")
    done = run(SWEEP, "--plan", "--targets", "q_porj")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        "Base model      Qwen/Qwen3-0.6B-Base (not prepared yet); the study asks the model hub "
        in done.stdout
    )
    assert "Not checked     --rank and --targets: the base model is not here yet" in done.stdout
