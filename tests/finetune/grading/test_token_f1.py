"""Grading by shared words, as SQuAD's evaluation script computes it."""

from __future__ import annotations

import pytest

from orchestrator.finetune.grading import token_f1


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
    assert token_f1.grade(answer, reference) == pytest.approx(score)
