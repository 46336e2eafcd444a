"""The whole path with real Ray, Tune, Train and MLflow: one study, again, and extended.

It starts Ray itself, as a user's first command does.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pyarrow.parquet
import pytest
import study

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900), pytest.mark.usefixtures("no_cluster")]

NAME = "lr_sensitivity-letters-letters-base"
SMALL = ("--variants", "lora", "hira", "--seeds", "1", "--steps", "12")


@pytest.mark.smoke
def test_a_study_is_trained_once_extended_by_what_is_new_and_shown(output: Path) -> None:
    code, out, err = study.run(output, *SMALL, "--learning-rates", "1e-3", "1e-2")
    assert code == 0, out + err
    assert "0 of 4 known" in out
    assert "4 trained" in out
    for line in out.splitlines():
        assert len(line) <= 80 or line.startswith(("Report", "Picture", "MLflow")), "paths are not cut"
    folder = output / NAME
    for file in ("report.html", "curves.png", "summary.json", "study.json", "study.log"):
        assert (folder / file).stat().st_size > 0
    first = study.records(output)
    assert Counter(r.state for r in first.values()) == {"finished": 4}
    assert all(
        len(r.items["validation"].correct) == r.configuration.task.validation_size for r in first.values()
    )
    assert all(r.provenance.attempt == 1 for r in first.values())
    assert not list((output / "store" / "checkpoints").iterdir()), "a finished lane's checkpoints go"
    assert sorted(study.children(output, NAME)) == sorted((f, "FINISHED") for f in first)
    assert study.artifacts(output, NAME) >= {"report.html", "curves.png"}

    code, out, _ = study.run(output, *SMALL, "--learning-rates", "1e-3", "1e-2")
    assert code == 0
    assert "4 of 4 known, nothing to train" in out
    assert "Ray started" not in out
    assert {f: r.provenance.ended for f, r in study.records(output).items()} == {
        f: r.provenance.ended for f, r in first.items()
    }

    code, out, _ = study.run(output, *SMALL, "--learning-rates", "1e-3", "3e-3", "1e-2")
    assert code == 0
    assert "4 of 6 known" in out
    assert "2 trained" in out
    now = study.records(output)
    assert {now[f].provenance.ended for f in first} == {r.provenance.ended for r in first.values()}
    assert sorted(study.children(output, NAME)) == sorted((f, "FINISHED") for f in now)
    assert study.parents(output, NAME) == ["FINISHED"]
    assert pyarrow.parquet.read_table(output / "store" / "records.parquet").num_rows == 6
    summary = json.loads((folder / "summary.json").read_text())
    assert json.dumps(summary).count("learning_rate") > 0
