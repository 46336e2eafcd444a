"""Grading of an answer by its words in common with the reference: F1 of SQuAD (Rajpurkar et al. 2016)."""

from __future__ import annotations

import re
import string
from collections import Counter

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def grade(answer: str, reference: str) -> float:
    """Return the F1 of an answer's words, from 0 to 1. Case, punctuation and articles do not count.

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
