"""The whole path with real Ray, Tune, Train and MLflow: one study, and the same command again.

The study starts Ray itself, as a user's first command does.
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
def test_a_study_is_trained_once_and_shown(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = study.run(output, *SMALL, "--learning-rates", "1e-3", "1e-2")
    assert code == 0, out + err
    assert "0 of 4 known" in out
    assert "4 trained" in out
    for line in out.splitlines():
        is_path = line.startswith(("Report", "Picture", "MLflow")) or line.lstrip().startswith("http")
        assert len(line) <= 80 or is_path, "paths and links are not cut"
    folder = output / NAME
    for file in ("report.html", "curves.png", "summary.json", "study.json", "study.log"):
        assert (folder / file).stat().st_size > 0
    first = study.records(output)
    assert Counter(r.state for r in first.values()) == {"finished": 4}
    assert all(
        len(r.items["validation"].correct) == r.configuration.task.validation_size for r in first.values()
    )
    assert all(r.provenance.attempt == 1 for r in first.values())
    assert not list((output / "store" / "checkpoints").glob("*")), "a finished lane's checkpoints go"
    assert sorted(study.children(output, NAME)) == sorted((f, "FINISHED") for f in first)
    assert study.artifacts(output, NAME) >= {"report.html", "curves.png"}
    assert pyarrow.parquet.read_table(output / "store" / "records.parquet").num_rows == 4
    summary = json.loads((folder / "summary.json").read_text())
    assert json.dumps(summary).count("learning_rate") > 0

    assert study.run_here(output, *SMALL, "--learning-rates", "1e-3", "1e-2") == 0
    out = capsys.readouterr().out
    assert "4 of 4 known, nothing to train" in out
    assert "Ray started" not in out
    assert study.records(output) == first
    assert sorted(study.children(output, NAME)) == sorted((f, "FINISHED") for f in first)
    assert study.parents(output, NAME) == ["FINISHED"]
