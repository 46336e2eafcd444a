"""The results of a replicated tuning as plain data. Scores: higher is better."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from orchestrator.analyze.intervals import Estimate, Interval
from orchestrator.analyze.statistics.aggregate import Aggregate
from orchestrator.analyze.statistics.outcome import Outcome
from orchestrator.analyze.statistics.usable import UsableShare
from orchestrator.analyze.tuned.tunings import Tuning
from orchestrator.analyze.verdict import VerdictOutcome

CONTROLS = ("full", "head_only")
"""Full fine-tuning and the head alone: compared, but no variants of LoRA. They enter no span and no count."""
Role = Literal["baseline", "variant", "control", "unverified"]
"""What a row is in claim 2. An unverified variant has no reference implementation behind it: no verdict."""
Counts = Literal["yes", "no", "open", "not counted"]
"""Whether the baseline matches or beats the variant of a row."""


@dataclass(frozen=True)
class PooledCurve:
    """The curve through all runs of a variant, whose grids are shifted against each other."""

    log10_rates: tuple[float, ...]
    """The mean log10 learning rate of each bin."""
    scores: tuple[float, ...]
    """The mean validation score of each bin."""
    runs: tuple[int, ...]
    """The number of runs in each bin."""
    best_rate: float
    """The learning rate of the optimum: that of a local quadratic where there is one, else the best bin's."""
    is_interpolated: bool
    is_at_edge: bool
    """True if the best bin is the first or the last one, so that the optimum may lie beyond it."""
    width: float | None
    """Decades around the optimum that stay within the margin; None if the bins cannot resolve it."""


@dataclass(frozen=True)
class VariantRow:
    """One variant compared with the baseline on one task."""

    variant: str
    role: Role
    tunings: tuple[Tuning, ...]
    test: Estimate
    """The test score of the chosen runs that are usable."""
    usable: UsableShare | None
    """The share of tunings whose chosen run is usable; None without a tuning."""
    usable_p: float | None
    """Exact paired test of that share against the baseline's, with Holm's correction over variants."""
    usable_runs: UsableShare | None
    """The share of usable runs among all that were tried and ended."""
    pairs: int
    """Number of replicates in which the chosen runs of both are usable."""
    difference: float | None
    """The mean difference of the test score from the baseline's over these replicates."""
    interval: Interval | None
    """The simultaneous interval of the difference at the level of this look."""
    seed_error: float | None
    """Standard error of the difference over replicates."""
    question_error: float | None
    """Standard error of the difference over the test questions; None if their results are not recorded."""
    outcome: Outcome
    counts: Counts
    """Whether the row counts for the baseline in claim 2."""
    replicates_to_decide: int | None
    """For an undecided row: the number of replicates that decides it with probability 80 % whatever the true
    difference is, if the spread stays; None if it is above 1,000, or if questions alone leave it open."""
    resolvable: float | None
    """The true difference that such a study detects with probability 80 %."""
    edge_choices: int
    """Number of tunings whose choice lies at an edge of the tried values."""
    budget_curve: tuple[float, ...]
    """Element k - 1: expected test score after tuning with k of the points."""
    curve: PooledCurve | None

    @property
    def reason(self) -> str:
        """The reason why there is no interval; empty if there is one."""
        if self.interval is not None or self.role == "baseline":
            return ""
        if self.pairs < 2:
            usable = "replicate is" if self.pairs == 1 else "replicates are"
            return f"{self.pairs or 'no'} {usable} usable for both"
        return "the same difference in every replicate"


@dataclass(frozen=True)
class RateWinner:
    """The best variant at one learning rate that all variants share."""

    learning_rate: float
    """The rate; the geometric mean of the replicates' rates if their grids are shifted."""
    winner: str
    score: float
    """Its mean test score there."""
    baseline_score: float


@dataclass(frozen=True)
class FixedRateRow:
    """What one variant loses or wins because all are compared at one rate."""

    variant: str
    regret: float
    """Mean test score lost at the baseline's chosen rate against the variant's own chosen rate."""
    regret_interval: Interval | None
    at_baseline_rate: float
    """Mean difference from the baseline at the baseline's chosen rate."""
    at_baseline_interval: Interval | None
    at_own_rate: float
    """Mean difference from the baseline at the rate that the variant's tuning chose."""
    at_own_interval: Interval | None
    reversal: bool | None
    """True if the variant loses to the baseline at one of the two rates and beats it at the other, both by
    more than the margin; False if the intervals exclude that; None if they leave it open."""


@dataclass(frozen=True)
class FixedRateComparison:
    """Claim 3: at one fixed rate the winner is an artefact."""

    winners: tuple[RateWinner, ...]
    rows: tuple[FixedRateRow, ...]
    outcome: VerdictOutcome


@dataclass(frozen=True)
class TaskComparison:
    """All variants compared with the tuned baseline on one task and base model."""

    task: str
    model: str
    metric: str
    steps: int
    """Optimizer steps of a run."""
    test_items: int
    """Number of items in the test split."""
    baseline: str
    margin: float
    """The smallest difference of the test score that matters."""
    replicates: int
    """Number of replicates in which the baseline was tuned."""
    points: int
    """The largest number of runs of a tuning."""
    alpha: float
    """One minus the simultaneous level of the intervals at this look."""
    claim_alpha: float
    """The error of a claim, which is one hypothesis, at this look."""
    looks: tuple[int, ...]
    """The numbers of replicates at which a verdict was shown, the present one last."""
    planned: int
    """The planned maximum of replicates."""
    has_question_noise: bool
    """True if the intervals count the noise of the test questions for every row that has an interval."""
    rows: tuple[VariantRow, ...]
    """The baseline, then the variants, the largest difference first, those without one last."""
    counted: int
    """Number of variants that claim 2 is about: no controls, no unverified ones."""
    holds_at_least: int
    """The baseline matches or beats at least so many of them (partial conjunction)."""
    beaten_at_least: int
    """At least so many of them are better than the baseline by more than the margin (partial conjunction)."""
    p_claim: float | None
    """P value of claim 2: the baseline is not inferior to more than half of the counted variants."""
    p_against: float | None
    """P value of its opposite: at least half of them are better by more than the margin."""
    outcome: VerdictOutcome
    """The outcome of claim 2."""
    span: float | None
    """Distance between the best and the worst mean test score of the baseline and the counted variants."""
    expected_span: float | None
    """The distance to expect if all of them were equal, by noise alone."""
    fixed_rate: FixedRateComparison | None
    """None if the variants do not share their learning rates."""
    missing: bool
    """True if configurations of the study have not ended, or variants have different numbers of tunings."""

    @property
    def title(self) -> str:
        """The task and the base model."""
        return f"{self.task} on {self.model}"


@dataclass(frozen=True)
class VariantAggregate:
    """One variant over all tasks."""

    variant: str
    tasks: int
    """Number of tasks in which it has replicates that are usable for both."""
    mean_difference: Aggregate
    """Interquartile mean of the differences from the baseline."""
    probability_better: Aggregate
    """Probability that its tuned score is above the baseline's."""
    counts: Mapping[Counts, int]
    """Whether its row counts for the baseline -> number of tasks."""


@dataclass(frozen=True)
class TunedComparison:
    """The comparison of all variants with the tuned baseline."""

    tasks: tuple[TaskComparison, ...]
    aggregates: tuple[VariantAggregate, ...]
    """Over several tasks; empty with one."""
    tasks_supported_at_least: int
    """Claim 2 holds in at least so many of the tasks (partial conjunction over tasks)."""
    tasks_refuted_at_least: int

    @property
    def look(self) -> int:
        """The number of replicates at which this is a planned look; 0 while runs are missing."""
        replicates = {task.replicates for task in self.tasks}
        is_whole = len(replicates) == 1 and not any(task.missing for task in self.tasks)
        return replicates.pop() if is_whole else 0
