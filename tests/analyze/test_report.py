"""The report: the page, the pictures beside it and summary.json."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from synthetic import RATES, record, study, summarize_curves

from orchestrator.analyze import report
from orchestrator.analyze.loss_lines import loss_panels
from orchestrator.analyze.report import write_report
from orchestrator.analyze.results import Summary
from orchestrator.analyze.table import render_summary
from orchestrator.record.schema import Cost, ItemResults, Record, StepMetrics
from orchestrator.record.study_file import AnalysisSettings, StudyFile

STUDY_FILE = StudyFile(
    name="lr-sensitivity",
    question="How far apart are the best rates?",
    command="python experiments/lr_sensitivity.py --dry-run --variants lora pissa "
    "--learning-rates=1e-3:1e-1:2 --seeds 3",
)
DATABASE = "sqlite:///results/mlflow.db"


def test_panels_of_one_task_that_differ_in_a_setting_are_told_apart_everywhere() -> None:
    scores = {
        50: {"lora": (0.2, 0.5, 0.4), "dora": (0.6, 0.5, 0.3)},
        100: {"lora": (0.1, 0.7), "dora": (0.8, 0.6)},
    }
    records = [
        replace(made, curve=(StepMetrics(1, 2.0, rate, 1.0),), cost=Cost(float(steps), 1.0))
        for steps, of_variant in scores.items()
        for variant, own in of_variant.items()
        for rate, score in zip(RATES, own, strict=False)
        for made in [record(variant, rate, 0, score, steps=steps)]
    ]
    summary = summarize_curves(records)
    titles = [panel.title for panel in summary.panels]
    assert len(set(titles)) == 2
    assert [panel.title for panel in loss_panels(summary, records)] == titles
    assert len(set(summary.warnings)) == len(summary.warnings)
    assert all(any(title in warning for warning in summary.warnings) for title in titles)
    headings = [verdict.heading for verdict in summary.verdicts]
    assert len(headings) == len(set(headings)) == 4
    costs = {(row.title, row.label): (row.train_seconds, row.score.mean) for row in summary.costs}
    assert costs == {
        (titles[0], "lora"): (50.0, 0.5),
        (titles[0], "dora"): (50.0, 0.6),
        (titles[1], "lora"): (100.0, 0.7),
        (titles[1], "dora"): (100.0, 0.8),
    }


def test_a_number_that_is_no_json_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = summarize_curves(study())
    monkeypatch.setattr(report, "summarize", lambda *_: replace(whole, tolerance=float("nan")))
    with pytest.raises(ValueError, match="JSON"):
        write_report(STUDY_FILE, study(), tmp_path, DATABASE)


def _intervals(value: Any) -> Iterator[tuple[float, float]]:
    if isinstance(value, dict):
        if set(value) == {"low", "high"}:
            yield value["low"], value["high"]
        value = list(value.values())
    for each in value if isinstance(value, list) else ():
        yield from _intervals(each)


@pytest.mark.parametrize("kind", ["curve", "search", "replicates"])
@pytest.mark.parametrize("has_items", [True, False])
def test_equal_seeds_do_not_make_a_score_certain(tmp_path: Path, kind: str, has_items: bool) -> None:
    """Two seeds score the same on 109 rows."""
    right = {1e-4: 60, 1e-3: 105, 3e-3: 105, 1e-2: 40}
    items = {rate: ItemResults((1.0,) * n + (0.0,) * (109 - n)) for rate, n in right.items()}
    records = [
        replace(
            record(variant, rate, seed, n / 109, untrained=0.2),
            items=dict.fromkeys(("validation", "test"), items[rate]) if has_items else {},
        )
        for variant in ("lora", "dora")
        for rate, n in right.items()
        for seed in range(2)
    ]
    settings = AnalysisSettings(kind=kind)  # type: ignore[arg-type]
    names = tuple(r.fingerprint for r in records)
    chosen = replace(STUDY_FILE, configurations=names, settings=settings)
    summary = write_report(chosen, records, tmp_path, DATABASE)
    console = Console(record=True, width=80, file=io.StringIO(), highlight=False)
    console.print(render_summary(summary))
    terminal = console.export_text()
    page = Page((tmp_path / "report.html").read_text()).text
    numbers = json.loads((tmp_path / "summary.json").read_text())
    assert all(low < high for low, high in _intervals(numbers))
    for text in (terminal, page):
        pairs = re.findall(r"\[([+-]?[\d.]+), ([+-]?[\d.]+)\]", text)
        assert all(low != high for low, high in pairs), pairs
    if kind == "curve":
        assert "0.963" in terminal
        assert ("[0.91, 0.99]" in terminal) == has_items
        assert any("no interval" in warning for warning in summary.warnings) != has_items
        assert numbers["panels"][0]["curves"][0]["best_rates"] == [1e-3, 3e-3]


class Page(HTMLParser):
    """A parsed page, with its links, tags, open elements and text."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.scripts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self.links += [v or "" for k, v in attrs if k in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("script", "style"):
            self.scripts.append(data)
        else:
            self.text += data


def written(
    folder: Path, records: list[Record], uri: str = DATABASE, **more: Any
) -> tuple[Summary, Page, dict[str, Any]]:
    """Write a report of STUDY_FILE with the fields `more`. Return the summary, the page and summary.json."""
    summary = write_report(replace(STUDY_FILE, **more), records, folder, uri)
    page = Page((folder / "report.html").read_text())
    assert page.open == []
    return summary, page, json.loads((folder / "summary.json").read_text())


@pytest.fixture(scope="module")
def of_study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Page]:
    """Write the report of the synthetic study. Return its folder, which no test may change, and the page."""
    folder = tmp_path_factory.mktemp("report") / "new" / "study"
    return folder, written(folder, study())[1]


def test_the_command_that_exports_names_the_folders_and_has_the_form_of_the_studys_command(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "mine" / "lr-sensitivity"
    study_file = replace(STUDY_FILE, command="lora-orchestrator study --dry-run", folder=folder)
    write_report(study_file, [record()], folder, "", tmp_path / "shared")
    page = Page((folder / "report.html").read_text())
    folders = f"--output {tmp_path / 'mine'} --store {tmp_path / 'shared'}"
    assert f"lora-orchestrator export lr-sensitivity {record().fingerprint[:12]} {folders}" in page.text


def test_the_command_of_each_rate_trains_its_seeds_in_another_output_and_store(tmp_path: Path) -> None:
    """With the folders of the study it would train nothing, because the results are known."""
    folder, seeds = tmp_path / "mine" / "lr-sensitivity", [record(seed=seed) for seed in range(2)]
    lanes = " ".join(each.fingerprint[:12] for each in seeds)
    again = f"lora-orchestrator study --config {folder / 'study.yaml'} --only {lanes}"
    output, other = f" --output {folder.parent}-again", tmp_path / "shared"
    for store, folders in ((None, output), (other, f"{output} --store {other}-again")):
        write_report(replace(STUDY_FILE, folder=folder), seeds, folder, "", store)
        assert f"{again}{folders}" in Page((folder / "report.html").read_text()).text.splitlines()


def test_a_report_is_four_whole_files_and_nothing_else(of_study: tuple[Path, Page]) -> None:
    folder, _ = of_study
    summary, page, numbers = written(folder, study())  # This replaces the first report.
    pictures = {f"{name}.{kind}" for name in ("curves", "heatmap", "spread") for kind in ("png", "svg")}
    assert {p.name for p in folder.iterdir()} == {"report.html", "summary.json", *pictures}
    assert [v["answer"] for v in numbers["verdicts"]] == [v.answer for v in summary.verdicts]
    assert all(v.answer in page.text for v in summary.verdicts)
    assert numbers["states"] == {"finished": 63, "collapsed": 13, "diverged": 29, "stopped": 0, "failed": 0}
    shown = {c["label"]: c for c in numbers["panels"][0]["curves"]}
    assert shown["lora"]["best_validation"]["mean"] == pytest.approx(2.9 / 3)
    assert "NaN" not in json.dumps(numbers)


def test_the_page_asks_no_other_host(of_study: tuple[Path, Page]) -> None:
    folder, page = of_study
    elsewhere = [link for link in page.links if not link.startswith(("data:image/png;base64,", "#"))]
    assert set(elsewhere) == {p.name for p in folder.glob("*.*g")}
    text = (folder / "report.html").read_text()
    assert "default-src 'none'" in text  # The browser itself refuses every request.
    assert not re.search(r"url\(|@import|<link|<script [^>]*src", text)


def test_unfinished_runs_are_listed_with_reason_and_fingerprint_and_no_text_becomes_markup(
    tmp_path: Path,
) -> None:
    markup = "<script>alert(1)</script>"
    failed = record(seed=8, validation=None, state="failed", reason=f"out of memory {markup}")
    stopped = record(seed=9, validation=0.1, state="stopped", reason="ASHA at step 30")
    records = [*study(), failed, stopped]
    missing = tuple(f"{i:064x}" for i in range(12))
    about: dict[str, Any] = {"name": markup, "question": "a & b < c", "configurations": missing}
    _, page, numbers = written(tmp_path, records, **about)
    assert "alert(1)" not in " ".join(page.scripts)
    assert "a & b < c" in page.text
    for text in (f"out of memory {markup}", "ASHA at step 30", "smoothed training loss", "12 pending"):
        assert text in page.text
    for ended in (failed, stopped):
        assert ended.fingerprint[:12] in page.text
    assert numbers["pending"] == 12


def test_a_server_is_linked_without_its_password(tmp_path: Path) -> None:
    uri = "https://me:secret@mlflow.example:5000/x"
    _, page, _ = written(tmp_path, [record()], uri, command=f"run --tracking-uri {uri}")
    assert "https://mlflow.example:5000/x" in page.links
    for file in ("report.html", "summary.json"):
        assert "secret" not in (tmp_path / file).read_text()


def test_a_tracking_uri_that_is_no_web_address_is_no_link(tmp_path: Path) -> None:
    _, page, _ = written(tmp_path, [record()], "javascript:alert(1)")
    assert not any(link.startswith("javascript") for link in page.links)
