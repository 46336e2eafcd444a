"""How a variant's score depends on the learning rate: from records to curves, widths, regrets, each with an
interval.

The rate is chosen by the validation mean over seeds; the test score stands beside it and enters no choice,
except that `gain` and the spreads are test scores *at* the chosen rates. A diverged run is worth the task's
floor. A stopped run is censored: it enters no mean, and a rate that has one is not chosen, unless it is the
best even with the floor for each of them (`censored.py`). A failed run is missing. All scores: higher is
better.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.analyze import curve_shape, panels
from orchestrator.analyze.caveats import comparison_caveats, panel_caveats, search_caveats
from orchestrator.analyze.censored import PointOutcome, eligible_points
from orchestrator.analyze.comparison import ChosenPoint, compare_tuned
from orchestrator.analyze.intervals import (
    CurveStatistic,
    Estimate,
    Interval,
    estimate_mean,
    jackknife_interval,
    wilson_interval,
)
from orchestrator.analyze.results import (
    REFERENCE_VARIANT,
    TOLERANCE,
    Curve,
    CurvePoint,
    Panel,
    Run,
    Spread,
    Summary,
)
from orchestrator.analyze.search_results import summarize_search
from orchestrator.record.schema import Record


def summarize(
    records: Iterable[Record],
    tolerance: float = TOLERANCE,
    *,
    baseline: str = "",
    margin: float = TOLERANCE,
    tuning_choices: Mapping[str, ChosenPoint | None] | None = None,
    looks: Sequence[int] = (),
    is_search: bool = False,
) -> Summary:
    """Everything the table, the plots and the report show. The order of the records does not matter. With a
    `baseline` they are a comparison's second stage, of points that the first, `tuning`, has chosen; `looks`:
    the numbers of seeds from which its verdict was read before. `search`: a search asked for the points."""
    distinct_records = panels.deduplicate_records(records)
    by_task: dict[tuple[str, str], list[Record]] = {}
    for record in distinct_records:
        key = record.configuration.task.name, record.configuration.model.name
        by_task.setdefault(key, []).append(record)
    comparisons, searches, grids = [], [], []
    for key in sorted(by_task):
        own = by_task[key]
        if baseline and (found := compare_tuned(own, baseline, margin, tuning_choices, looks)) is not None:
            comparisons.append(found)
        elif is_search:
            searches.append(summarize_search(own))
        else:
            grids += own
    shown = tuple(
        _summarize_panel(varied, lines, tolerance) for varied, lines in panels.group_into_panels(grids)
    )
    provenance = panels.count_provenance(distinct_records)
    warnings = [
        *panels.mixed_provenance_warnings(provenance),
        *(w for p in shown for w in panel_caveats(p)),
        *(w for s in searches for w in search_caveats(s)),
        *(w for c in comparisons for w in comparison_caveats(c)),
    ]
    states = {
        s: sum(r.state == s for r in distinct_records) for s in ("finished", "diverged", "stopped", "failed")
    }
    return Summary(shown, states, provenance, tuple(warnings), tolerance, tuple(searches), tuple(comparisons))


def _finite_or_none(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _summarize_run(record: Record) -> Run:
    metric = record.configuration.task.metric
    seen = [e.scores.get(metric) for e in record.evaluations if e.split == "validation"]
    return Run(
        record.configuration.seed,
        record.fingerprint,
        record.state,
        _finite_or_none(record.score("validation")),
        _finite_or_none(record.score("test")),
        _finite_or_none(seen[-1]) if seen else None,
        _finite_or_none(record.untrained.get("test", {}).get(metric)),
    )


def _summarize_points(records: Sequence[Record]) -> tuple[CurvePoint, ...]:
    by_rate: dict[float, list[Run]] = {}
    for record in records:
        by_rate.setdefault(record.configuration.optimizer.learning_rate, []).append(_summarize_run(record))
    runs_at = {rate: sorted(by_rate[rate], key=lambda r: (r.seed, r.fingerprint)) for rate in sorted(by_rate)}
    eligible = eligible_points(
        [_point_outcome(runs) for runs in runs_at.values()], records[0].configuration.task.floor
    )
    return tuple(
        _summarize_point(rate, runs, may) for (rate, runs), may in zip(runs_at.items(), eligible, strict=True)
    )


def _point_outcome(runs: Sequence[Run]) -> PointOutcome:
    scores = [r.validation for r in runs if r.validation is not None]
    return PointOutcome(scores, sum(r.state == "stopped" for r in runs))


def _summarize_point(rate: float, runs: Sequence[Run], chosen_from: bool) -> CurvePoint:
    states = Counter(r.state for r in runs)
    ended = states["finished"] + states["diverged"]
    return CurvePoint(
        learning_rate=rate,
        validation=estimate_mean([r.validation for r in runs if r.validation is not None]),
        test=estimate_mean([r.test for r in runs if r.test is not None]),
        survivors=estimate_mean(
            [r.validation for r in runs if r.validation is not None and r.state == "finished"]
        ),
        states=dict(sorted(states.items())),
        diverged_share=states["diverged"] / ended if ended else None,
        diverged_interval=wilson_interval(states["diverged"], ended),
        chosen_from=chosen_from,
        runs=tuple(runs),
    )


@dataclass(frozen=True)
class _CurveMeans:
    """A curve as numbers. Rates without any score and without a stopped run (failed, pending) are left out:
    the curve is drawn across them. Rates with a stopped run stay, as None."""

    rates: list[float]
    x: list[float]
    y: list[float | None]
    test: list[float | None]
    diverged: list[float]
    best: int | None


def _curve_means(points: Sequence[CurvePoint], floor: float, without_seed: int | None = None) -> _CurveMeans:
    rates: list[float] = []
    y: list[float | None] = []
    test: list[float | None] = []
    diverged: list[float] = []
    left = [[r for r in point.runs if r.seed != without_seed] for point in points]
    eligible = eligible_points([_point_outcome(runs) for runs in left], floor)
    for point, runs, chosen_from in zip(points, left, eligible, strict=True):
        scores = [r.validation for r in runs if r.validation is not None]
        tests = [r.test for r in runs if r.test is not None]
        if not scores and "stopped" not in point.states:
            continue
        usable = bool(scores) and chosen_from
        rates.append(point.learning_rate)
        y.append(math.fsum(scores) / len(scores) if usable else None)
        test.append(math.fsum(tests) / len(tests) if usable and tests else None)
        diverged.append(sum(r.state == "diverged" for r in runs) / len(scores) if scores else 0.0)
    return _CurveMeans(rates, [math.log10(r) for r in rates], y, test, diverged, curve_shape.best_index(y))


@dataclass(frozen=True)
class _CurveStatistics:
    """The plain numbers of one curve; computed once on all seeds and once without each."""

    best_rate: float | None = None
    interpolated_log_rate: float | None = None
    width: tuple[float, bool] | None = None
    width_90: tuple[float, bool] | None = None
    half_decade_regret: tuple[float, float] | None = None
    regret_at_reference: float | None = None
    regret_at_average: float | None = None


def _curve_statistics(
    m: _CurveMeans, floor: float, tolerance: float, reference_rate: float | None, average_rate: float | None
) -> _CurveStatistics:
    if m.best is None:
        return _CurveStatistics()
    best = m.y[m.best]
    assert best is not None

    def regret(rate: float | None) -> float | None:
        score = None if rate is None else curve_shape.score_at(m.x, m.y, math.log10(rate))
        return None if score is None else best - score

    return _CurveStatistics(
        m.rates[m.best],
        curve_shape.parabola_peak(m.x, m.y, m.best),
        curve_shape.width(m.x, m.y, m.best, best - tolerance),
        curve_shape.width(m.x, m.y, m.best, floor + 0.9 * (best - floor))
        if best > floor + curve_shape.SCORE_EPSILON
        else None,
        curve_shape.mean_regret(m.x, m.y, m.best),
        regret(reference_rate),
        regret(average_rate),
    )


def _reference_curve(means: Mapping[str, _CurveMeans], variants: Mapping[str, str]) -> str | None:
    """LoRA's curve; the better one where a study has several (alphas, say)."""
    scores = {
        label: m.y[m.best] or 0.0
        for label, m in means.items()
        if variants[label] == REFERENCE_VARIANT and m.best is not None
    }
    return max(sorted(scores), key=lambda label: scores[label]) if scores else None


def _average_best_rate(means: Mapping[str, _CurveMeans]) -> float | None:
    """The rate with the highest mean over variants, among the rates at which every variant has a score."""
    scores_by_rate: dict[float, list[float]] = {}
    scored = [m for m in means.values() if m.best is not None]
    for m in scored:
        for rate, score in zip(m.rates, m.y, strict=True):
            if score is not None:
                scores_by_rate.setdefault(rate, []).append(score)
    shared = [rate for rate in sorted(scores_by_rate) if len(scores_by_rate[rate]) == len(scored)]
    return (
        max(shared, key=lambda rate: (round(math.fsum(scores_by_rate[rate]), 9), -rate)) if shared else None
    )


def _panel_statistics(
    points: Mapping[str, tuple[CurvePoint, ...]],
    variants: Mapping[str, str],
    floor: float,
    tolerance: float,
    without_seed: int | None = None,
) -> tuple[dict[str, _CurveMeans], dict[str, _CurveStatistics], str | None, float | None, float | None]:
    """Seeds are paired, so one is left out of all variants together, and the common rates are chosen anew."""
    means = {label: _curve_means(p, floor, without_seed) for label, p in points.items()}
    reference = _reference_curve(means, variants)
    best = None if reference is None else means[reference].best
    rate = None if reference is None or best is None else means[reference].rates[best]
    average = _average_best_rate(means)
    statistics = {label: _curve_statistics(m, floor, tolerance, rate, average) for label, m in means.items()}
    return means, statistics, reference, rate, average


def _summarize_panel(
    varied: Mapping[str, panels.Value], curve_records: Sequence[panels.CurveRecords], tolerance: float
) -> Panel:
    first = curve_records[0].records[0].configuration
    floor, metric = first.task.floor, first.task.metric
    points = {line.label: _summarize_points(line.records) for line in curve_records}
    variants = {line.label: line.records[0].configuration.variant.name for line in curve_records}
    means, statistics, reference, rate, average = _panel_statistics(points, variants, floor, tolerance)
    seeds = sorted(
        {r.seed for p in points.values() for point in p for r in point.runs if r.validation is not None}
    )
    statistics_without_seed = {s: _panel_statistics(points, variants, floor, tolerance, s)[1] for s in seeds}
    common_rate, name = (
        (rate, "LoRA's best rate") if rate is not None else (average, "the rate best on average")
    )

    curves = []
    for line in curve_records:
        own = {r.seed for p in points[line.label] for r in p.runs if r.validation is not None}
        leave_one_out = [statistics_without_seed[s][line.label] for s in seeds if s in own]
        m = means[line.label]
        curves.append(
            _summarize_curve(
                line, points[line.label], m, statistics[line.label], leave_one_out, floor, common_rate
            )
        )
    curves.sort(key=lambda c: (-(c.best_validation.mean or 0.0) if c.best_rate else math.inf, c.label))

    both = [c for c in curves if c.test_at_common_rate is not None and c.best_test.mean is not None]
    runs = [record for line in curve_records for record in line.records]
    return Panel(
        first.task.name,
        first.model.name,
        metric,
        floor,
        varied,
        tuple(curves),
        _untrained_mean(runs, "validation", metric),
        _untrained_mean(runs, "test", metric),
        reference,
        rate,
        average,
        common_rate,
        name,
        _score_spread({c.label: c.test_at_common_rate for c in both}),
        _score_spread({c.label: c.best_test.mean for c in both}),
    )


def _untrained_mean(records: Sequence[Record], split: str, metric: str) -> float | None:
    values = sorted(
        v for r in records if (v := _finite_or_none(r.untrained.get(split, {}).get(metric))) is not None
    )
    return math.fsum(values) / len(values) if values else None


def _score_spread(scores: Mapping[str, float | None]) -> Spread | None:
    known = sorted((v, label) for label, v in scores.items() if v is not None)
    if len(known) < 2:
        return None
    (low, worst), (high, best) = known[0], known[-1]
    return Spread(low, high, worst, best, len(known))


def _summarize_curve(
    line: panels.CurveRecords,
    points: tuple[CurvePoint, ...],
    m: _CurveMeans,
    f: _CurveStatistics,
    leave_one_out: Sequence[_CurveStatistics],
    floor: float,
    common_rate: float | None,
) -> Curve:
    best = next((p for p in points if p.learning_rate == f.best_rate), None)
    span = m.x[-1] - m.x[0] if m.x else 0.0
    log_best = (
        jackknife_interval(
            f.interpolated_log_rate, [w.interpolated_log_rate for w in leave_one_out], (m.x[0], m.x[-1])
        )
        if m.x
        else None
    )
    known = [floor, *(v for v in m.y if v is not None)]
    max_regret = max(known) - min(known)  # no regret is larger than the curve is high
    cliff = None if m.best is None else curve_shape.cliff_index(m.y, m.diverged, m.best, floor)
    return Curve(
        variant=line.records[0].configuration.variant.name,
        label=line.label,
        varied=line.varied,
        points=points,
        best_rate=f.best_rate,
        best_validation=best.validation if best else Estimate(0),
        best_test=best.test if best else Estimate(0),
        best_rates_leaving_one_out=tuple(w.best_rate for w in leave_one_out if w.best_rate is not None)
        if len(leave_one_out) > 1
        else (),
        bracketed=None if m.best is None else curve_shape.bracket_status(m.y, m.best),
        interpolated_best_rate=None
        if f.interpolated_log_rate is None
        else CurveStatistic(
            10**f.interpolated_log_rate, Interval(10**log_best.low, 10**log_best.high) if log_best else None
        ),
        width=_width_statistic(f.width, [w.width for w in leave_one_out], span),
        width_90=_width_statistic(f.width_90, [w.width_90 for w in leave_one_out], span),
        half_decade_regret=_regret_statistic(
            _first(f.half_decade_regret), [_first(w.half_decade_regret) for w in leave_one_out], max_regret
        ),
        half_decade_covered=None if f.half_decade_regret is None else f.half_decade_regret[1],
        regret_at_reference_best=_regret_statistic(
            f.regret_at_reference, [w.regret_at_reference for w in leave_one_out], max_regret
        ),
        regret_at_average_best=_regret_statistic(
            f.regret_at_average, [w.regret_at_average for w in leave_one_out], max_regret
        ),
        cliff=None if cliff is None else m.rates[cliff],
        gain=estimate_mean(
            [
                r.test - r.untrained_test
                for r in best.runs
                if r.test is not None and r.untrained_test is not None
            ]
            if best
            else []
        ),
        test_at_common_rate=None
        if common_rate is None
        else curve_shape.score_at(m.x, m.test, math.log10(common_rate)),
    )


def _first(pair: tuple[float, float] | None) -> float | None:
    return None if pair is None else pair[0]


def _width_statistic(
    whole: tuple[float, bool] | None, left_out: Sequence[tuple[float, bool] | None], max_width: float
) -> CurveStatistic | None:
    if whole is None:
        return None
    value, at_least = whole
    values = [None if w is None else w[0] for w in left_out]
    return CurveStatistic(
        value, None if at_least else jackknife_interval(value, values, (0.0, max_width)), at_least
    )


def _regret_statistic(
    whole: float | None, left_out: Sequence[float | None], max_regret: float
) -> CurveStatistic | None:
    return (
        None
        if whole is None
        else CurveStatistic(whole, jackknife_interval(whole, left_out, (0.0, max_regret)))
    )
