"""The verdict on a claim, as texts that the terminal, the report, MLflow and `load` show unchanged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

VerdictOutcome = Literal["supported", "refuted", "undecided", "descriptive"]
"""The outcome for a claim. A descriptive verdict tests nothing, so it has no error rate."""


@dataclass(frozen=True)
class Verdict:
    """The answer of a study to one claim. All texts are complete sentences, shown without further wording."""

    claim: str
    """The claim in one sentence."""
    outcome: VerdictOutcome
    answer: str
    """The result in a few sentences, with the deciding numbers and their intervals."""
    design: str
    """The tasks, models, variants, factors, seeds or replicates, and budget, in one to three sentences."""
    next_step: str = ""
    """One or two sentences on what would make the answer more precise; empty if nothing would."""
    next_command: str = ""
    """The command for `next_step`, or empty."""
    scope: str = ""
    """The task or tasks to which the outcome applies, such as "digits"; empty if the claim names them."""

    @property
    def heading(self) -> str:
        """The claim with its scope, as it is shown beside the outcome."""
        return f"{self.claim.removesuffix('.')} ({self.scope})." if self.scope else self.claim
