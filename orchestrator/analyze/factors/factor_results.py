"""The results of a sensitivity study as plain data. Losses are differences of the test score."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.analyze.factors.rate_claim import ClaimTest, Contrast
from orchestrator.analyze.intervals import Estimate
from orchestrator.analyze.run_labels import RunLabel
from orchestrator.analyze.statistics.usable import UsableShare


@dataclass(frozen=True)
class FactorEffect:
    """What one factor costs one variant on one task."""

    name: str
    title: str
    alias: bool
    """True if the factor acts as a learning rate (the group of rate and alpha)."""
    levels: tuple[str, ...]
    """The levels, the default among them."""
    default: str
    rates: tuple[float, ...]
    """The rates at which every level was trained."""
    misset: Estimate
    """A: the loss when the factor is set blindly and nothing reacts."""
    retuned: Estimate
    """B: the same with the learning rate tuned again at each value."""
    gain: Estimate
    """C: the gain from tuning this factor alone from the published default."""
    off_by_2: Estimate
    """D: the loss when it is off by a factor of 2, either way."""
    off_by_half_decade: Estimate
    """D: the loss when it is off by a factor of 3.16."""
    usable: UsableShare | None
    """The share of usable runs at the levels other than the default."""
    labels: Mapping[RunLabel, int]
    """How those runs ended."""
    edge_levels: tuple[str, ...]
    """Levels whose best rate is the first or last one of the sweep, so that B may be too high."""
    rate_retuned: Estimate | None = None
    """B of the learning rate against this factor: the rate is set blindly, this factor is tuned again."""
    misset_contrast: Contrast | None = None
    """A(rate) - A(this)."""
    retuned_contrast: Contrast | None = None
    """B(rate) - B(this)."""


@dataclass(frozen=True)
class VariantFactors:
    """The factors of one variant on one task, the costliest first."""

    variant: str
    best_rate: float
    """x*: the rate of the curve nearest to its optimum."""
    best_at_edge: bool
    """True if the best rate is the first or last one of the curve."""
    default_rate: float
    """The rate of the curve that stands for the published default, from which C is counted."""
    rate: FactorEffect
    """The learning rate. Its B is that against the factor that makes up for it best."""
    factors: tuple[FactorEffect, ...]
    missing: tuple[str, ...]
    """Titles of factors that the study has and this variant was not trained with."""
    claim: ClaimTest
    far_more: bool
    """True if the rate costs more than three times what every factor outside its group costs (A and B)."""
    importance: Mapping[str, Mapping[str, float]]
    """Range of the rate -> title -> share of the variance (fANOVA, secondary)."""
    seeds: int
    num_outside: int
    """Runs that differ from the default in more than one factor, and enter nothing."""

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
    """Variants that are shown and enter no count: full fine-tuning, the head alone, and unverified ones."""
    num_judged: int
    """Variants over which the claim is judged."""
    num_required: int
    """Of so many of them the claim must hold: at least 80 %."""
    num_supported: int
    """The largest number of variants of which the claim holds with an error of 5 % (partial conjunction)."""
    num_refuted: int
    """The same for the refutation."""


@dataclass(frozen=True)
class FactorStudy:
    """A sensitivity study: which hyperparameter matters most."""

    margin: float
    tasks: tuple[TaskFactors, ...]
