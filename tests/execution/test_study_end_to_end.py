"""The whole path with real Ray, Tune, Train and MLflow: one study, and the same command again.

The study starts Ray itself, as a user's first command does.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pyarrow.parquet
import pytest
import study
from letters_score import recorded_scores, run_card, validation_scores

from orchestrator.export.export import export_lane
from orchestrator.export.lane_choice import LaneQuery
from orchestrator.record.schema import Record
from orchestrator.record.store import Store

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
        begins = ("Report", "Picture", "Export", "MLflow")
        is_path = line.startswith(begins) or line.lstrip().startswith("http")
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

    export_best(output, first.values(), out)

    assert study.run_here(output, *SMALL, "--learning-rates", "1e-3", "1e-2") == 0
    out = capsys.readouterr().out
    assert "4 of 4 known, nothing to train" in out
    assert "Ray started" not in out
    assert study.records(output) == first
    assert sorted(study.children(output, NAME)) == sorted((f, "FINISHED") for f in first)
    assert study.parents(output, NAME) == ["FINISHED"]


def export_best(output: Path, records: Iterable[Record], printed: str) -> None:
    """Check that the best lane of each variant is kept, and has the scores of its record in PEFT."""
    store = Store(output / "store")
    assert f"Export   python -m orchestrator export {NAME} --output {output}" in printed
    best = {}
    for record in sorted(records, key=lambda record: record.score("validation") or 0.0):
        best[record.configuration.variant.name] = record
    kept = [path.name[:64] for path in store.adapters.glob("*/*")]
    assert len(kept) == len(best) == 2
    for variant in best:
        query = LaneQuery(NAME, variant=variant)
        done = export_lane(store, output, query, "peft", notify=print)
        assert done.record.fingerprint in kept
        assert done.record.score("validation") == best[variant].score("validation")
        model = run_card(done.folder)["model"]
        scores = validation_scores(model, done.folder, done.record)
        assert scores == pytest.approx(recorded_scores(done.record), rel=1e-4)
