"""What the end of a study prints."""

from __future__ import annotations

import pytest
from synthetic import record

from orchestrator.analyze.page import mlflow_ui_command
from orchestrator.launch.reporting import describe_failures, export_words
from orchestrator.record.schema import Record
from orchestrator.record.study_file import StudyFile

LETTERS, DIGITS, FAILED = record(), record(task="digits"), record(task="digits", state="failed")


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        ([LETTERS], [[]]),
        ([LETTERS, DIGITS], [["--task", "digits"], ["--task", "letters"]]),
        ([LETTERS, FAILED], [["--task", "letters"]]),
        ([FAILED], []),
    ],
)
def test_a_study_of_several_tasks_has_an_export_command_for_each(
    records: list[Record], expected: list[list[str]]
) -> None:
    """Without --task, `export` refuses such a study."""
    words = export_words(StudyFile("s", "", ""), records)
    assert words == [["export", "s", *each] for each in expected]


def test_failures_are_listed_once_for_each_reason() -> None:
    failed = [
        record(variant=name, state="failed", reason=reason, seed=seed)
        for seed, (name, reason) in enumerate(
            [("lora", "KeyError:\n 'g'"), ("dora", "KeyError: 'g'"), ("pissa", "x")]
        )
    ]
    first, second = describe_failures(failed, lambda *words: " ".join(words))
    assert first == f"  lora, dora: KeyError: 'g'; more: show {failed[0].fingerprint[:12]}"
    assert second == f"  pissa: x; more: show {failed[2].fingerprint[:12]}"
    many = [record(state="failed", reason=f"{seed} {'y' * 300}", seed=seed) for seed in range(7)]
    *lines, last = describe_failures(many, lambda *words: "")
    assert last == "  and 2 more reasons, in the report"
    assert max(map(len, lines)) < 230


def test_mlflow_is_opened_with_one_worker_on_a_database_only() -> None:
    """A busy machine does not start its four workers within their time limit."""
    assert mlflow_ui_command("sqlite:///a.db") == "mlflow ui --workers 1 --backend-store-uri sqlite:///a.db"
    assert mlflow_ui_command("http://server:5000") == ""
