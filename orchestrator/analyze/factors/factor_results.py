"""Results of a sensitivity study as plain data.

All losses and gains are differences of the test score in [-1, 1]; `factor_effects` defines A, B, C and D.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.analyze.factors.rate_claim import ClaimTest, Contrast
from orchestrator.analyze.intervals import Estimate
from orchestrator.analyze.run_labels import RunLabel
from orchestrator.analyze.statistics.usable import UsableShare


@dataclass(frozen=True)
class FactorEffect:
    """Effect of one factor on the score of one variant on one task."""

    name: str
    title: str
    alias: bool
    """True if the factor acts as a learning rate, as alpha does. Claim 1 is not tested against it."""
    levels: tuple[str, ...]
    """Labels of the levels, including the default."""
    default: str
    """Label of the default level."""
    rates: tuple[float, ...]
    """Learning rates at which every level was trained."""
    misset: Estimate
    """A: loss if the factor is drawn from its prior and all else stays the same."""
    retuned: Estimate
    """B: loss if the factor is drawn from its prior and the learning rate is tuned for each value."""
    gain: Estimate
    """C: gain from tuning this factor alone, from the published default."""
    off_by_2: Estimate
    """D: mean loss if the factor is too low or too high by a ratio of 2."""
    off_by_half_decade: Estimate
    """D: mean loss if the factor is too low or too high by a ratio of 3.16."""
    usable: UsableShare | None
    """Share of usable runs, of those in `labels` that ended; None without such runs."""
    labels: Mapping[RunLabel, int]
    """Label -> number of runs at the levels other than the default; for the learning rate, of all runs of its
    curve."""
    edge_levels: tuple[str, ...]
    """Labels of the levels whose best rate is the first or last one in `rates`, so that B may be too high.
    For the learning rate: its best rate if that is the first or last one."""
    rate_retuned: Estimate | None = None
    """B(rate | this factor): loss if the rate is drawn from its prior and this factor is tuned."""
    misset_contrast: Contrast | None = None
    """A(rate) - A(this factor)."""
    retuned_contrast: Contrast | None = None
    """B(rate | this factor) - B(this factor)."""


@dataclass(frozen=True)
class VariantFactors:
    """Effects of all factors of one variant on one task."""

    variant: str
    best_rate: float
    """Rate of the curve that is nearest to its optimum."""
    best_at_edge: bool
    """True if the best rate is the first or last one of the curve."""
    default_rate: float
    """Rate of the curve that stands for the published default, the reference of C."""
    rate: FactorEffect
    """Effect of the learning rate. Its B is the smallest one over the factors outside the alias group."""
    factors: tuple[FactorEffect, ...]
    """Effects of the other factors, in descending order of A."""
    missing: tuple[str, ...]
    """Titles of the study's factors that this variant was not trained with."""
    claim: ClaimTest
    far_more: bool
    """True if A and B of the rate are significantly more than three times those of every factor outside the
    alias group (one-sided tests at 5 %)."""
    seeds: int
    """Number of seeds for which the curve has a score at every rate."""
    num_outside: int
    """Number of runs that differ from the default in more than one factor. They are not analyzed."""

    @property
    def effects(self) -> tuple[FactorEffect, ...]:
        """The effects of the learning rate and of all factors."""
        return self.rate, *self.factors


@dataclass(frozen=True)
class TaskFactors:
    """The factors of all variants on one task and base model."""

    task: str
    model: str
    metric: str
    variants: tuple[VariantFactors, ...]
    uncounted: tuple[str, ...]
    """Variants without a vote on the claim: full fine-tuning, the head alone, and unverified variants."""
    num_judged: int
    """Number of the other variants."""
    num_required: int
    """Number of variants for which the claim must hold: 80 % of `num_judged`, rounded up."""
    num_supported: int
    """Lower 95 % confidence limit of the number of variants for which the claim holds (`largest_count`)."""
    num_refuted: int
    """Lower 95 % confidence limit of the number of variants for which the claim fails."""


@dataclass(frozen=True)
class FactorStudy:
    """Results of a sensitivity study."""

    margin: float
    """Smallest difference of the score that matters."""
    tasks: tuple[TaskFactors, ...]
