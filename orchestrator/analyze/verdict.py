"""The verdict on a claim, in the words that the terminal, the report, MLflow and Python share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

VerdictOutcome = Literal["supported", "refuted", "undecided", "descriptive"]
"""The outcome for a claim. A descriptive verdict states what the data show and has no error rate."""


@dataclass(frozen=True)
class Verdict:
    """What a study says about one claim. Every text is plain and complete; nobody rephrases it."""

    claim: str
    """The claim in one sentence."""
    outcome: VerdictOutcome
    answer: str
    """What the data say in one to three sentences, with the deciding numbers and their intervals."""
    design: str
    """One sentence: tasks, models, variants, factors, seeds or replicates, and budget."""
    next_step: str = ""
    """One sentence that says what would narrow the answer; empty if nothing would."""
    next_command: str = ""
    """The command for `next_step`, or empty."""
