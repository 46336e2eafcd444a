"""Does an answer follow the instructions of its prompt? IFEval (Zhou et al. 2023), by lm-eval's checker.

Two of its 25 kinds of instruction (capital words, number of sentences) cut text with NLTK's `punkt_tab`,
which is data that NLTK downloads from GitHub: once `python -m nltk.downloader punkt_tab` (NLTK_DATA: where).
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from functools import cache
from types import ModuleType
from typing import Any

from orchestrator.util.errors import UsageError


def grade(row: Mapping[str, Any], answer: str) -> float:
    """1.0 when the answer follows every instruction of `row` (google/IFEval: `prompt`, `instruction_id_list`,
    `kwargs`), strictly; else 0.0: prompt-level strict accuracy, of which the mean is the task's score."""
    return float(score_instructions(row, answer)["prompt_level_strict_acc"])


def score_instructions(row: Mapping[str, Any], answer: str) -> dict[str, Any]:
    """lm-eval's four measures: prompt and instruction level, strict and loose."""
    try:
        return load_checker().process_results({"key": 0, **row}, [answer])
    except LookupError as error:
        if "punkt_tab" not in str(error):
            raise
        raise UsageError(
            f"IFEval's instructions {', '.join(row['instruction_id_list'])} need NLTK's data 'punkt_tab', "
            "which is not on this machine. Run: python -m nltk.downloader punkt_tab"
        ) from None


@cache
def load_checker() -> ModuleType:
    """lm-eval's. Raises BadInput when it is not installed."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it says "Downloaded" when it could not
            import langdetect
            from lm_eval.tasks.ifeval import utils
    except ImportError as error:
        raise UsageError(
            f"IFEval is graded by lm-eval, and {error.name} is not installed. "
            "Run: pip install 'lora-orchestrator[ifeval]'"
        ) from None
    langdetect.DetectorFactory.seed = 0  # the language of a short text is guessed by sampling
    return utils
