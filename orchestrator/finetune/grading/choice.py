"""Grading of multiple-choice answers in free text, for the eight tasks of commonsense-15k.

The choices are `true` and `false` (BoolQ), `solution1` (PIQA), `answer3` (SIQA, ARC, OBQA), `ending4`
(HellaSwag) and `option2` (WinoGrande). The models are trained on "the correct answer is option2".
"""

from __future__ import annotations

import re

_CHOICE = re.compile(
    r"(?<![a-z0-9])(?:(true|false)|(solution|answer|ending|option)\s?\(?([1-9])\)?)(?![a-z0-9])(?!\s*/)"
)
_STATED = re.compile(r"(?:correct|right|best|final)?\s*(?:answer|choice|option)\s*(?:is|:|=)\s*:?\s*")


def grade(answer: str, reference: str) -> float:
    """Return 1.0 if an answer takes the reference's choice, else 0.0.

    The choice of a text is the first one that follows "the correct answer is", or else the first one in the
    text, as in LLM-Adapters' own evaluation.

    Args:
        answer: The generated text.
        reference: The correct choice, alone or in the sentence of the training data.
    """
    return float(_extract_choice(answer) == _extract_choice(reference) is not None)


def _extract_choice(text: str) -> str | None:
    text = re.sub(r"[*_`\"']", "", text.lower())
    for stated in _STATED.finditer(text):
        match = _CHOICE.match(text, stated.end())
        if match:
            return _choice_name(match)
    match = _CHOICE.search(text)
    return _choice_name(match) if match else None


def _choice_name(match: re.Match[str]) -> str:
    return match.group(1) or match.group(2) + match.group(3)
