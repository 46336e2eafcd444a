"""What the analysis finds: runs make points, points curves, curves panels, panels a summary. Plain data.

Rates are learning rates, scores are the task's metric (higher is better), None is "the data do not say".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.analyze.comparison import TunedComparison
from orchestrator.analyze.curve_shape import BracketStatus
from orchestrator.analyze.intervals import CurveStatistic, Estimate, Interval
from orchestrator.analyze.panels import Value
from orchestrator.analyze.search_results import SearchResult
from orchestrator.record.schema import RecordState

REFERENCE_VARIANT = "lora"
"""The variant that the others are compared with."""
TOLERANCE = 0.01
"""How far below the best a rate still counts as good: one point on a 0..1 metric."""


@dataclass(frozen=True)
class Run:
    """One seed at one rate. Scores are None for a stopped or failed run; a diverged run's are the floor.
    `last_seen` is the last validation score on the way, which a stopped run has too."""

    seed: int
    fingerprint: str
    state: RecordState
    validation: float | None
    test: float | None
    last_seen: float | None
    untrained_test: float | None


@dataclass(frozen=True)
class CurvePoint:
    """One learning rate of a curve. `survivors` is the validation mean of the seeds that did not diverge."""

    learning_rate: float
    validation: Estimate
    test: Estimate
    survivors: Estimate
    states: Mapping[str, int]
    diverged_share: float | None
    diverged_interval: Interval | None
    """Of the seeds that finished or diverged; Wilson's interval."""
    chosen_from: bool
    """Whether the rate may be chosen and lies on the curve, see `censored.py`."""
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class Curve:
    """A variant on one task and model. Figures are None where the data do not give them."""

    variant: str
    label: str
    varied: Mapping[str, Value]
    points: tuple[CurvePoint, ...]
    best_rate: float | None
    best_validation: Estimate
    best_test: Estimate
    best_rates_leaving_one_out: tuple[float, ...]
    """The rate that would have been chosen without each seed in turn."""
    bracketed: BracketStatus | None
    interpolated_best_rate: CurveStatistic | None
    width: CurveStatistic | None
    """Decades of rate within the tolerance of the best."""
    width_90: CurveStatistic | None
    """Decades of rate that keep 90 % of the way from the floor to the best."""
    half_decade_regret: CurveStatistic | None
    half_decade_covered: float | None
    """Decades that mean covers: 1 unless the grid ends or a stopped run lies nearer."""
    regret_at_reference_best: CurveStatistic | None
    """Validation score given up by training at LoRA's best rate."""
    regret_at_average_best: CurveStatistic | None
    """The same at the rate that is best on average over the variants."""
    cliff: float | None
    gain: Estimate
    """Test score at the chosen rate over the untrained base's, seed by seed."""
    test_at_common_rate: float | None

    def point_at_rate(self, learning_rate: float | None) -> CurvePoint | None:
        return next((p for p in self.points if p.learning_rate == learning_rate), None)

    def count_runs(self, state: RecordState) -> int:
        return sum(p.states.get(state, 0) for p in self.points)


@dataclass(frozen=True)
class Spread:
    """From the worst to the best variant by test score."""

    low: float
    high: float
    worst: str
    best: str
    variants: int
    """How many have a score there."""

    @property
    def size(self) -> float:
        return self.high - self.low


@dataclass(frozen=True)
class Panel:
    """One task and base model with everything but rate, seed and variant alike. Curves: best validation
    first."""

    task: str
    model: str
    metric: str
    floor: float
    varied: Mapping[str, Value]
    curves: tuple[Curve, ...]
    untrained_validation: float | None
    untrained_test: float | None
    reference: str | None
    reference_best_rate: float | None
    average_best_rate: float | None
    common_rate: float | None
    common_name: str
    spread_at_common: Spread | None
    spread_at_best: Spread | None
    """Both spreads are over the same variants: those with a test score at the common rate."""


@dataclass(frozen=True)
class Summary:
    """A task and model are in one of the three: curves of a grid, points of a search, or a comparison with
    fresh seeds."""

    panels: tuple[Panel, ...]
    states: Mapping[str, int]
    provenance: Mapping[str, Mapping[str, int]]
    warnings: tuple[str, ...]
    tolerance: float = TOLERANCE
    searches: tuple[SearchResult, ...] = ()
    comparisons: tuple[TunedComparison, ...] = ()
