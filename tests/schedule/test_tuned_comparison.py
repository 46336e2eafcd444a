"""A tuned comparison on the whole path, with real Ray and Tune: tuned, chosen, confirmed, again, extended."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import study

from orchestrator.record.schema import Record
from orchestrator.record.store import Store
from orchestrator.record.study_file import StudyFile

NAME = "tuned_comparison-letters"
SMALL = ("--seeds", "1")
RATES = ("3e-3", "1e-2")


def compare(
    output: Path, *more: str, rates: tuple[str, ...] = RATES, variants: tuple[str, ...] = ("pissa",)
) -> tuple[int, str, str]:
    arguments = (*SMALL, "--variants", *variants, "--learning-rates", *rates, *more)
    return study.run(output, *arguments, script="tuned_comparison.py")


def verdict(out: str) -> str:
    found = re.search(r"letters on letters-base, 60 steps, .*?95%\s+interval\)\.", out, re.DOTALL)
    assert found, out
    return " ".join(found[0].split())


def of(output: Path, stage: str) -> list[Record]:
    file = StudyFile.read(output / f"{NAME}-{stage}")
    assert file is not None
    store = Store(output / "store")
    return [record for f in file.configurations if (record := store.get(f)) is not None]


@pytest.mark.timeout(600)
def test_tuned_chosen_on_validation_confirmed_with_fresh_seeds_and_kept(output: Path) -> None:
    code, out, err = compare(output, "--confirm-seeds", "3")
    assert code == 0, out + err
    assert f"{NAME}-tune: 0 of 4 known" in out
    assert f"{NAME}-confirm: 0 of 6 known" in out
    said = verdict(out)
    assert (
        "each variant tuned with 2 points x 1 seed, confirmed with 3 fresh seeds, margin 0.01: pissa" in said
    )
    assert re.search(
        r"LoRA \(not bracketed\) matches or beats most variants: (supported|refuted|undecided) \(", said
    )

    tuned, fresh = of(output, "tune"), of(output, "confirm")
    assert {r.configuration.seed for r in tuned} == {0}
    assert {r.configuration.seed for r in fresh} == {1000, 1001, 1002}
    for variant in ("lora", "pissa"):  # LoRA was not named and is there
        points = [r for r in tuned if r.configuration.variant.name == variant]
        best = max(points, key=lambda r: (r.score("validation"), -r.configuration.optimizer.learning_rate))
        rates = {
            r.configuration.optimizer.learning_rate for r in fresh if r.configuration.variant.name == variant
        }
        assert rates == {best.configuration.optimizer.learning_rate}
    folder = output / f"{NAME}-confirm"
    assert {p.name for p in folder.iterdir()} >= {"forest.png", "report.html", "summary.json", "study.json"}
    assert json.loads((folder / "summary.json").read_text())["comparisons"][0]["verdict"] == said
    assert f"Picture  {folder / 'forest.png'}" in out
    assert study.parents(output, f"{NAME}-confirm") == ["FINISHED"]
    assert "forest.png" in study.artifacts(output, f"{NAME}-confirm")

    code, out, err = compare(output, "--confirm-seeds", "3")
    assert code == 0, out + err
    assert "4 of 4 known, nothing to train" in out
    assert "6 of 6 known, nothing to train" in out
    assert verdict(out) == said

    code, out, err = compare(output, "--confirm-seeds", "4")
    assert code == 0, out + err
    assert f"{NAME}-confirm: 6 of 8 known" in out
    assert "confirmed with 4 fresh seeds" in verdict(out)
    assert {r.fingerprint for r in fresh} < {r.fingerprint for r in of(output, "confirm")}
    assert "look 2 at 4 seeds, after a verdict at 3" in " ".join(out.split())
    file = StudyFile.read(folder)
    assert file is not None
    assert (file.looks, file.searched) == ((3, 4), False)

    grown = "tuning has chosen among 4 configurations and now there would be 6"
    for rates, variants, more, part in (
        ((*RATES, "3e-2"), ("pissa",), (), grown),
        (RATES, ("pissa",), ("--margin", "0.02"), "--margin 0.02"),
        (RATES, ("pissa", "dora"), (), "--variants dora"),
    ):
        code, out, err = compare(output, "--confirm-seeds", "4", *more, rates=rates, variants=variants)
        assert (code, len(err.splitlines())) == (2, 1), out + err
        assert part in err
    assert len(Store(output / "store").states()) == 12, "nothing was trained for what was refused"
    code, out, err = compare(output, "--confirm-seeds", "4")
    assert code == 0, "what was refused locks nothing: " + out + err
