"""The page of a replicated tuning, and the next step that its verdict names."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from test_report import DATABASE, Page
from tuned_records import Truth, study_of, tuned_records

from orchestrator.analyze.report import write_report
from orchestrator.analyze.summary import summarize

TRUTHS = {
    "lora": Truth(),
    "pissa": Truth(0.85, -2.6),
    "hira": Truth(0.9, -1.0),
    "full": Truth(0.95, -3.0),
}


def test_an_undecided_claim_names_the_command_with_the_replicates_that_decide_it() -> None:
    records = tuned_records({"lora": Truth(), "pissa": Truth(0.9, -2.4)}, 5, noise=0.01)
    planned = summarize(study_of(records, max_replicates=200), records).verdicts[0]
    assert planned.outcome == "undecided"
    assert "--replicates" in planned.next_command
    assert "--study" not in planned.next_command
    beyond = summarize(study_of(records, max_replicates=5), records).verdicts[0]
    assert "--max-replicates" in beyond.next_command
    assert "--study t-" in beyond.next_command
    spent = summarize(study_of(records, max_replicates=4), records).verdicts[0]
    assert (spent.outcome, spent.next_command) == ("undecided", ""), "a new study is needed"
    study = study_of(records)
    missing = summarize(replace(study, configurations=("missing", *study.configurations)), records)
    assert missing.verdicts[0].next_command == study.command
    assert any("have not ended" in warning for warning in missing.warnings)


def test_the_page_has_the_verdicts_of_two_tasks(tmp_path: Path) -> None:
    records = [
        r for i, task in enumerate(("digits", "letters")) for r in tuned_records(TRUTHS, 7, task=task, seed=i)
    ]
    summary = write_report(study_of(records, max_replicates=7), records, tmp_path, DATABASE)
    page = Page((tmp_path / "report.html").read_text())
    assert page.open == []
    text = " ".join(page.text.split())
    for verdict in summary.verdicts:
        assert verdict.answer in text
        assert verdict.design in text
    assert "full" not in summary.verdicts[2].answer, "a control is no variant"
    numbers = json.loads((tmp_path / "summary.json").read_text())
    assert [task["task"] for task in numbers["comparison"]["tasks"]] == ["digits", "letters"]
    assert "NaN" not in json.dumps(numbers)


def test_one_replicate_gives_a_page_without_intervals(tmp_path: Path) -> None:
    records = tuned_records(TRUTHS, 1)
    summary = write_report(study_of(records), records, tmp_path, DATABASE)
    assert summary.verdicts[0].outcome == "undecided"
    assert summary.comparison is not None
    assert all(row.interval is None for row in summary.comparison.tasks[0].rows)
    assert summary.comparison.tasks[0].fixed_rate is None
