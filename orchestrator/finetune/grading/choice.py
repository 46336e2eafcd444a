"""Which of the offered choices an answer in free text takes: commonsense-15k's eight tasks.

Their answers are `true` or `false` (BoolQ), `solution1` (PIQA), `answer3` (SIQA, ARC, OBQA), `ending4`
(HellaSwag), `option2` (WinoGrande), trained as "the correct answer is option2".
"""

from __future__ import annotations

import re

_CHOICE = re.compile(
    r"(?<![a-z0-9])(?:(true|false)|(solution|answer|ending|option)\s?\(?([1-9])\)?)(?![a-z0-9])(?!\s*/)"
)
_STATED = re.compile(r"(?:correct|right|best|final)?\s*(?:answer|choice|option)\s*(?:is|:|=)\s*:?\s*")


def grade(answer: str, reference: str) -> float:
    """1.0 when `answer` takes the choice `truth`, else 0.0. The choice counts that first follows "the correct
    answer is"; without one the first that is named at all, as the data's own evaluation takes it. `truth` may
    be the choice or the sentence that it is trained on."""
    return float(_extract_choice(answer) == _extract_choice(reference) is not None)


def _extract_choice(text: str) -> str | None:
    text = re.sub(r"[*_`\"']", "", text.lower())
    for stated in _STATED.finditer(text):
        found = _CHOICE.match(text, stated.end())
        if found:
            return _choice_name(found)
    found = _CHOICE.search(text)
    return _choice_name(found) if found else None


def _choice_name(found: re.Match[str]) -> str:
    return found.group(1) or found.group(2) + found.group(3)
