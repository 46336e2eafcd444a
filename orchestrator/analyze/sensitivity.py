"""Summary of the curves (score over learning rate) of a study's records, with intervals.

The rate is chosen by the validation mean over seeds. No choice depends on a test score; the gain and the
spreads are test scores at the chosen rates. A diverged run counts as the task's floor. A stopped run is
censored: it enters no mean, and a rate with one is chosen only if it is the best even with the floor for
every stopped run, see `censored.eligible_points`. A failed run is missing. Higher scores are better.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from orchestrator.analyze import curve_shape, curve_statistics, intervals, panels
from orchestrator.analyze.censored import eligible_points
from orchestrator.analyze.curve_statistics import CurveMeans, CurveStatistics, PanelStatistics
from orchestrator.analyze.intervals import CurveStatistic, Estimate, Interval, estimate_score
from orchestrator.analyze.results import Curve, CurvePoint, Panel, Run, Spread
from orchestrator.analyze.run_labels import RunLabel, is_above_base, label_runs
from orchestrator.analyze.scores import (
    count_items,
    finite_score,
    last_validation,
    mean_untrained_score,
    untrained_score,
)
from orchestrator.record.schema import Record

T = TypeVar("T")
_Read = Callable[[CurveStatistics], T | None]  # selects one statistic of a curve


def summarize_panels(records: Sequence[Record]) -> tuple[Panel, ...]:
    """Summarize the curves of all tasks and models.

    Args:
        records: Distinct records, see `panels.deduplicate_records`.

    Returns:
        The panels, sorted by task and model.
    """
    labels = label_runs(records)
    grouped = panels.group_into_panels(records)
    return tuple(_summarize_panel(varied, lines, labels) for varied, lines in grouped)


def _summarize_run(record: Record, label: RunLabel) -> Run:
    return Run(
        record.configuration.seed,
        record.fingerprint,
        record.state,
        finite_score(record, "validation"),
        finite_score(record, "test"),
        last_validation(record),
        untrained_score(record, "test"),
        label,
    )


def _summarize_points(records: Sequence[Record], labels: Mapping[str, RunLabel]) -> tuple[CurvePoint, ...]:
    by_rate: dict[float, list[Record]] = defaultdict(list)
    for record in sorted(records, key=lambda r: (r.configuration.seed, r.fingerprint)):
        by_rate[record.configuration.optimizer.learning_rate].append(record)
    rates = sorted(by_rate)
    runs_at = [[_summarize_run(record, labels[record.fingerprint]) for record in by_rate[r]] for r in rates]
    outcomes = [curve_statistics.point_outcome(runs) for runs in runs_at]
    eligible = eligible_points(outcomes, records[0].configuration.task.floor)
    items = [tuple(count_items(by_rate[rate], split) for split in ("validation", "test")) for rate in rates]
    return tuple(map(_summarize_point, rates, runs_at, eligible, items))


def _summarize_point(
    rate: float, runs: Sequence[Run], is_eligible: bool, items: tuple[int, ...]
) -> CurvePoint:
    num_validation, num_test = items
    states = Counter(r.state for r in runs)
    ended = states["finished"] + states["diverged"]
    finished = [r.validation for r in runs if r.validation is not None and r.state == "finished"]
    return CurvePoint(
        learning_rate=rate,
        validation=estimate_score([r.validation for r in runs if r.validation is not None], num_validation),
        test=estimate_score([r.test for r in runs if r.test is not None], num_test),
        without_diverged=estimate_score(finished, num_validation),
        states=dict(sorted(states.items())),
        diverged_share=states["diverged"] / ended if ended else None,
        diverged_interval=intervals.wilson_interval(states["diverged"], ended),
        eligible=is_eligible,
        runs=tuple(runs),
    )


def _summarize_panel(
    varied: Mapping[str, panels.Value],
    curve_records: Sequence[panels.CurveRecords],
    labels: Mapping[str, RunLabel],
) -> Panel:
    first = curve_records[0].records[0].configuration
    task = first.task
    points = {line.label: _summarize_points(line.records, labels) for line in curve_records}
    statistics = curve_statistics.panel_statistics(points, task.floor)
    curves = _summarize_curves(curve_records, points, statistics, task.floor)
    # Both spreads are over the same variants.
    compared = [c for c in curves if c.test_at_common_rate is not None and c.best_test.mean is not None]
    records = [record for line in curve_records for record in line.records]
    return Panel(
        task=task.name,
        model=first.model.name,
        metric=task.metric,
        floor=task.floor,
        varied=varied,
        curves=tuple(curves),
        untrained_validation=mean_untrained_score(records, "validation"),
        untrained_test=mean_untrained_score(records, "test"),
        reference=statistics.reference,
        reference_best_rate=statistics.reference_rate,
        average_best_rate=statistics.average_rate,
        common_rate=statistics.common_rate,
        common_rate_label="LoRA's best rate" if statistics.reference else "the rate best on average",
        spread_at_common=_score_spread({c.label: c.test_at_common_rate for c in compared}),
        spread_at_best=_score_spread({c.label: c.best_test.mean for c in compared}),
    )


def _summarize_curves(
    curve_records: Sequence[panels.CurveRecords],
    points: Mapping[str, tuple[CurvePoint, ...]],
    statistics: PanelStatistics,
    floor: float,
) -> list[Curve]:
    """Summarize all curves of a panel, the best validation score first, curves without a score last."""
    runs = {label: [run for point in own for run in point.runs] for label, own in points.items()}
    seeds = {label: {r.seed for r in own if r.validation is not None} for label, own in runs.items()}
    without_seed = {
        seed: curve_statistics.panel_statistics(points, floor, seed).curves
        for seed in sorted(set().union(*seeds.values()))
    }
    curves = []
    for line in curve_records:
        label = line.label
        leave_one_out = [own[label] for seed, own in without_seed.items() if seed in seeds[label]]
        jackknife = _Jackknife(statistics.curves[label], leave_one_out, statistics.means[label], floor)
        curves.append(_summarize_curve(line, points[label], jackknife, statistics.common_rate))
    curves.sort(key=lambda c: (-(c.best_validation.mean or 0.0) if c.best_rate else math.inf, c.label))
    return curves


def _score_spread(scores: Mapping[str, float | None]) -> Spread | None:
    known = sorted((v, label) for label, v in scores.items() if v is not None)
    if len(known) < 2:
        return None
    (low, worst), (high, best) = known[0], known[-1]
    return Spread(low, high, worst, best, len(known))


@dataclass(frozen=True)
class _Jackknife:
    """Computation of one curve's statistics with jackknife intervals."""

    full: CurveStatistics
    """The statistics on all seeds."""
    leave_one_out: Sequence[CurveStatistics]
    """The statistics with each seed left out in turn."""
    means: CurveMeans
    """The means over all seeds."""
    floor: float

    def best_rates(self) -> tuple[float, ...]:
        """Return the best rate without each seed in turn; none with a single seed."""
        rates = tuple(each.best_rate for each in self.leave_one_out if each.best_rate is not None)
        return rates if len(self.leave_one_out) > 1 else ()

    def interpolated_best_rate(self) -> CurveStatistic | None:
        """Return the rate at the parabola's peak. The interval is symmetric in the logarithm of the rate."""
        found = self._statistic(lambda s: s.interpolated_log_rate, self._grid_ends())
        if found is None:
            return None
        ends = found.interval
        return CurveStatistic(10**found.value, Interval(10**ends.low, 10**ends.high) if ends else None)

    def width(self, of: _Read[tuple[float, bool]]) -> CurveStatistic | None:
        """Return the width that `of` selects. A lower bound has no interval."""
        low, high = self._grid_ends()
        found = self._statistic(lambda s: None if (width := of(s)) is None else width[0], (0.0, high - low))
        full = of(self.full)
        return CurveStatistic(full[0], is_lower_bound=True) if full and full[1] else found

    def regret(self, of: _Read[float]) -> CurveStatistic | None:
        """Return the regret that `of` selects. It cannot exceed the height of the curve above the floor."""
        scores = [self.floor, *(score for score in self.means.y if score is not None)]
        return self._statistic(of, (0.0, max(scores) - min(scores)))

    def _grid_ends(self) -> tuple[float, float]:
        return min(self.means.x, default=0.0), max(self.means.x, default=0.0)

    def _statistic(self, of: _Read[float], bounds: tuple[float, float]) -> CurveStatistic | None:
        value = of(self.full)
        if value is None:
            return None
        interval = intervals.jackknife_interval(value, [of(each) for each in self.leave_one_out], bounds)
        return CurveStatistic(value, interval)


def _summarize_curve(
    line: panels.CurveRecords, points: tuple[CurvePoint, ...], jackknife: _Jackknife, common: float | None
) -> Curve:
    full, m = jackknife.full, jackknife.means
    best = next((p for p in points if p.learning_rate == full.best_rate), None)
    common_x = None if common is None else math.log10(common)
    cliff = None if m.best is None else curve_shape.cliff_index(m.y, m.diverged, m.best, jackknife.floor)
    at_best = [
        record for record in line.records if record.configuration.optimizer.learning_rate == full.best_rate
    ]
    pairs = [
        (r.test, r.untrained_test)
        for r in (best.runs if best else ())
        if r.test is not None and r.untrained_test is not None
    ]
    return Curve(
        variant=line.variant,
        label=line.label,
        varied=line.varied,
        points=points,
        best_rate=full.best_rate,
        best_rates=m.best_rates,
        best_validation=best.validation if best else Estimate(0),
        best_test=best.test if best else Estimate(0),
        best_rates_leave_one_out=jackknife.best_rates(),
        bracketed=None if m.best is None else curve_shape.bracket_status(m.y, m.best),
        interpolated_best_rate=jackknife.interpolated_best_rate(),
        width=jackknife.width(lambda s: s.width),
        width_90=jackknife.width(lambda s: s.width_90),
        half_decade_regret=jackknife.regret(lambda s: s.half_decade_regret and s.half_decade_regret[0]),
        half_decade_covered=full.half_decade_regret and full.half_decade_regret[1],
        regret_at_reference_best=jackknife.regret(lambda s: s.regret_at_reference),
        regret_at_average_best=jackknife.regret(lambda s: s.regret_at_average),
        cliff=None if cliff is None else m.rates[cliff],
        gain_over_untrained=intervals.estimate_gain(
            [test for test, _ in pairs], [base for _, base in pairs], count_items(at_best, "test")
        ),
        test_at_common_rate=None if common_x is None else curve_shape.score_at(m.x, m.test, common_x),
        nothing_learned=best is not None and not is_above_base(best.validation.mean, line.records),
    )
