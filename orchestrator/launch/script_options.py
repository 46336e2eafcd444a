"""The options that single scripts add. Imports nothing heavy, so that --help is fast."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.study.options import StudyOptions
from orchestrator.util.errors import UsageError

MAX_WIDENING = 5.0
"""The most decades by which a grid may grow at each end."""


@dataclass(frozen=True, kw_only=True)
class WideningOptions:
    """Widening of the grid of learning rates."""

    widen: float = 1.0
    """Decades by which the grid may grow at each end, half a decade at a time and for every variant alike,
    while the best rate of a variant lies on its edge; 0: the grid stays as it is."""


@dataclass(frozen=True, kw_only=True)
class CurveOptions(StudyOptions, WideningOptions):
    """Options of a study of learning rate curves."""

    def check_widening(self) -> None:
        """Check the options of the widening.

        Raises:
            UsageError: --widen is negative or wider than a grid may be.
        """
        if not 0 <= self.widen <= MAX_WIDENING:
            raise UsageError(f"--widen {self.widen:g}: must be from 0 to {MAX_WIDENING:g} decades; take 1.")


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
