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
from orchestrator.analyze.caveats import doubts, doubts_of_comparison, doubts_of_search
from orchestrator.analyze.censored import Ended, may_be_chosen
from orchestrator.analyze.comparison import Chosen, confirmed
from orchestrator.analyze.intervals import Estimate, Figure, Interval, jackknife, over_seeds, wilson
from orchestrator.analyze.results import REFERENCE, TOLERANCE, Curve, Panel, Point, Run, Spread, Summary
from orchestrator.analyze.search_results import searched
from orchestrator.record.schema import Record


def summarize(
    records: Iterable[Record],
    tolerance: float = TOLERANCE,
    *,
    baseline: str = "",
    margin: float = TOLERANCE,
    tuning: Mapping[str, Chosen | None] | None = None,
    looks: Sequence[int] = (),
    search: bool = False,
) -> Summary:
    """Everything the table, the plots and the report show. The order of the records does not matter. With a
    `baseline` they are a comparison's second stage, of points that the first, `tuning`, has chosen; `looks`:
    the numbers of seeds from which its verdict was read before. `search`: a search asked for the points."""
    known = panels.distinct(records)
    by_task: dict[tuple[str, str], list[Record]] = {}
    for record in known:
        key = record.configuration.task.name, record.configuration.model.name
        by_task.setdefault(key, []).append(record)
    comparisons, searches, grids = [], [], []
    for key in sorted(by_task):
        own = by_task[key]
        if baseline and (found := confirmed(own, baseline, margin, tuning, looks)) is not None:
            comparisons.append(found)
        elif search:
            searches.append(searched(own))
        else:
            grids += own
    shown = tuple(_panel(varied, lines, tolerance) for varied, lines in panels.panels(grids))
    made_with = panels.provenance(known)
    warnings = [
        *panels.mixed(made_with),
        *(w for p in shown for w in doubts(p)),
        *(w for s in searches for w in doubts_of_search(s)),
        *(w for c in comparisons for w in doubts_of_comparison(c)),
    ]
    states = {s: sum(r.state == s for r in known) for s in ("finished", "diverged", "stopped", "failed")}
    return Summary(shown, states, made_with, tuple(warnings), tolerance, tuple(searches), tuple(comparisons))


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _run(record: Record) -> Run:
    metric = record.configuration.task.metric
    seen = [e.scores.get(metric) for e in record.evaluations if e.split == "validation"]
    return Run(
        record.configuration.seed,
        record.fingerprint,
        record.state,
        _number(record.score("validation")),
        _number(record.score("test")),
        _number(seen[-1]) if seen else None,
        _number(record.untrained.get("test", {}).get(metric)),
    )


def _points(records: Sequence[Record]) -> tuple[Point, ...]:
    by_rate: dict[float, list[Run]] = {}
    for record in records:
        by_rate.setdefault(record.configuration.optimizer.learning_rate, []).append(_run(record))
    runs_at = {rate: sorted(by_rate[rate], key=lambda r: (r.seed, r.fingerprint)) for rate in sorted(by_rate)}
    usable = may_be_chosen([_ended(runs) for runs in runs_at.values()], records[0].configuration.task.floor)
    return tuple(_point(rate, runs, may) for (rate, runs), may in zip(runs_at.items(), usable, strict=True))


def _ended(runs: Sequence[Run]) -> Ended:
    scores = [r.validation for r in runs if r.validation is not None]
    return Ended(scores, sum(r.state == "stopped" for r in runs))


def _point(rate: float, runs: Sequence[Run], chosen_from: bool) -> Point:
    states = Counter(r.state for r in runs)
    ended = states["finished"] + states["diverged"]
    return Point(
        learning_rate=rate,
        validation=over_seeds([r.validation for r in runs if r.validation is not None]),
        test=over_seeds([r.test for r in runs if r.test is not None]),
        survivors=over_seeds(
            [r.validation for r in runs if r.validation is not None and r.state == "finished"]
        ),
        states=dict(sorted(states.items())),
        diverged_share=states["diverged"] / ended if ended else None,
        diverged_interval=wilson(states["diverged"], ended),
        chosen_from=chosen_from,
        runs=tuple(runs),
    )


@dataclass(frozen=True)
class _Means:
    """A curve as numbers. Rates without any score and without a stopped run (failed, pending) are left out:
    the curve is drawn across them. Rates with a stopped run stay, as None."""

    rates: list[float]
    x: list[float]
    y: list[float | None]
    test: list[float | None]
    diverged: list[float]
    best: int | None


def _means(points: Sequence[Point], floor: float, without_seed: int | None = None) -> _Means:
    rates: list[float] = []
    y: list[float | None] = []
    test: list[float | None] = []
    diverged: list[float] = []
    left = [[r for r in point.runs if r.seed != without_seed] for point in points]
    may = may_be_chosen([_ended(runs) for runs in left], floor)
    for point, runs, chosen_from in zip(points, left, may, strict=True):
        scores = [r.validation for r in runs if r.validation is not None]
        tests = [r.test for r in runs if r.test is not None]
        if not scores and "stopped" not in point.states:
            continue
        usable = bool(scores) and chosen_from
        rates.append(point.learning_rate)
        y.append(math.fsum(scores) / len(scores) if usable else None)
        test.append(math.fsum(tests) / len(tests) if usable and tests else None)
        diverged.append(sum(r.state == "diverged" for r in runs) / len(scores) if scores else 0.0)
    return _Means(rates, [math.log10(r) for r in rates], y, test, diverged, curve_shape.best_index(y))


@dataclass(frozen=True)
class _Figures:
    """The plain numbers of one curve; computed once on all seeds and once without each."""

    best_rate: float | None = None
    interpolated: float | None = None
    width: tuple[float, bool] | None = None
    width_90: tuple[float, bool] | None = None
    half_decade: tuple[float, float] | None = None
    at_reference: float | None = None
    at_average: float | None = None


def _figures(
    m: _Means, floor: float, tolerance: float, reference: float | None, average: float | None
) -> _Figures:
    if m.best is None:
        return _Figures()
    best = m.y[m.best]
    assert best is not None

    def regret(rate: float | None) -> float | None:
        score = None if rate is None else curve_shape.score_at(m.x, m.y, math.log10(rate))
        return None if score is None else best - score

    return _Figures(
        m.rates[m.best],
        curve_shape.parabola_peak(m.x, m.y, m.best),
        curve_shape.width(m.x, m.y, m.best, best - tolerance),
        curve_shape.width(m.x, m.y, m.best, floor + 0.9 * (best - floor))
        if best > floor + curve_shape.ROUNDING
        else None,
        curve_shape.mean_regret(m.x, m.y, m.best),
        regret(reference),
        regret(average),
    )


def _reference(means: Mapping[str, _Means], variants: Mapping[str, str]) -> str | None:
    """LoRA's curve; the better one where a study has several (alphas, say)."""
    scores = {
        label: m.y[m.best] or 0.0
        for label, m in means.items()
        if variants[label] == REFERENCE and m.best is not None
    }
    return max(sorted(scores), key=lambda label: scores[label]) if scores else None


def _average_best(means: Mapping[str, _Means]) -> float | None:
    """The rate with the highest mean over variants, among the rates at which every variant has a score."""
    at: dict[float, list[float]] = {}
    scored = [m for m in means.values() if m.best is not None]
    for m in scored:
        for rate, score in zip(m.rates, m.y, strict=True):
            if score is not None:
                at.setdefault(rate, []).append(score)
    shared = [rate for rate in sorted(at) if len(at[rate]) == len(scored)]
    return max(shared, key=lambda rate: (round(math.fsum(at[rate]), 9), -rate)) if shared else None


def _all_figures(
    points: Mapping[str, tuple[Point, ...]],
    variants: Mapping[str, str],
    floor: float,
    tolerance: float,
    without_seed: int | None = None,
) -> tuple[dict[str, _Means], dict[str, _Figures], str | None, float | None, float | None]:
    """Seeds are paired, so one is left out of all variants together, and the common rates are chosen anew."""
    means = {label: _means(p, floor, without_seed) for label, p in points.items()}
    reference = _reference(means, variants)
    best = None if reference is None else means[reference].best
    rate = None if reference is None or best is None else means[reference].rates[best]
    average = _average_best(means)
    figures = {label: _figures(m, floor, tolerance, rate, average) for label, m in means.items()}
    return means, figures, reference, rate, average


def _panel(varied: Mapping[str, panels.Value], lines: Sequence[panels.Line], tolerance: float) -> Panel:
    first = lines[0].records[0].configuration
    floor, metric = first.task.floor, first.task.metric
    points = {line.label: _points(line.records) for line in lines}
    variants = {line.label: line.records[0].configuration.variant.name for line in lines}
    means, figures, reference, rate, average = _all_figures(points, variants, floor, tolerance)
    seeds = sorted(
        {r.seed for p in points.values() for point in p for r in point.runs if r.validation is not None}
    )
    left_out = {s: _all_figures(points, variants, floor, tolerance, s)[1] for s in seeds}
    common, name = (rate, "LoRA's best rate") if rate is not None else (average, "the rate best on average")

    curves = []
    for line in lines:
        own = {r.seed for p in points[line.label] for r in p.runs if r.validation is not None}
        without = [left_out[s][line.label] for s in seeds if s in own]
        m = means[line.label]
        curves.append(_curve(line, points[line.label], m, figures[line.label], without, floor, common))
    curves.sort(key=lambda c: (-(c.best_validation.mean or 0.0) if c.best_rate else math.inf, c.label))

    both = [c for c in curves if c.test_at_common_rate is not None and c.best_test.mean is not None]
    runs = [record for line in lines for record in line.records]
    return Panel(
        first.task.name,
        first.model.name,
        metric,
        floor,
        varied,
        tuple(curves),
        _untrained(runs, "validation", metric),
        _untrained(runs, "test", metric),
        reference,
        rate,
        average,
        common,
        name,
        _spread({c.label: c.test_at_common_rate for c in both}),
        _spread({c.label: c.best_test.mean for c in both}),
    )


def _untrained(records: Sequence[Record], split: str, metric: str) -> float | None:
    values = sorted(v for r in records if (v := _number(r.untrained.get(split, {}).get(metric))) is not None)
    return math.fsum(values) / len(values) if values else None


def _spread(scores: Mapping[str, float | None]) -> Spread | None:
    known = sorted((v, label) for label, v in scores.items() if v is not None)
    if len(known) < 2:
        return None
    (low, worst), (high, best) = known[0], known[-1]
    return Spread(low, high, worst, best, len(known))


def _curve(
    line: panels.Line,
    points: tuple[Point, ...],
    m: _Means,
    f: _Figures,
    without: Sequence[_Figures],
    floor: float,
    common: float | None,
) -> Curve:
    best = next((p for p in points if p.learning_rate == f.best_rate), None)
    span = m.x[-1] - m.x[0] if m.x else 0.0
    log_best = (
        jackknife(f.interpolated, [w.interpolated for w in without], (m.x[0], m.x[-1])) if m.x else None
    )
    known = [floor, *(v for v in m.y if v is not None)]
    most = max(known) - min(known)  # no regret is larger than the curve is high
    cliff = None if m.best is None else curve_shape.cliff(m.y, m.diverged, m.best, floor)
    return Curve(
        variant=line.records[0].configuration.variant.name,
        label=line.label,
        varied=line.varied,
        points=points,
        best_rate=f.best_rate,
        best_validation=best.validation if best else Estimate(0),
        best_test=best.test if best else Estimate(0),
        best_rates_leaving_one_out=tuple(w.best_rate for w in without if w.best_rate is not None)
        if len(without) > 1
        else (),
        bracketed=None if m.best is None else curve_shape.bracketed(m.y, m.best),
        interpolated_best_rate=None
        if f.interpolated is None
        else Figure(10**f.interpolated, Interval(10**log_best.low, 10**log_best.high) if log_best else None),
        width=_bounded(f.width, [w.width for w in without], span),
        width_90=_bounded(f.width_90, [w.width_90 for w in without], span),
        half_decade_regret=_regret(_first(f.half_decade), [_first(w.half_decade) for w in without], most),
        half_decade_covered=None if f.half_decade is None else f.half_decade[1],
        regret_at_reference_best=_regret(f.at_reference, [w.at_reference for w in without], most),
        regret_at_average_best=_regret(f.at_average, [w.at_average for w in without], most),
        cliff=None if cliff is None else m.rates[cliff],
        gain=over_seeds(
            [
                r.test - r.untrained_test
                for r in best.runs
                if r.test is not None and r.untrained_test is not None
            ]
            if best
            else []
        ),
        test_at_common_rate=None if common is None else curve_shape.score_at(m.x, m.test, math.log10(common)),
    )


def _first(pair: tuple[float, float] | None) -> float | None:
    return None if pair is None else pair[0]


def _bounded(
    whole: tuple[float, bool] | None, left_out: Sequence[tuple[float, bool] | None], span: float
) -> Figure | None:
    if whole is None:
        return None
    value, at_least = whole
    values = [None if w is None else w[0] for w in left_out]
    return Figure(value, None if at_least else jackknife(value, values, (0.0, span)), at_least)


def _regret(whole: float | None, left_out: Sequence[float | None], most: float) -> Figure | None:
    return None if whole is None else Figure(whole, jackknife(whole, left_out, (0.0, most)))
