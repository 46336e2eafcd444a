"""The results of a replicated tuning as plain data. Higher scores are better."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from orchestrator.analyze.intervals import Estimate, Interval
from orchestrator.analyze.statistics.outcome import Outcome
from orchestrator.analyze.statistics.usable import UsableShare
from orchestrator.analyze.tuned.tunings import Tuning
from orchestrator.analyze.verdict import VerdictOutcome

CONTROLS = ("full", "head_only")
"""Full fine-tuning and training of the head alone. They are compared with the baseline, but they are no
variants of LoRA, so that claims and spans leave them out."""
Role = Literal["baseline", "variant", "control", "unverified"]
"""The role of a row in claim 2. An unverified variant was compared with no other implementation and no paper,
and gets no verdict."""
Counts = Literal["yes", "no", "open", "not counted"]
"""Whether the baseline matches or beats the variant of a row. Only the role "variant" is counted."""


@dataclass(frozen=True)
class PooledCurve:
    """Validation score over learning rate, from the runs of all replicates of a variant, averaged in bins."""

    log10_rates: tuple[float, ...]
    """The mean log10 learning rate of each bin."""
    scores: tuple[float, ...]
    """The mean validation score of each bin."""
    runs: tuple[int, ...]
    """The number of runs in each bin."""
    best_rate: float
    """The learning rate of the optimum: the maximum of a local quadratic, or else the best bin."""
    is_interpolated: bool
    """True if `best_rate` is the maximum of a quadratic."""
    is_at_edge: bool
    """True if the best bin is the first or the last one, so that the optimum may lie beyond it."""
    width: float | None
    """Width, in decades, of the range around the best bin in which the score is within the margin of the best
    one; None if the bins are too coarse or the range reaches an end of the curve."""


@dataclass(frozen=True)
class VariantRow:
    """One variant compared with the baseline on one task."""

    variant: str
    role: Role
    tunings: tuple[Tuning, ...]
    test: Estimate
    """The test score of the chosen runs that are usable."""
    usable: UsableShare | None
    """The share of tunings whose chosen run is usable, among those in which not every run failed."""
    usable_p: float | None
    """P value of the exact paired test (McNemar) of `usable` against the baseline's share, Holm-corrected."""
    usable_runs: UsableShare | None
    """The share of usable runs among all runs that finished or diverged."""
    pairs: int
    """Number of replicates in which the tunings of the variant and of the baseline are both usable."""
    difference: float | None
    """Mean difference of the test score from the baseline's over these replicates."""
    interval: Interval | None
    """The simultaneous interval of the difference at the level of this look."""
    seed_error: float | None
    """Standard error of the difference over replicates."""
    question_error: float | None
    """Standard error of the difference over the test questions; None if it is unknown."""
    outcome: Outcome
    counts: Counts
    """Whether the baseline matches or beats this variant."""
    replicates_to_decide: int | None
    """For a row whose outcome is undecided or whose `counts` is open: the number of replicates with which the
    outcome is decided with probability 80 % in the worst case, if the standard deviation stays the same. None
    if it is above 1,000, which the noise of the questions alone can cause."""
    resolvable: float | None
    """The true difference that a repetition of the study detects with probability 80 %."""
    edge_choices: int
    """Number of tunings whose chosen values lie at an edge of the tried values."""
    curve: PooledCurve | None
    """The pooled curve; None if no run has a validation score."""

    @property
    def reason(self) -> str:
        """The reason for a missing interval; empty if there is an interval, and for the baseline."""
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
    """The geometric mean over replicates, whose grids may be shifted."""
    winner: str
    """The variant with the highest mean test score at this rate."""
    score: float
    """The mean test score of the winner at this rate."""
    baseline_score: float
    """The mean test score of the baseline at this rate."""


@dataclass(frozen=True)
class FixedRateRow:
    """The effect of one fixed learning rate on the comparison of a variant with the baseline.

    All numbers are means over replicates, in units of the test score, with simultaneous intervals.
    """

    variant: str
    regret: float
    """Score at the variant's own chosen rate minus its score at the baseline's chosen rate."""
    regret_interval: Interval | None
    at_baseline_rate: float
    """Score of the variant minus the baseline's, both at the baseline's chosen rate."""
    at_baseline_interval: Interval | None
    at_own_rate: float
    """Score of the variant minus the baseline's, both at the variant's chosen rate."""
    at_own_interval: Interval | None
    reversal: bool | None
    """True if the variant loses to the baseline at one of the two rates and beats it at the other, both by
    more than the margin; False if the intervals exclude that; None if they leave it open."""


@dataclass(frozen=True)
class FixedRateComparison:
    """The test of claim 3: at one fixed learning rate the winner is an artefact of the rate."""

    winners: tuple[RateWinner, ...]
    """The best variant at each rate, in ascending order of the rate, without the rates of `equal_rates`."""
    equal_rates: int
    """Number of rates at which all variants have the same mean score."""
    rows: tuple[FixedRateRow, ...]
    """The variants, the largest regret first."""
    outcome: VerdictOutcome
    """The outcome of claim 3."""


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
    """The largest number of runs in a tuning."""
    alpha: float
    """One minus the simultaneous level of the intervals at this look."""
    claim_alpha: float
    """The type I error rate of claim 2, which is a single hypothesis, at this look."""
    looks: tuple[int, ...]
    """Numbers of replicates at which a verdict was shown, ascending, the present one last."""
    planned: int
    """The planned maximum of replicates."""
    has_question_noise: bool
    """True if all intervals include the noise of the test questions."""
    rows: tuple[VariantRow, ...]
    """The baseline, then the variants, the largest difference first, variants without a difference last."""
    counted: int
    """Number of counted variants: those with the role "variant"."""
    holds_at_least: int
    """Lower confidence bound on the number of counted variants that the baseline matches or beats (partial
    conjunction)."""
    beaten_at_least: int
    """Lower confidence bound on the number of counted variants that are better than the baseline by more than
    the margin (partial conjunction)."""
    p_claim: float | None
    """P value of the test with claim 2 as alternative hypothesis: the baseline is not inferior to more than
    half of the counted variants. None if no variant is counted."""
    p_against: float | None
    """P value of the test with the opposite as alternative hypothesis: at least half of the counted variants
    are better by more than the margin. None if no variant is counted."""
    outcome: VerdictOutcome
    """The outcome of claim 2."""
    span: float | None
    """Distance between the best and the worst mean test score of the baseline and the counted variants."""
    expected_span: float | None
    """The span that noise alone would cause if the baseline and the counted variants were equal."""
    fixed_rate: FixedRateComparison | None
    """The test of claim 3; None if the variants do not share their learning rates."""
    missing: bool
    """True if configurations of the study have not ended, tunings are incomplete (see `find_tunings`), or
    variants have different numbers of tunings."""

    @property
    def title(self) -> str:
        """The task and the base model."""
        return f"{self.task} on {self.model}"


@dataclass(frozen=True)
class TunedComparison:
    """The comparison of all variants with the tuned baseline on all tasks."""

    tasks: tuple[TaskComparison, ...]
    tasks_supported_at_least: int
    """Lower confidence bound on the number of tasks on which claim 2 is true (partial conjunction)."""
    tasks_refuted_at_least: int
    """Lower confidence bound on the number of tasks on which claim 2 is false (partial conjunction)."""

    @property
    def look(self) -> int:
        """The number of replicates of this look.

        It is 0 if runs are missing or the tasks differ in it, because then this is no look of the plan.
        """
        replicates = {task.replicates for task in self.tasks}
        is_whole = len(replicates) == 1 and not any(task.missing for task in self.tasks)
        return replicates.pop() if is_whole else 0
