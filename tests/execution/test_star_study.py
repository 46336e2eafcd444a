"""A study of factors on Ray: the store has its curve, and its arms are trained around the best rate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import study
from ray.cluster_utils import Cluster

from orchestrator.record.store import Store
from orchestrator.record.study_file import StudyFile
from orchestrator.study.options import StudyOptions
from orchestrator.util.errors import UsageError

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

NAME = "hyperparameter_sensitivity-letters-letters-base"
SCRIPT = "hyperparameter_sensitivity.py"
RATES = (1e-3, 3.16e-3, 1e-2, 3.16e-2, 1e-1)
ARGUMENTS = ("--task", "letters", "--trainers", "1", "--variants", "lora", "--seeds", "2", "--learning-rates")


def asking(*more: str) -> tuple[str, ...]:
    return (*ARGUMENTS, *(f"{rate:g}" for rate in RATES), *more)


def keep_curve(output: Path) -> None:
    """Put the records of the curve into the store; its best rate is 1e-2."""
    for rate, score in zip(RATES, (0.1, 0.4, 0.9, 0.3, 0.0), strict=True):
        options = StudyOptions(
            task=("letters",), variants=("lora",), learning_rates=(repr(rate),), seeds=2, output=output
        )
        study.keep_known(options, loss=1.0, score=score)


def test_arms_are_trained_around_the_best_rate_and_kept(
    cluster: Cluster, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keep_curve(output)
    arguments = asking("--factors", "dropout", "--levels", "1")
    assert study.run_here(output, *arguments, script=SCRIPT, address=cluster.address) == 0
    out = capsys.readouterr().out
    assert f"{NAME}: 10 of 20 known" in out
    file = StudyFile.read(output / NAME)
    assert file is not None
    assert file.settings.kind == "factors"
    store = Store(output / "store")
    records = [record for f in file.configurations if (record := store.get(f)) is not None]
    arms = [r for r in records if r.configuration.variant.dropout == 0.1]
    assert sorted({r.configuration.optimizer.learning_rate for r in arms}) == list(RATES)
    assert {r.state for r in arms} <= {"finished", "diverged"}
    assert len(arms) == 10
    folder = output / NAME
    assert {path.name for path in folder.iterdir()} >= {"factors.png", "factors.svg", "report.html"}
    data = json.loads((folder / "summary.json").read_text())
    (claim,) = data["claims"]
    assert claim["best_rate"] == 1e-2
    assert [factor["title"] for factor in data["factors"]] == ["learning rate", "dropout"]
    assert " ".join(data["verdicts"][0]["answer"].split()) in " ".join(out.split())

    assert study.run_here(output, *arguments, script=SCRIPT) == 0
    # The line is longer than the terminal.
    assert f"{NAME}: 20 of 20 known, nothing to train" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(UsageError, match=r"began with 0\.01"):
        study.run_here(output, *arguments, "--margin", "0.02", script=SCRIPT)
