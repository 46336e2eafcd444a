"""Tasks and variants of the user in reports: titles and names, never paths."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
from synthetic import record

from orchestrator.analyze.report import write_report
from orchestrator.analyze.study_description import describe_study
from orchestrator.analyze.study_frames import load
from orchestrator.analyze.task_titles import entitle
from orchestrator.record.schema import Record
from orchestrator.record.store import Store
from orchestrator.record.study_file import Source, StudyFile, read_studies
from orchestrator.record.tables import write_parquet


def own(content: str, name: str, variant: str = "lora", rate: float = 1e-2, score: float = 0.5) -> Record:
    found = record(variant, rate, 0, score, task=name)
    task = replace(found.configuration.task, content=content)
    configuration = replace(found.configuration, task=task)
    return replace(found, configuration=configuration, fingerprint=configuration.fingerprint)


def test_an_own_task_is_shown_by_its_title_everywhere(tmp_path: Path) -> None:
    grid = [(variant, rate) for variant in ("lora", "my_variant.py") for rate in (1e-3, 1e-2, 1e-1)]
    records = [own("c" * 16, "old_name.py", variant, rate, 0.9 - rate) for variant, rate in grid]
    study = StudyFile(
        "own",
        "Which?",
        "python experiments/lr_sensitivity.py --task /home/me/mail_task.py",
        tuple(each.fingerprint for each in records),
        sources=(Source("c" * 16, "mail_task.py", "/home/me/mail_task.py", "mails by topic"),),
    )
    summary = write_report(study, records, tmp_path, "")
    (panel,) = summary.panels
    assert panel.task == "mails by topic"
    assert {curve.label for curve in panel.curves} == {"lora", "my_variant.py"}
    page = (tmp_path / "report.html").read_text()
    assert "<h3>mails by topic on letters-base</h3>" in page
    assert "old_name.py" not in page
    assert json.loads((tmp_path / "summary.json").read_text())["panels"][0]["task"] == "mails by topic"
    assert "Best points: mails by topic" in describe_study(study, records).text


def test_tables_have_the_title_beside_the_name_of_the_file(tmp_path: Path) -> None:
    records = [own("c" * 16, "old_name.py"), record(task="letters"), record(task="words")]
    store = Store(tmp_path / "store")
    for each in records:
        store.put(each)
    sources = (Source("c" * 16, "mail_task.py", title="mails by topic"),)
    study = StudyFile("own", "", "x", tuple(each.fingerprint for each in records), sources=sources)
    study.write(tmp_path / "own")
    titles = {"mails by topic", "letters", "words"}
    loaded = load("own", output=tmp_path)
    for frame in (loaded.runs, loaded.points):
        assert dict(zip(frame["task_title"], frame["task"], strict=True)) == {
            "mails by topic": "mail_task.py",
            "letters": "letters",
            "words": "words",
        }
    assert {panel.task for panel in loaded.summary.panels} == titles
    assert (
        set(pq.read_table(write_parquet(store, read_studies(tmp_path).values()))["task_title"].to_pylist())
        == titles
    )


def test_two_tasks_with_one_title_stay_two() -> None:
    records = [
        own("a" * 16, "one.py"),
        own("b" * 16, "two.py"),
        record(task="letters"),
        own("d" * 16, "d.py"),
    ]
    sources = [Source("a" * 16, "one.py", title="mails"), Source("b" * 16, "two.py", title="mails")]
    sources.append(Source("d" * 16, "d.py", title="letters"))
    study = StudyFile("own", "", "x", sources=tuple(sources))
    names = [each.configuration.task.name for each in entitle(study, records)]
    assert names == ["mails (one.py)", "mails (two.py)", "letters", "letters (d.py)"]
    assert [each.fingerprint for each in entitle(study, records)] == [each.fingerprint for each in records]
