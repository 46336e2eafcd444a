"""IFEval's grades of answers whose correctness follows from the instructions."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.finetune.grading.text_answers import grade_instructions
from orchestrator.util.errors import UsageError


def _row(*instructions: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    # As on the hub, the options of every instruction have all keys, and most values are null.
    options = {key: None for _, arguments in instructions for key in arguments}
    return {
        "key": 1000,
        "prompt": "Write something.",
        "instruction_id_list": [name for name, _ in instructions],
        "kwargs": [{**options, **arguments} for _, arguments in instructions],
    }


NO_COMMA = ("punctuation:no_comma", {})
WORDS = ("length_constraints:number_words", {"relation": "at least", "num_words": 5})
JSON = ("detectable_format:json_format", {})
LOWER = ("change_case:english_lowercase", {})
ENDS = ("startend:end_checker", {"end_phrase": "That is all."})
BULLETS = ("detectable_format:number_bullet_lists", {"num_bullets": 2})
FORBIDDEN = ("keywords:forbidden_words", {"forbidden_words": ["never"]})
GERMAN = ("language:response_language", {"language": "de"})


@pytest.mark.parametrize(
    ("instructions", "answer", "right"),
    [
        ([NO_COMMA], "One and two.", True),
        ([NO_COMMA], "One, two.", False),
        ([WORDS], "one two three four five", True),
        ([WORDS], "one two three four", False),
        ([JSON], '{"a": [1, 2]}', True),
        ([JSON], '```json\n{"a": 1}\n```', True),
        ([JSON], "a: 1", False),
        ([LOWER], "this is an answer in small english letters", True),
        ([LOWER], "This is an answer in English letters", False),
        ([ENDS], "It rains. That is all.", True),
        ([ENDS], "That is all. It rains.", False),
        ([BULLETS], "* one\n* two", True),
        ([BULLETS], "* one\n* two\n* three", False),
        ([FORBIDDEN], "I always do.", True),
        ([FORBIDDEN], "I never do.", False),
        ([GERMAN], "Das ist eine Antwort in deutscher Sprache und nichts anderes.", True),
        ([GERMAN], "This is an answer in English and nothing else at all.", False),
        ([NO_COMMA, WORDS], "one two three four five", True),
        ([NO_COMMA, WORDS], "one, two three four five", False),
        ([NO_COMMA], "", False),
    ],
)
def test_an_answer_is_graded_by_all_its_instructions(
    instructions: list[Any], answer: str, right: bool
) -> None:
    assert grade_instructions(_row(*instructions), answer) == float(right)


def test_missing_nltk_data_are_named_with_the_command_that_downloads_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import nltk

    monkeypatch.setattr(nltk.data, "path", [])
    row = _row(
        ("change_case:capital_word_frequency", {"capital_relation": "at least", "capital_frequency": 1})
    )
    with pytest.raises(
        UsageError, match=r"capital_word_frequency need NLTK's data 'punkt_tab'.*nltk\.downloader punkt_tab"
    ):
        grade_instructions(row, "ONE two")
