"""The summary of a study: all numbers and verdicts that the terminal, the report and MLflow show."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from orchestrator.analyze import panels
from orchestrator.analyze.caveats import panel_caveats, search_caveats
from orchestrator.analyze.costs import Place, summarize_costs, summarize_time_use
from orchestrator.analyze.curve_text import curve_verdict, panel_rate_verdict, search_verdict
from orchestrator.analyze.factors.factor_summary import find_stars, summarize_factors
from orchestrator.analyze.factors.factor_verdicts import factor_verdicts, factor_warnings
from orchestrator.analyze.intervals import Estimate
from orchestrator.analyze.published.published_selection import mark_published, select_published
from orchestrator.analyze.results import Panel, Summary
from orchestrator.analyze.run_labels import LABELS, label_runs
from orchestrator.analyze.sensitivity import summarize_panels
from orchestrator.analyze.tuned.task_comparison import compare_tuned
from orchestrator.analyze.tuned.tuned_results import TunedComparison
from orchestrator.analyze.tuned.tuned_verdicts import tuned_verdicts, tuned_warnings
from orchestrator.analyze.tuning import SearchResult, summarize_search
from orchestrator.record.schema import Record
from orchestrator.record.study_file import StudyFile, data_warnings


def summarize(study: StudyFile, records: Iterable[Record]) -> Summary:
    """Summarize a study.

    Args:
        study: The study. `study.settings` decide how the records are analyzed.
        records: The records of its configurations, in any order. Of several records of one configuration, one
            is used, see `panels.deduplicate_records`.
    """
    if study.settings.select == "published":
        chosen = list(map(select_published, records))
        return mark_published(_summarize(study, chosen), chosen)
    return _summarize(study, records)


def _summarize(study: StudyFile, records: Iterable[Record]) -> Summary:
    distinct = panels.deduplicate_records(records)
    kind, labels = study.settings.kind, label_runs(distinct)
    searches = _summarize_searches(distinct) if kind == "search" else ()
    missing = bool(set(study.configurations) - {record.fingerprint for record in distinct})
    stars = find_stars(_in_study_order(study, distinct), labels) if kind == "factors" else []
    factors = summarize_factors(stars, study.settings) if kind == "factors" else None
    curves = [record for star in stars for record in star.curve] if kind == "factors" else distinct
    shown = summarize_panels(curves) if kind in ("curve", "factors") else ()
    comparison = compare_tuned(study, distinct, labels) if kind == "replicates" else None
    verdicts = tuned_verdicts(comparison, study) if comparison else []
    verdicts += factor_verdicts(factors, study, missing) if factors else []
    if kind == "curve":
        verdicts += [curve_verdict(panel, study) for panel in shown]
        verdicts += filter(None, map(panel_rate_verdict, shown))
    verdicts += [search_verdict(search, study) for search in searches]
    provenance = panels.count_provenance(distinct)
    warnings = [
        *data_warnings(study.sources),
        *panels.mixed_provenance_warnings(provenance),
        *(w for p in shown for w in panel_caveats(p)),
        *(w for s in searches for w in search_caveats(s)),
        *(tuned_warnings(comparison) if comparison else ()),
        *(factor_warnings(factors, missing) if factors else ()),
    ]
    counts = Counter(labels.values())
    return Summary(
        verdicts=tuple(verdicts),
        panels=shown,
        states={label: counts[label] for label in LABELS},
        provenance=provenance,
        warnings=tuple(warnings),
        searches=searches,
        comparison=comparison,
        factor_study=factors,
        costs=summarize_costs(curves, _places(shown), _best_scores(shown, searches, comparison)),
        time_use=summarize_time_use(distinct),
    )


def _in_study_order(study: StudyFile, records: Sequence[Record]) -> list[Record]:
    """Return records in the order in which the study requested them, in which a star's default is first."""
    order = {fingerprint: i for i, fingerprint in enumerate(study.configurations)}
    return sorted(records, key=lambda record: order.get(record.fingerprint, len(order)))


def _places(shown: Sequence[Panel]) -> dict[str, Place]:
    """Return fingerprint -> title of the panel and label of the curve, for the runs of all curves."""
    return {
        run.fingerprint: (panel.title, curve.label)
        for panel in shown
        for curve in panel.curves
        for point in curve.points
        for run in point.runs
    }


def _best_scores(
    shown: Sequence[Panel], searches: Sequence[SearchResult], comparison: TunedComparison | None
) -> dict[Place, Estimate]:
    """Return the test score of each curve, or else of each variant, at its best point."""
    scores = {(panel.title, curve.label): curve.best_test for panel in shown for curve in panel.curves}
    for search in searches:
        title = f"{search.task} on {search.model}"
        scores |= {(title, v.variant): v.best.test for v in search.variants if v.best}
    for task in comparison.tasks if comparison else ():
        scores |= {(task.title, row.variant): row.test for row in task.rows}
    return scores


def _summarize_searches(records: Sequence[Record]) -> tuple[SearchResult, ...]:
    """Summarize the search on each task and model."""
    by_task: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
        by_task[record.configuration.task.name, record.configuration.model.name].append(record)
    return tuple(summarize_search(own) for _, own in sorted(by_task.items()))
