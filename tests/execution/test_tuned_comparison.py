"""A tuned comparison whose second stage trains on Ray, is extended by a seed and is repeated.

The first stage is a grid, as in other tests; its results are already in the store.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import study
from ray.cluster_utils import Cluster

from orchestrator.record.schema import Record
from orchestrator.record.store import Store
from orchestrator.record.study_file import StudyFile
from orchestrator.study.options import StudyOptions
from orchestrator.util.errors import UsageError

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

NAME = "tuned_comparison-letters"
SCRIPT = "tuned_comparison.py"
RATES = ("3e-3", "1e-2")
BEST = {"lora": "3e-3", "pissa": "1e-2"}


def asking(
    *more: str, rates: tuple[str, ...] = RATES, variants: tuple[str, ...] = ("pissa",)
) -> tuple[str, ...]:
    return ("--seeds", "1", "--trainers", "1", "--variants", *variants, "--learning-rates", *rates, *more)


def verdict(out: str) -> str:
    found = re.search(r"letters on letters-base, 60 steps, .*?95%\s+interval\)\.", out, re.DOTALL)
    assert found, out
    return " ".join(found[0].split())


def of(output: Path, stage: str) -> list[Record]:
    file = StudyFile.read(output / f"{NAME}-{stage}")
    assert file is not None
    store = Store(output / "store")
    return [record for f in file.configurations if (record := store.get(f)) is not None]


def test_tuned_chosen_on_validation_confirmed_with_fresh_seeds_and_kept(
    cluster: Cluster, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def compare(*more: str) -> str:
        assert study.run_here(output, *asking(*more), script=SCRIPT, address=cluster.address) == 0
        return capsys.readouterr().out

    def asked_of(variant: str, rate: str) -> StudyOptions:
        return StudyOptions(
            task="letters", variants=(variant,), learning_rates=(rate,), seeds=1, steps=60, output=output
        )

    for variant, best in BEST.items():
        for rate in RATES:
            study.keep_known(asked_of(variant, rate), loss=1.0, score=0.8 if rate == best else 0.4)
    out = compare("--confirm-seeds", "2")
    assert f"{NAME}-tune: 4 of 4 known, nothing to train" in out
    assert f"{NAME}-confirm: 0 of 4 known" in out
    said = verdict(out)
    assert (
        "each variant tuned with 2 points x 1 seed, confirmed with 2 fresh seeds, margin 0.01: pissa" in said
    )
    assert re.search(
        r"LoRA \(not bracketed\) matches or beats most variants: (supported|refuted|undecided) \(", said
    )

    fresh = of(output, "confirm")
    assert {r.configuration.seed for r in fresh} == {1000, 1001}
    for variant in ("lora", "pissa"):  # LoRA is included without being named
        rates = {
            r.configuration.optimizer.learning_rate for r in fresh if r.configuration.variant.name == variant
        }
        assert rates == {float(BEST[variant])}
    folder = output / f"{NAME}-confirm"
    assert {p.name for p in folder.iterdir()} >= {"forest.png", "report.html", "summary.json", "study.json"}
    assert json.loads((folder / "summary.json").read_text())["comparisons"][0]["verdict"] == said
    assert f"Picture  {folder / 'forest.png'}" in out
    assert study.parents(output, f"{NAME}-confirm") == ["FINISHED"]
    assert "forest.png" in study.artifacts(output, f"{NAME}-confirm")

    for variant, best in BEST.items():
        study.keep_known(asked_of(variant, best), loss=1.0, seeds=(1002,))
    out = compare("--confirm-seeds", "3")
    assert "4 of 4 known, nothing to train" in out
    assert f"{NAME}-confirm: 6 of 6 known, nothing to train" in out
    said = verdict(out)
    assert "confirmed with 3 fresh seeds" in said
    children = study.children(output, f"{NAME}-confirm")
    assert sorted(children) == sorted((r.fingerprint, "FINISHED") for r in of(output, "confirm"))
    assert {r.fingerprint for r in fresh} < {r.fingerprint for r in of(output, "confirm")}
    assert "look 2 at 3 seeds, after a verdict at 2" in " ".join(out.split())
    file = StudyFile.read(folder)
    assert file is not None
    assert (file.looks, file.searched) == ((2, 3), False)

    grown = "tuning has chosen among 4 configurations and now there would be 6"
    for rates, variants, more, part in (
        ((*RATES, "3e-2"), ("pissa",), (), grown),
        (RATES, ("pissa",), ("--margin", "0.02"), "--margin 0.02"),
        (RATES, ("pissa", "dora"), (), "--variants dora"),
    ):
        arguments = asking("--confirm-seeds", "3", *more, rates=rates, variants=variants)
        with pytest.raises(UsageError) as refused:
            study.run_here(output, *arguments, script=SCRIPT)
        assert part in str(refused.value)
        assert "\n" not in str(refused.value)
    assert len(Store(output / "store").states()) == 10, "nothing was trained for what was refused"

    assert study.run_here(output, *asking("--confirm-seeds", "3"), script=SCRIPT) == 0
    out = capsys.readouterr().out
    assert "4 of 4 known, nothing to train" in out
    assert "6 of 6 known, nothing to train" in out
    assert verdict(out) == said
