"""Tests of the report: the HTML page, the chart files, summary.json and the description for MLflow."""

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
from synthetic import record, several_tasks, study

from orchestrator.analyze import render
from orchestrator.analyze.report import describe_study, write_report
from orchestrator.analyze.results import Results
from orchestrator.record.schema import ItemResults, Record
from orchestrator.record.study_file import AnalysisSettings, Source, StudyFile

STUDY = StudyFile(
    name="lr-sensitivity",
    question="How far apart are the best rates?",
    command="python experiments/lr_sensitivity.py --dry-run --variants lora pissa --seeds 3",
)
DATABASE = "sqlite:///results/mlflow.db"
KINDS = ("curve", "search", "replicates")


class Page(HTMLParser):
    """A parsed page: its links, its text, and its scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.scripts = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img", "br", "input"):
            self.open.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("script", "style"):
            self.scripts += data
        else:
            self.text += data


def written(
    folder: Path, records: list[Record], uri: str = DATABASE, **more: Any
) -> tuple[Results, Page, dict[str, Any], str]:
    """Write a report of STUDY, in which the fields `more` are replaced.

    Returns:
        The results, the parsed page, the content of summary.json, and the text for the terminal.
    """
    results, sections = write_report(replace(STUDY, **more), records, folder, uri)
    page = Page((folder / "report.html").read_text())
    assert page.open == []
    console = Console(record=True, width=80, file=io.StringIO(), highlight=False)
    console.print(render.to_terminal(sections))
    text = console.export_text()
    assert all(len(line) <= 80 for line in text.splitlines())
    return results, page, json.loads((folder / "summary.json").read_text()), text


def test_a_report_is_whole_files_and_nothing_else_and_asks_no_other_host(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "study"
    written(folder, several_tasks())
    (folder / "mine.png").write_bytes(b"a user's own picture")
    assert (folder / "curves-2.png").exists()
    results, page, numbers, terminal = written(folder, study())  # this replaces the first report
    pictures = set(numbers["pictures"])
    assert {"curves.png", "curves.svg", "heatmap.png", "heatmap.svg"} <= pictures
    assert not {name for name in pictures if "-2" in name}, "these are of the first report"
    assert {path.name for path in folder.iterdir()} == {"report.html", "summary.json", "mine.png", *pictures}
    assert [v["answer"] for v in numbers["verdicts"]] == list(results.verdicts["answer"])
    words = " ".join(page.text.split())
    assert all(" ".join(answer.split()) in words for answer in results.verdicts["answer"])
    assert numbers["states"] == {"finished": 63, "collapsed": 13, "diverged": 29, "stopped": 0, "failed": 0}
    shown = {row["curve"]: row for row in numbers["best"]}
    assert shown["lora"]["validation_score"] == pytest.approx(2.9 / 3)
    assert "NaN" not in json.dumps(numbers)
    elsewhere = {link for link in page.links if not link.startswith(("data:image/", "#"))}
    assert elsewhere == pictures
    html = (folder / "report.html").read_text()
    assert "default-src 'none'" in html, "the browser itself refuses every request"
    assert not re.search(r"url\((?!#)|@import|<link|<script [^>]*src", html)
    assert terminal.index("best") < terminal.index("DESCRIPTIVE"), "the table comes before the verdicts"


def _intervals(numbers: dict[str, Any]) -> Iterator[tuple[float, float]]:
    for frame in ("best", "points", "comparison"):
        for row in numbers[frame]:
            yield from (
                (row[name], row[f"{name.removesuffix('_low')}_high"])
                for name in row
                if name.endswith("_low") and row[name] is not None
            )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("has_items", [True, False])
def test_equal_seeds_do_not_make_a_score_certain(tmp_path: Path, kind: str, has_items: bool) -> None:
    """No interval has length 0 although two seeds have the same score on 109 items."""
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
    names = tuple(r.fingerprint for r in records)
    settings = AnalysisSettings(kind=kind)  # type: ignore[arg-type]
    results, page, numbers, terminal = written(tmp_path, records, configurations=names, settings=settings)
    assert all(low < high for low, high in _intervals(numbers))
    for shown in (terminal, page.text):
        pairs = re.findall(r"\[([+-]?[\d.]+), ([+-]?[\d.]+)\]", shown)
        assert all(low != high for low, high in pairs), pairs
    if kind == "curve":
        assert "0.963" in terminal
        assert ("[0.91, 0.99]" in terminal) == has_items
        assert any("no interval" in warning for warning in results.warnings) != has_items
        assert numbers["best"][0]["rates"] == "1e-3 = 3e-3"


def test_commands_name_the_folders_and_train_again_elsewhere(tmp_path: Path) -> None:
    """Commands that train again name other folders, because the study's own store already has the results."""
    folder, shared = tmp_path / "mine" / "lr-sensitivity", tmp_path / "shared"
    seeds = [record(seed=seed) for seed in range(2)]
    lanes = " ".join(each.fingerprint[:12] for each in seeds)
    write_report(replace(STUDY, folder=folder), seeds, folder, "", shared)
    text = Page((folder / "report.html").read_text()).text
    assert (
        f"export lr-sensitivity {seeds[0].fingerprint[:12]} --output {folder.parent} --store {shared}" in text
    )
    again = f"lora-orchestrator study --config {folder / 'study.yaml'} --only {lanes}"
    assert f"{again} --output {folder.parent}-again --store {shared}-again" in text


def test_runs_without_a_result_are_listed_and_no_text_becomes_markup(tmp_path: Path) -> None:
    markup = "<script>alert(1)</script>"
    failed = record(seed=8, validation=None, state="failed", reason=f"out of memory {markup}")
    stopped = record(seed=9, validation=0.1, state="stopped", reason="ASHA at step 30")
    missing = tuple(f"{i:064x}" for i in range(12))
    about: dict[str, Any] = {"name": markup, "question": "a & b < c", "configurations": missing}
    _, page, numbers, _ = written(tmp_path, [*study(), failed, stopped], **about)
    assert "alert(1)" not in page.scripts
    for text in ("a & b < c", f"out of memory {markup}", "ASHA at step 30", "smoothed training loss"):
        assert text in page.text
    assert "12 pending" in page.text
    assert all(ended.fingerprint[:12] in page.text for ended in (failed, stopped))
    assert numbers["pending"] == 12


def test_a_study_without_a_record_has_a_page(tmp_path: Path) -> None:
    _, page, numbers, _ = written(tmp_path, [], configurations=("a" * 64,))
    assert "1 pending" in page.text
    assert numbers["best"] == numbers["verdicts"] == []


def test_no_secret_and_no_script_comes_from_the_address_of_a_server(tmp_path: Path) -> None:
    uri = "https://me:secret@mlflow.example:5000/x"
    _, page, *_ = written(tmp_path, [record()], uri, command=f"run --tracking-uri {uri}")
    assert "https://mlflow.example:5000/x" in page.text
    for file in ("report.html", "summary.json"):
        assert "secret" not in (tmp_path / file).read_text()
    _, page, *_ = written(tmp_path, [record()], "javascript:alert(1)")
    assert not any(link.startswith("javascript") for link in page.links)


def test_a_fault_of_the_data_is_an_alarm_before_all_other_limits(tmp_path: Path) -> None:
    leak = "3 rows of the test split are in the training split"
    task = replace(record().configuration.task, content="c" * 16)
    own = [replace(r, configuration=replace(r.configuration, task=task)) for r in study()]
    own = [replace(r, fingerprint=r.configuration.fingerprint) for r in own]
    source = Source("c" * 16, "mails.py", title="mails by topic", warnings=(leak,))
    results, page, _, terminal = written(tmp_path, own, sources=(source,))
    assert results.warnings[0] == f"mails by topic: {leak}"
    assert leak in page.text
    assert f"! mails by topic: {leak}" in " ".join(terminal.split())


def test_mlflow_gets_the_table_the_verdicts_and_the_best_points_as_metrics() -> None:
    text, metrics = describe_study(STUDY, study())
    assert "| lora | 1e-2 |" in text
    assert text.index("| lora |") < text.index("Descriptive: ")
    assert metrics["best_log10_learning_rate.lora"] == pytest.approx(-2)
    assert metrics["best_validation_score.lora"] == pytest.approx(0.967, abs=1e-3)
    assert metrics["best_test_score.lora"] > 0.9
    assert not any(name.startswith("verdict") for name in metrics), "a descriptive verdict has no number"
    several = describe_study(STUDY, several_tasks()).metrics
    assert "best_test_score.lora.digits" in several
    two = [record(steps=steps, validation=score) for steps, score in ((60, 0.5), (600, 0.75))]
    name = "best_validation_score.lora.letters on letters-base (steps_horizon={})"
    found = describe_study(STUDY, two).metrics
    assert (found[name.format(60)], found[name.format(600)]) == (0.5, 0.75)


def test_no_best_rate_is_named_where_nothing_was_learned(tmp_path: Path) -> None:
    learned = [record("lora", r, 0, x, floor=0.1) for r, x in ((1e-3, 0.3), (1e-2, 0.9), (1e-1, 0.1))]
    floor = [record("dora", r, 0, x, floor=0.1) for r, x in ((1e-3, 0.1), (1e-2, 0.05), (1e-1, None))]
    results, _, _, terminal = written(tmp_path, [*learned, *floor])
    assert results.best.set_index("curve")["nothing_learned"].to_dict() == {"lora": False, "dora": True}
    row = next(line for line in terminal.splitlines() if line.startswith("dora "))
    assert "nothing" in row
    assert "best_log10_learning_rate.dora" not in describe_study(STUDY, [*learned, *floor]).metrics
