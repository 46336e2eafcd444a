"""The options of the experiments with two stages. Imports nothing heavy, so that --help is fast."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.study import bounds
from orchestrator.study.options import StudyOptions
from orchestrator.util.errors import UsageError

FIRST_CONFIRM_SEED = 1000
"""Tuning uses the seeds below this one, the comparison those from it on."""


@dataclass(frozen=True, kw_only=True)
class ConfirmationOptions:
    """Confirmation of the chosen points."""

    confirm_seeds: int = 10
    """How many fresh seeds train each chosen point; fix the number before you look."""
    margin: float = 0.01
    """The smallest difference of the test score that matters to you, fixed before you look: 0.01 is one
    point."""


@dataclass(frozen=True, kw_only=True)
class ComparisonOptions(StudyOptions, ConfirmationOptions):
    """Options of a comparison of tuned variants."""

    def check_comparison(self) -> None:
        """Check the options of the comparison itself.

        Raises:
            UsageError: The seeds or the margin cannot give a verdict.
        """
        if self.confirm_seeds < 2:
            raise UsageError(
                f"--confirm-seeds {self.confirm_seeds}: must be 2 or more, for an interval; take 10."
            )
        bounds.check_bound("--confirm-seeds", self.confirm_seeds, bounds.MAX_POINTS)
        bounds.check_positive("--margin", self.margin, "0.01")
        if self.seed_count > FIRST_CONFIRM_SEED:
            raise UsageError(
                f"--seeds {self.seeds}: seeds from {FIRST_CONFIRM_SEED} on are for the verdict; "
                f"take {FIRST_CONFIRM_SEED}."
            )


@dataclass(frozen=True, kw_only=True)
class EarlyStoppingOptions(StudyOptions):
    """Options of a comparison of early stopping with the full grid."""

    scheduler: str = "asha"
    """The early stopping that is judged: asha, median, hyperband (Ray Tune's)."""

    def check_comparison(self) -> None:
        """Check the options of the comparison itself.

        Raises:
            UsageError: There is no grid, or no early stopping to compare with it.
        """
        if self.search != "grid":
            raise UsageError(
                f"--search {self.search}: early stopping is compared with the full grid; take grid."
            )
        if self.scheduler == "none":
            raise UsageError(
                "--scheduler none: the full grid is trained anyhow; take asha, median or hyperband."
            )
