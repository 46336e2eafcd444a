"""Grading of answers in words: by a choice, by common words, and by the instructions of the prompt.

Choices are those of the eight tasks of commonsense-15k: `true` and `false` (BoolQ), `solution1` (PIQA),
`answer3` (SIQA, ARC, OBQA), `ending4` (HellaSwag) and `option2` (WinoGrande). The models are trained on "the
correct answer is option2".

Instructions are those of IFEval (Zhou et al. 2023), with lm-eval's checker. Two of its 25 kinds (capital
words, number of sentences) split text with NLTK's data `punkt_tab`. NLTK downloads it from GitHub to
NLTK_DATA: `python -m nltk.downloader punkt_tab`.
"""

from __future__ import annotations

import contextlib
import io
import re
import string
from collections import Counter
from collections.abc import Mapping
from functools import cache
from types import ModuleType
from typing import Any

from orchestrator.util.errors import UsageError, install_hint

_CHOICE = re.compile(
    r"(?<![a-z0-9])(?:(true|false)|(solution|answer|ending|option)\s?\(?([1-9])\)?)(?![a-z0-9])(?!\s*/)"
)
_STATED = re.compile(r"(?:correct|right|best|final)?\s*(?:answer|choice|option)\s*(?:is|:|=)\s*:?\s*")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def grade_choice(answer: str, reference: str) -> float:
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
    stated = (_CHOICE.match(text, each.end()) for each in _STATED.finditer(text))
    match = next(filter(None, stated), None) or _CHOICE.search(text)
    return (match[1] or match[2] + match[3]) if match else None


def grade_token_f1(answer: str, reference: str) -> float:
    """Return the F1 of an answer's words, from 0 to 1 (SQuAD, Rajpurkar et al. 2016).

    Case, punctuation and articles do not count.

    Args:
        answer: The generated text.
        reference: The expected text.
    """
    found, expected = Counter(_words(answer)), Counter(_words(reference))
    if not found or not expected:
        return float(found == expected)
    return 2 * (found & expected).total() / (found.total() + expected.total())


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def grade_instructions(row: Mapping[str, Any], answer: str) -> float:
    """Return 1.0 if an answer strictly follows every instruction, else 0.0 (prompt-level strict accuracy).

    Args:
        row: A row of google/IFEval: `prompt`, `instruction_id_list` and `kwargs`.
        answer: The generated answer.

    Raises:
        UsageError: lm-eval or data that it needs are not installed.
    """
    try:
        scores = load_checker().process_results({"key": 0, **row}, [answer])
    except LookupError as error:
        if "punkt_tab" not in str(error):
            raise
        raise UsageError(
            f"IFEval's instructions {', '.join(row['instruction_id_list'])} need NLTK's data 'punkt_tab', "
            "which is not on this machine. Run: python -m nltk.downloader punkt_tab"
        ) from None
    return float(scores["prompt_level_strict_acc"])


@cache
def load_checker() -> ModuleType:
    """Return lm-eval's module with the checker.

    Raises:
        UsageError: lm-eval is not installed.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints "Downloaded" even if the download failed
            import langdetect
            from lm_eval.tasks.ifeval import utils
    except ImportError as error:
        raise UsageError(
            f"The grader of IFEval needs {error.name}, which is not installed: {install_hint('ifeval')}"
        ) from None
    langdetect.DetectorFactory.seed = 0  # detecting the language of a text uses random numbers
    return utils
