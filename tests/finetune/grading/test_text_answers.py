"""Grading of answers in words: choices and token F1."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from orchestrator.finetune.grading.text_answers import grade_choice, grade_token_f1


def test_grades_agree_with_labels_written_by_hand() -> None:
    groups = yaml.safe_load((Path(__file__).parent / "choices.yaml").read_text("utf-8"))
    found = [
        (group["reference"], answer)
        for group in groups
        for label in ("right", "wrong")
        for answer in group[label]
        if grade_choice(answer, group["reference"]) != float(label == "right")
    ]
    assert found == []


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("The Denver Broncos.", " denver broncos", 1.0),
        ("Denver", "Denver Broncos", 2 / 3),
        ("it is Denver, Denver", "Denver", 0.4),  # a repeated word counts once per word of the reference
        ("Carolina", "Denver", 0.0),
        ("", "Denver", 0.0),
        ("the", "a", 1.0),  # neither has a word that counts
    ],
)
def test_the_score_is_the_f1_of_the_words(answer: str, reference: str, score: float) -> None:
    assert grade_token_f1(answer, reference) == pytest.approx(score)
