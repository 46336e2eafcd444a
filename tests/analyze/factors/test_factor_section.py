"""The section on factors, in the report and in the terminal."""

from __future__ import annotations

import html
import json
from pathlib import Path

import pytest
from rich.console import Console
from star_records import Surface, star_records, template

from orchestrator.analyze.interactive.plotly_factors import factor_figures
from orchestrator.analyze.plots.factor_bars import draw_factors, factor_titles
from orchestrator.analyze.report import write_report
from orchestrator.analyze.results import Summary
from orchestrator.analyze.table import render_summary
from orchestrator.record.study_file import AnalysisSettings, StudyFile

STUDY = StudyFile(
    "s",
    "Which hyperparameter matters most?",
    "python experiments/hyperparameter_sensitivity.py",
    settings=AnalysisSettings(kind="factors"),
)
NAMES = ("alpha", "rank", "batch_size")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("report")


@pytest.fixture(scope="module")
def summary(folder: Path) -> Summary:
    surface = Surface(costs={("batch_size", 64): 0.1, ("rank", 2): 0.05})
    records = star_records(surface, names=NAMES) + star_records(surface, template("hira"), NAMES)
    return write_report(STUDY, records, folder, "")


def test_the_page_has_the_verdict_the_picture_and_every_factor(summary: Summary, folder: Path) -> None:
    page = (folder / "report.html").read_text()
    assert html.escape(summary.verdicts[0].answer, quote=True).replace("&#x27;", "&#39;") in page
    assert 'data-picture="factors"' in page
    for title in ("learning rate*", "alpha*", "rank", "batch size"):
        assert f"<td>{title}</td>" in page
    assert (folder / "factors.png").stat().st_size > 5_000
    assert "batch size" in (folder / "factors.svg").read_text()


def test_summary_json_has_every_figure_and_no_nan(summary: Summary, folder: Path) -> None:
    data = json.loads((folder / "summary.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    (task,) = data["factor_study"]["tasks"]
    lora = next(v for v in task["variants"] if v["variant"] == "lora")
    effect = next(f for f in lora["factors"] if f["name"] == "batch_size")
    assert {"misset", "retuned", "gain", "off_by_2", "usable", "misset_contrast"} <= effect.keys()
    assert effect["misset"]["interval"]["low"] < effect["misset"]["mean"]
    assert lora["claim"]["outcomes"] == {"half": "supported", "measured": "supported", "double": "supported"}


def test_the_terminal_fits_80_columns_and_begins_with_the_verdict(summary: Summary) -> None:
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render_summary(summary))
    lines = console.export_text().splitlines()
    assert lines[0].startswith("SUPPORTED  The learning rate matters more")
    assert max(map(len, lines)) <= 80
    assert any("batch size" in line and "[" in line for line in lines)
    assert not any("…" in line for line in lines)


def test_bars_are_drawn_for_each_factor_that_a_variant_has(summary: Summary) -> None:
    assert summary.factor_study is not None
    (task,) = summary.factor_study.tasks
    assert factor_titles(task)[:2] == ["learning rate", "alpha"]
    first, second = factor_figures([task])
    by_variant = {trace.name: list(trace.y) for trace in first.data}
    assert by_variant["lora"] == ["learning rate*", "alpha*", "batch size", "rank"]
    assert by_variant["hira"] == ["learning rate*", "batch size", "rank"]
    # Both figures have one axis, so that bars of A and of B can be compared by eye.
    assert first.layout.xaxis.range == second.layout.xaxis.range
    left, right = draw_factors([task]).axes
    assert len(left.patches) == len(right.patches) == 7
