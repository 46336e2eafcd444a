"""A tuned comparison that trains on Ray, is extended by a replicate, as planned, and is repeated.

Some of its results are already in the store.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import study
from ray.cluster_utils import Cluster

from orchestrator.launch.designs.replicates import shifted_grid
from orchestrator.record.schema import Record
from orchestrator.record.store import Store
from orchestrator.record.study_file import StudyFile
from orchestrator.study.options import StudyOptions
from orchestrator.util.errors import UsageError

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

NAME = "tuned_comparison-letters-letters-base"
SCRIPT = "tuned_comparison.py"
RATES = (3e-3, 1e-2)


def asking(*more: str) -> tuple[str, ...]:
    rates = tuple(f"{rate:g}" for rate in RATES)
    return ("--task", "letters", "--trainers", "1", "--variants", "pissa", "--learning-rates", *rates, *more)


def keep_replicate(output: Path, replicate: int) -> None:
    """Put the records of a whole replicate into the store. The lower rate is better."""
    grid = shifted_grid(RATES, replicate)
    for rate in grid:
        options = StudyOptions(
            task=("letters",),
            variants=("lora", "pissa"),
            learning_rates=(repr(rate),),
            seeds=1,
            output=output,
        )
        study.keep_known(options, loss=1.0, score=0.8 if rate == grid[0] else 0.4, seeds=(replicate,))


def of(output: Path) -> list[Record]:
    file = StudyFile.read(output / NAME)
    assert file is not None
    store = Store(output / "store")
    return [record for f in file.configurations if (record := store.get(f)) is not None]


def test_tuned_in_replicates_extended_as_planned_and_kept(
    cluster: Cluster, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def compare(*more: str) -> str:
        arguments = asking("--max-replicates", "3", *more)
        assert study.run_here(output, *arguments, script=SCRIPT, address=cluster.address) == 0
        return capsys.readouterr().out

    def looks() -> tuple[int, ...]:
        file = StudyFile.read(output / NAME)
        assert file is not None
        assert file.settings.kind == "replicates"
        assert file.settings.max_replicates == 3
        return file.looks

    keep_replicate(output, 0)
    out = compare("--replicates", "2")
    assert f"{NAME}: 4 of 8 known" in out
    assert "LoRA matches" in out
    first = of(output)
    assert {(r.configuration.variant.name, r.configuration.seed) for r in first} == {
        (variant, replicate) for variant in ("lora", "pissa") for replicate in (0, 1)
    }
    assert {r.configuration.optimizer.learning_rate for r in first} == {
        *shifted_grid(RATES, 0),
        *shifted_grid(RATES, 1),
    }
    folder = output / NAME
    names = {path.name for path in folder.iterdir()}
    assert names >= {"forest.png", "forest.svg", "report.html", "summary.json", "study.json"}
    verdict = json.loads((folder / "summary.json").read_text())["verdicts"][0]
    assert verdict["claim"] == "Tuned LoRA matches or beats most variants."
    assert " ".join(verdict["answer"].split()) in " ".join(out.split())
    assert study.parents(output, NAME) == ["FINISHED"]
    assert "forest.png" in study.artifacts(output, NAME)
    assert looks() == (2,)

    keep_replicate(output, 2)
    out = compare("--replicates", "3")
    assert f"{NAME}: 12 of 12 known, nothing to train" in out
    assert "look 2" in " ".join(out.split())
    assert looks() == (2, 3)
    assert {r.fingerprint for r in first} < {r.fingerprint for r in of(output)}

    for more, part in (
        (("--replicates", "4"), "planned for at most 3"),
        (("--replicates", "3", "--max-replicates", "9"), "began with 3"),
        (("--replicates", "3", "--margin", "0.02"), "--margin 0.02"),
        (("--replicates", "3", "--steps", "30"), "12 runs of the same tunings"),
    ):
        with pytest.raises(UsageError) as refused:
            study.run_here(output, *asking(*more), script=SCRIPT)
        assert part in str(refused.value)
        assert "\n" not in str(refused.value)
    assert len(Store(output / "store").states()) == 12, "nothing was trained for what was refused"

    assert study.run_here(output, *asking("--replicates", "3"), script=SCRIPT) == 0
    assert "12 of 12 known, nothing to train" in capsys.readouterr().out
    assert looks() == (2, 3), "the same number again is no new look"
