"""The results of the analysis as plain data: runs make points, points curves, curves panels.

Rates are learning rates. Scores are values of the task's metric, for which higher is better. None means that
the data do not determine the value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.analyze.costs import CostRow, TimeUse
from orchestrator.analyze.curve_shape import BracketStatus
from orchestrator.analyze.factors.factor_results import FactorStudy
from orchestrator.analyze.intervals import CurveStatistic, Estimate, Interval
from orchestrator.analyze.panels import Value
from orchestrator.analyze.run_labels import RunLabel
from orchestrator.analyze.tuned.tuned_results import TunedComparison
from orchestrator.analyze.tuning import SearchResult
from orchestrator.analyze.verdict import Verdict
from orchestrator.record.schema import RecordState

REFERENCE_VARIANT = "lora"
"""The variant that the others are compared with."""
TOLERANCE = 0.01
"""Difference from the best score within which a rate counts as good: 0.01 on a metric from 0 to 1."""


def is_reference(label: str) -> bool:
    """Return whether a curve's label is that of a curve of `REFERENCE_VARIANT`."""
    return label.partition(" ")[0] == REFERENCE_VARIANT


@dataclass(frozen=True)
class Run:
    """One seed at one rate. Its scores are None if it was stopped or failed, and the floor if it diverged."""

    seed: int
    fingerprint: str
    state: RecordState
    validation: float | None
    test: float | None
    last_validation: float | None
    """The last validation score during training, which a stopped run has as well."""
    untrained_test: float | None
    """The test score of the untrained base model."""
    label: RunLabel
    """The label, see `run_labels.label_runs`."""


@dataclass(frozen=True)
class CurvePoint:
    """One learning rate of a curve."""

    learning_rate: float
    validation: Estimate
    test: Estimate
    without_diverged: Estimate
    """The validation score of the seeds that did not diverge."""
    states: Mapping[str, int]
    """State -> number of runs."""
    diverged_share: float | None
    """The share of diverged runs among those that finished or diverged."""
    diverged_interval: Interval | None
    """Wilson's interval of that share."""
    eligible: bool
    """True if the rate may be chosen as the best and lies on the curve, see `censored.eligible_points`."""
    runs: tuple[Run, ...]

    def count_runs(self, label: RunLabel) -> int:
        """Return how many runs have `label`."""
        return sum(run.label == label for run in self.runs)


@dataclass(frozen=True)
class Curve:
    """The curve of one variant on one task and model, with its statistics."""

    variant: str
    label: str
    """The variant and `varied`, for example "lora_plus ratio=4"."""
    varied: Mapping[str, Value]
    """Columns in which the curve differs from the variant's other curves: column -> value."""
    points: tuple[CurvePoint, ...]
    best_rate: float | None
    """The eligible rate with the highest validation mean, of equal ones the lowest."""
    best_rates: tuple[float, ...]
    """All eligible rates with that mean, ascending."""
    best_validation: Estimate
    best_test: Estimate
    best_rates_leave_one_out: tuple[float, ...]
    """The best rate with each seed left out in turn."""
    bracketed: BracketStatus | None
    interpolated_best_rate: CurveStatistic | None
    """The peak of the parabola through the best rate and its neighbors."""
    width: CurveStatistic | None
    """Decades of rate around the best within the tolerance of the best score."""
    width_90: CurveStatistic | None
    """Decades of rate around the best that keep 90 % of the way from the floor to the best score."""
    half_decade_regret: CurveStatistic | None
    """The mean validation score lost within half a decade of the best rate."""
    half_decade_covered: float | None
    """The width in decades of the interval of `half_decade_regret`. It is 1, or less if the grid ends or a
    censored rate lies within half a decade of the best rate."""
    regret_at_reference_best: CurveStatistic | None
    """The validation score lost by training at LoRA's best rate."""
    regret_at_average_best: CurveStatistic | None
    """The validation score lost by training at the rate that is best on average over the variants."""
    cliff: float | None
    """The first rate above the best where training breaks down, see `curve_shape.cliff_index`."""
    gain_over_untrained: Estimate
    """The test score at the best rate minus that of the untrained base, paired by seed."""
    test_at_common_rate: float | None
    """The test score at `Panel.common_rate`, interpolated between the rates of the curve."""
    nothing_learned: bool
    """True if the curve has scores, but at no rate a better one than the untrained base or a constant answer.
    `best_rate` is then only the rate to which the statistics refer."""

    @property
    def named_best_rate(self) -> float | None:
        """`best_rate`, or None if nothing was learned or both ends of the grid score the same."""
        return None if self.nothing_learned or self.bracketed == "both edges" else self.best_rate

    def point_at_rate(self, learning_rate: float | None) -> CurvePoint | None:
        """Return the point at exactly this rate, or None."""
        return next((p for p in self.points if p.learning_rate == learning_rate), None)

    def count_runs(self, label: RunLabel) -> int:
        """Return how many runs of the curve have `label`."""
        return sum(point.count_runs(label) for point in self.points)


@dataclass(frozen=True)
class Spread:
    """The range of test scores from the worst to the best variant."""

    low: float
    high: float
    worst: str
    """The label of the variant with the lowest score."""
    best: str
    """The label of the variant with the highest score."""
    variants: int
    """Number of variants with a score."""

    @property
    def size(self) -> float:
        """The highest score minus the lowest score."""
        return self.high - self.low


@dataclass(frozen=True)
class Panel:
    """The curves of one task and base model, the highest best validation score first.

    The runs of a panel differ only in learning rate, seed, variant and settings that may differ between
    variants, see `panels.group_into_panels`.
    """

    task: str
    model: str
    metric: str
    floor: float
    """The score of a constant or untrained answer."""
    varied: Mapping[str, Value]
    """Columns in which the panel differs from the others of its task and model: column -> value."""
    curves: tuple[Curve, ...]
    untrained_validation: float | None
    """The mean validation score of the untrained base model."""
    untrained_test: float | None
    """The mean test score of the untrained base model."""
    reference: str | None
    """The label of LoRA's curve."""
    reference_best_rate: float | None
    """The best rate of that curve."""
    average_best_rate: float | None
    """The rate with the highest mean validation score over the variants."""
    common_rate: float | None
    """LoRA's best rate, or else the rate that is best on average."""
    common_rate_label: str
    """A phrase that says which of these two rates `common_rate` is."""
    spread_at_common: Spread | None
    """The spread at the common rate."""
    spread_at_best: Spread | None
    """The spread of the same variants, each at its own best rate."""

    @property
    def title(self) -> str:
        """The task and the model, followed by `varied`: "digits on base (steps=100)"."""
        return f"{self.task} on {self.model}{self._settings}"

    @property
    def scope(self) -> str:
        """The task, followed by `varied`."""
        return f"{self.task}{self._settings}"

    @property
    def _settings(self) -> str:
        return f" ({', '.join(f'{k}={v}' for k, v in self.varied.items())})" if self.varied else ""


@dataclass(frozen=True)
class Summary:
    """The results of a study."""

    verdicts: tuple[Verdict, ...]
    """The verdicts on the study's claims, the most important first."""
    panels: tuple[Panel, ...]
    """The panels of a study of curves or factors; empty for other kinds of studies."""
    states: Mapping[str, int]
    """Label of a run (see `run_labels`) -> number of runs."""
    provenance: Mapping[str, Mapping[str, int]]
    """Column of the provenance -> value -> number of runs with a score."""
    warnings: tuple[str, ...]
    """Caveats, one line each."""
    tolerance: float = TOLERANCE
    searches: tuple[SearchResult, ...] = ()
    """The results of a search, one for each task and model."""
    comparison: TunedComparison | None = None
    """The comparison with the tuned baseline; None unless the study has replicates."""
    factor_study: FactorStudy | None = None
    """The losses due to each hyperparameter; None unless the study varies factors."""
    costs: tuple[CostRow, ...] = ()
    """The cost of each variant on each task and model."""
    time_use: TimeUse | None = None
    """Where the trainers' time went; None if no record says it."""
