"""Grading of answers by the instructions in their prompts: IFEval (Zhou et al. 2023), with lm-eval's checker.

Two of its 25 kinds of instructions (capital words, number of sentences) split text with NLTK's data
`punkt_tab`. NLTK downloads it from GitHub to NLTK_DATA: `python -m nltk.downloader punkt_tab`.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from functools import cache
from types import ModuleType
from typing import Any

from orchestrator.util.errors import UsageError, install_hint


def grade(row: Mapping[str, Any], answer: str) -> float:
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
