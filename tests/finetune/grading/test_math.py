"""Grades of numbers and formulas in free text against labels written by hand."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.finetune.grading import math
from orchestrator.finetune.grading.math import extract_answer, grade

HERE = Path(__file__).parent

KNOWN = {("18", "The answer is 18 more than 20, so 38"): "what follows 'answer is' counts"}
"""(reference, answer) -> reason, for the known wrong grades that docs/grading.md counts."""


def _labelled(name: str) -> list[tuple[str, str, bool]]:
    groups = yaml.safe_load((HERE / name).read_text("utf-8"))
    return [
        (a, g["reference"], label == "right")
        for g in groups
        for label in ("right", "wrong")
        for a in g[label]
    ]


@pytest.mark.parametrize(("name", "least"), [("math_answers.yaml", 300), ("more_math_answers.yaml", 80)])
def test_grades_agree_with_labels_written_by_hand(name: str, least: int) -> None:
    labelled = _labelled(name)
    assert len(labelled) >= least
    found = {
        (reference, answer)
        for answer, reference, right in labelled
        if grade(answer, reference) != float(right)
    }
    assert found == {
        key for key in KNOWN if any(key == (reference, answer) for answer, reference, _ in labelled)
    }


def test_grading_works_in_threads_where_alarms_cannot_be_set() -> None:
    grades: list[float] = []
    thread = threading.Thread(target=lambda: grades.append(grade("\\boxed{\\sqrt{27}}", "3\\sqrt{3}")))
    thread.start()
    thread.join()
    assert grades == [1.0]


@pytest.mark.parametrize(
    "answer",
    [
        "9^{9^{9^9}}",
        "9^9^9^9^9",
        "9**9**9**9",
        "(9^{9999})^{9999}",
        "2^{9999999999}",
        "99999999!",
        "9!!!!!!!!",
        "2^{9!!}",
        "(x+1)^{9999}",
        "(x+y+z+w)^{30}",
        "((x+y+z+w)^5)^5",
        "(1+\\sqrt{2})^{99999}",
        "1" * 100_000,
    ],
    ids=lambda answer: answer[:24],
)
def test_an_expression_that_takes_forever_to_evaluate_is_not_evaluated(
    answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[str] = []
    real = math._parse

    def parse(text: str) -> Any:
        parsed.append(text)
        return real(text)

    monkeypatch.setattr(math, "_parse", parse)
    assert grade(f"The answer is \\boxed{{{answer}}}", "1024") == 0.0
    assert all(re.fullmatch(r"\d{1,8}", text) for text in parsed), "only plain numbers are evaluated"


def test_the_highest_power_of_a_group_that_is_expanded_is_graded() -> None:
    assert grade("\\boxed{(x+y+z+w+a+b)^{12}}", "1024") == 0.0
    assert grade("\\boxed{(x+1)^{12}}", "(1+x)^{12}") == 1.0


@pytest.mark.parametrize("piece", ["(", "1", "\\boxed{", "\\frac{1}", "answer is ", "$", ",", "a^"])
def test_only_the_end_of_a_text_that_repeats_itself_is_read(piece: str) -> None:
    text = piece * 5000
    assert grade(f"The answer is {text}", "1024") == 0.0
    assert extract_answer(f"#### 7 {text}") == extract_answer(text), "the text before the end has no effect"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("so 3 + 4 = 7 apples.", "7"),
        ("\\boxed{\\frac{1}{2}} and 3", "\\frac{1}{2}"),
        ("#### 1,234", "1234"),
        ("none", ""),
    ],
)
def test_the_answer_is_found_in_a_text(text: str, value: str) -> None:
    assert extract_answer(text) == value
