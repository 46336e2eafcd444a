"""Options of single scripts. This module imports no slow package, so that --help is fast."""

from __future__ import annotations

from dataclasses import dataclass, replace

from orchestrator.study import bounds
from orchestrator.study.grids import parse_learning_rates
from orchestrator.study.options import StudyOptions
from orchestrator.util.errors import UsageError

DRY_RUN_RATES_PER_DECADE = 4
MAX_RATES_PER_DECADE = 100
MAX_WIDENING = 5.0
"""Bound of --widen: decades by which a grid may be extended at each end."""
DEFAULT_FACTORS = (
    "alpha", "rank", "batch_size", "dropout", "warmup", "weight_decay", "schedule", "steps"
)  # fmt: skip
MIN_LEVELS, MAX_LEVELS = 1, 3
"""Bounds of --levels, the number of levels besides the default."""
DRY_RUN_FACTORS = ("alpha", "batch_size")
DEFAULT_REPLICATES, DRY_RUN_REPLICATES = 10, 5
DRY_RUN_RATES = ("1e-3:3.17e-2:2",)
DEFAULT_FACTOR_SEEDS, DRY_RUN_FACTOR_SEEDS = 5, 2
MIN_CURVE_RATES = 5
"""Smallest number of rates of the curve in a star design."""


@dataclass(frozen=True, kw_only=True)
class WideningOptions:
    """Refinement and widening of the grid of learning rates."""

    rates_per_decade: int | None = None
    """Without --learning-rates: refine the task's grid to about this number of rates a decade; 0 leaves it as
    it is. Default: 4 for a --dry-run, else 0, because the cost grows with the number of rates."""
    widen: float = 1.0
    """Decades by which the grid may grow at each end, half a decade at a time and for every variant alike,
    while the best rate of a variant lies on its edge; 0: the grid stays as it is."""


@dataclass(frozen=True, kw_only=True)
class CurveOptions(StudyOptions, WideningOptions):
    """Options of a study of learning rate curves."""

    def check_widening(self) -> None:
        """Check the options of refinement and widening.

        Raises:
            UsageError: --widen or --rates-per-decade is out of bounds, or --rates-per-decade is given
                together with --learning-rates.
        """
        if not 0 <= self.widen <= MAX_WIDENING:
            raise UsageError(f"--widen {self.widen:g}: must be from 0 to {MAX_WIDENING:g} decades; take 1.")
        if not 0 <= (self.rates_per_decade or 0) <= MAX_RATES_PER_DECADE:
            raise UsageError(
                f"--rates-per-decade {self.rates_per_decade}: must be from 0 to "
                f"{MAX_RATES_PER_DECADE}; take 4."
            )
        if self.rates_per_decade is not None and self.learning_rates is not None:
            raise UsageError(
                f"--rates-per-decade {self.rates_per_decade} with --learning-rates: it refines the task's "
                "own grid; take one of the two away."
            )

    @property
    def refinement(self) -> int:
        """Rates a decade to which the task's grid is refined; 0 for no refinement."""
        if self.learning_rates is not None:
            return 0
        if self.rates_per_decade is not None:
            return self.rates_per_decade
        return DRY_RUN_RATES_PER_DECADE if self.dry_run else 0


@dataclass(frozen=True, kw_only=True)
class ReplicateOptions:
    """Replicates of the tuning, and what counts as a difference."""

    replicates: int | None = None
    """How often every variant is tuned. Replicate k has the seed k and a grid shifted by an offset of its
    own; with --search it is a search of its own. Default: 10; in a rehearsal 5, of three variants on four
    rates."""
    max_replicates: int | None = None
    """The largest number of replicates that this study may ever have, fixed before the first look. The
    error rate of 5 % is shared out over at most five looks on the way there, so that intervals are wider
    before the last one. Default: --replicates, one look."""
    margin: float = 0.01
    """The smallest difference of the test score that matters to you, fixed before you look: 0.01 is one
    point."""


@dataclass(frozen=True, kw_only=True)
class ComparisonOptions(StudyOptions, ReplicateOptions):
    """Options of a comparison of tuned variants."""

    def check_comparison(self) -> None:
        """Check the options of the comparison.

        Raises:
            UsageError: --seeds is given, or the number of replicates or the margin is out of bounds.
        """
        if self.seeds is not None:
            raise UsageError(
                f"--seeds {self.seeds}: each replicate has a seed of its own; take --replicates {self.seeds}."
            )
        count = self.replicate_count
        if count < 2:
            raise UsageError(f"--replicates {count}: must be 2 or more, for an interval; take 10.")
        bounds.check_bound("--replicates", count, bounds.MAX_POINTS)
        bounds.check_bound("--max-replicates", self.max_replicates, bounds.MAX_POINTS)
        if self.max_replicates is not None and self.max_replicates < count:
            raise UsageError(
                f"--max-replicates {self.max_replicates}: must be at least the replicates of this command, "
                f"{count}; take {count}."
            )
        if not 0 < self.margin < 1:
            raise UsageError(f"--margin {self.margin:g}: must be above 0 and below 1, for example 0.01.")

    @property
    def seed_count(self) -> int:
        """Number of seeds per point, one for each replicate."""
        return self.replicate_count

    @property
    def replicate_count(self) -> int:
        """Number of replicates; the default is 10, for a --dry-run 5."""
        if self.replicates is not None:
            return self.replicates
        return DRY_RUN_REPLICATES if self.dry_run else DEFAULT_REPLICATES

    def with_rehearsal_grid(self) -> ComparisonOptions:
        """Return the options, with a small grid if this is a --dry-run of a grid without --learning-rates."""
        if self.dry_run and self.search == "grid" and self.learning_rates is None:
            return replace(self, learning_rates=DRY_RUN_RATES)
        return self


@dataclass(frozen=True, kw_only=True)
class SensitivityOptions:
    """The factors of a study of all hyperparameters."""

    factors: tuple[str, ...] | None = None
    """Hyperparameters to compare with the learning rate: names of orchestrator/study/factors.toml (alpha rank
    batch_size dropout warmup weight_decay schedule beta2 steps train_size targets), VARIANT.NAME for a
    setting that one variant has alone, or `all`. Default: alpha rank batch_size dropout warmup weight_decay
    schedule steps; with --dry-run: alpha batch_size."""
    levels: int = 2
    """Levels of each factor besides its default, 1 to 3. The first two are the ends of its range; a choice,
    such as the schedule, has all of its levels."""
    margin: float = 0.01
    """Smallest difference of the score that matters, fixed before the study begins."""


@dataclass(frozen=True, kw_only=True)
class FactorOptions(StudyOptions, SensitivityOptions):
    """Options of a study of all hyperparameters."""

    def check_factors(self) -> None:
        """Check the options of the factors.

        Raises:
            UsageError: A search or early stopping is chosen, a number is out of bounds, no factor is named,
                or the curve has too few rates.
        """
        if self.search != "grid":
            raise UsageError(f"--search {self.search}: the design of this study is fixed; take grid.")
        if self.scheduler != "none":
            raise UsageError(
                f"--scheduler {self.scheduler}: a stopped run has no final score to compare; take none."
            )
        if not MIN_LEVELS <= self.levels <= MAX_LEVELS:
            raise UsageError(f"--levels {self.levels}: must be from {MIN_LEVELS} to {MAX_LEVELS}; take 2.")
        if not 0 < self.margin < 1:
            raise UsageError(f"--margin {self.margin:g}: must be above 0 and below 1, for example 0.01.")
        if self.factors is not None and not self.factors:
            raise UsageError("--factors is empty; name at least one, for example: alpha rank batch_size.")
        if (
            self.learning_rates is not None
            and len(parse_learning_rates(self.learning_rates)) < MIN_CURVE_RATES
        ):
            raise UsageError(
                f"--learning-rates: a curve needs {MIN_CURVE_RATES} rates or more; for example 1e-4:1e-2:4."
            )

    @property
    def factor_names(self) -> tuple[str, ...]:
        """Names of the factors in --factors, or the default ones."""
        return self.factors or (DRY_RUN_FACTORS if self.dry_run else DEFAULT_FACTORS)

    @property
    def seed_count(self) -> int:
        """Number of seeds per point; the default is 5, for a --dry-run 2."""
        return self.seeds or (DRY_RUN_FACTOR_SEEDS if self.dry_run else DEFAULT_FACTOR_SEEDS)
