"""What the end of a study prints."""

from __future__ import annotations

import pytest
from synthetic import record

from orchestrator.launch.reporting import export_words
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
