"""The comparison with the tuned baseline: intervals, outcomes, and the test of claim 2."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.analyze.run_labels import RunLabel
from orchestrator.analyze.scores import count_items, item_results
from orchestrator.analyze.statistics import planning
from orchestrator.analyze.statistics.outcome import (
    classify,
    counts_for_baseline,
    largest_count,
    partial_conjunction_p_values,
)
from orchestrator.analyze.statistics.simultaneous import SimultaneousIntervals, compare_with_baseline
from orchestrator.analyze.statistics.spending import level_of_look
from orchestrator.analyze.statistics.usable import holm, usable_p_values
from orchestrator.analyze.tuned.fixed_rate import RateScores, compare_at_fixed_rate, interval_of
from orchestrator.analyze.tuned.tuned_results import (
    CONTROLS,
    FixedRateComparison,
    Role,
    TaskComparison,
    TunedComparison,
    VariantRow,
)
from orchestrator.analyze.tuned.tunings import Tuning, find_tunings
from orchestrator.analyze.tuned.variant_tunings import (
    chosen_test,
    describe_tunings,
    has_result,
    noise_span,
    observed_span,
)
from orchestrator.analyze.verdict import VerdictOutcome
from orchestrator.record.schema import Record
from orchestrator.record.study_file import AnalysisSettings, StudyFile

MAX_CRITICAL_VALUE = 1e4
"""The largest critical value, in standard errors, for which a resolvable difference is computed.

With two replicates the critical value of an early look can be larger."""
Tunings = Mapping[str, Mapping[int, Tuning]]
"""Variant -> replicate -> tuning."""


def compare_tuned(
    study: StudyFile, records: Sequence[Record], labels: Mapping[str, RunLabel]
) -> TunedComparison | None:
    """Compare all variants with the tuned baseline on each task, and over all tasks.

    Args:
        study: The study, with the settings of its analysis.
        records: The records of the study, one per configuration.
        labels: Fingerprint -> label of the run.

    Returns:
        The comparison; None if the baseline was not tuned on any task.
    """
    by_task: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
        by_task[record.configuration.task.name, record.configuration.model.name].append(record)
    missing = bool(set(study.configurations) - {record.fingerprint for record in records})
    found = [
        _compare_task(own, labels, study.settings, study.looks, missing) for _, own in sorted(by_task.items())
    ]
    tasks = tuple(task for task in found if task is not None)
    if not tasks:
        return None
    alpha = min(task.claim_alpha for task in tasks)
    return TunedComparison(
        tasks,
        largest_count(np.array([np.nan if t.p_claim is None else t.p_claim for t in tasks]), alpha),
        largest_count(np.array([np.nan if t.p_against is None else t.p_against for t in tasks]), alpha),
    )


def _compare_task(
    records: Sequence[Record],
    labels: Mapping[str, RunLabel],
    settings: AnalysisSettings,
    looks: Sequence[int],
    missing: bool,
) -> TaskComparison | None:
    """Compare all variants with the tuned baseline on one task and base model.

    Args:
        records: The records of one task and base model.
        labels: Fingerprint -> label of the run.
        settings: The settings of the analysis, for example the baseline and the margin.
        looks: Numbers of replicates, ascending, at which the study has shown a verdict.
        missing: True if configurations of the study have not ended.

    Returns:
        The comparison; None if the baseline was not tuned.
    """
    tunings, left_out = find_tunings(records, labels, missing)
    if not tunings.get(settings.baseline):
        return None
    first = records[0].configuration
    replicates = len(tunings[settings.baseline])
    seen = (*(n for n in looks if n < replicates), replicates)
    planned = settings.max_replicates or replicates
    alpha = level_of_look(seen, planned, comparisons=len(tunings) - 1)
    claim_alpha = level_of_look(seen, planned)
    rows, share_p, found = _compare_rows(tunings, {r.fingerprint: r for r in records}, settings, alpha)
    counted = [row for row in rows if row.role == "variant"]
    return TaskComparison(
        task=first.task.name,
        model=first.model.name,
        metric=first.task.metric,
        steps=first.lr_schedule.steps,
        test_items=first.task.test_size,
        baseline=settings.baseline,
        margin=settings.margin,
        replicates=replicates,
        points=max(len(tuning.runs) for own in tunings.values() for tuning in own.values()),
        alpha=alpha,
        claim_alpha=claim_alpha,
        looks=seen,
        planned=planned,
        has_question_noise=all(row.question_error is not None for row in rows if row.interval is not None),
        rows=tuple(rows),
        counted=len(counted),
        **_test_claim(rows, found, share_p, claim_alpha),
        span=observed_span([rows[0], *counted]),
        expected_span=noise_span([rows[0], *counted]),
        fixed_rate=_fixed_rate(tunings, settings, alpha, {row.variant for row in counted}),
        missing=missing or left_out > 0 or len({len(own) for own in tunings.values()}) > 1,
    )


def _compare_rows(
    tunings: Tunings, records: Mapping[str, Record], settings: AnalysisSettings, alpha: float
) -> tuple[list[VariantRow], dict[str, float], SimultaneousIntervals]:
    """Compare each variant with the baseline.

    Args:
        tunings: The tunings of the task, those of the baseline among them.
        records: Fingerprint -> record.
        settings: The settings of the analysis.
        alpha: One minus the simultaneous confidence level of this look.

    Returns:
        The rows of the task, the baseline's first; for each other variant the p value of the test of equal
        shares of usable tunings, without correction; the intervals of these variants, in the same order.
    """
    base = tunings[settings.baseline]
    others = [name for name in sorted(tunings) if name != settings.baseline]
    pairs = {name: _usable_pairs(tunings[name], base) for name in others}
    differences = np.full((len(base), len(others)), np.nan)
    for column, name in enumerate(others):
        for row, replicate in enumerate(base):
            if replicate in pairs[name]:
                differences[row, column] = chosen_test(tunings[name][replicate]) - chosen_test(
                    base[replicate]
                )
    errors = {
        name: _question_error(
            [
                (_chosen_record(tunings[name][r], records), _chosen_record(base[r], records))
                for r in pairs[name]
            ]
        )
        for name in others
    }
    item_error = np.array([errors[name] or 0.0 for name in others])
    found = compare_with_baseline(differences, settings.margin, alpha=alpha, item_error=item_error)
    share_p = _share_p_values(tunings, others, base)
    adjusted_p = holm(share_p)
    items = count_items(records.values(), "test")
    baseline_row = describe_tunings(settings.baseline, "baseline", base, settings.margin, items)
    rows = [
        replace(
            describe_tunings(name, _role(name, settings), tunings[name], settings.margin, items),
            usable_p=float(adjusted_p[i]),
            question_error=errors[name],
            **_comparison_fields(found, i, settings.margin),
        )
        for i, name in enumerate(others)
    ]
    rows = [_decide_by_share(row, baseline_row, alpha) for row in rows]
    rows.sort(key=lambda row: -math.inf if row.difference is None else row.difference, reverse=True)
    return [baseline_row, *rows], dict(zip(others, map(float, share_p), strict=True)), found


def _chosen_record(tuning: Tuning, records: Mapping[str, Record]) -> Record:
    assert tuning.chosen is not None
    return records[tuning.chosen.fingerprint]


def _question_error(pairs: Sequence[tuple[Record, Record]]) -> float | None:
    """Return the standard error, over the test questions, of a variant's mean difference.

    All runs of a study are scored on the same questions in the same order. The difference on each question is
    first averaged over the replicates.

    Args:
        pairs: The chosen records of the variant and of the baseline in each replicate.

    Returns:
        The standard error; None if a record has no results per question, if the test score is not the mean of
        these results (a correlation, F1), or with no pair or fewer than two questions.
    """
    differences = []
    for record, baseline in pairs:
        own, other = item_results(record, "test"), item_results(baseline, "test")
        if own is None or other is None or len(own) != len(other):
            return None
        differences.append(np.subtract(own, other))
    if not differences or len({len(each) for each in differences}) > 1 or len(differences[0]) < 2:
        return None
    means = np.mean(differences, axis=0)
    return float(means.std(ddof=1) / math.sqrt(len(means)))


def _comparison_fields(found: SimultaneousIntervals, index: int, margin: float) -> dict[str, Any]:
    """Return the fields of `VariantRow` that come from the interval in column `index`."""
    interval = interval_of(found, index)
    low, high = (interval.low, interval.high) if interval else (math.nan, math.nan)
    outcome = classify(low, high, margin)
    counts = {True: "yes", False: "no", None: "open"}[counts_for_baseline(low, high, margin)]
    mean = float(found.mean[index])
    fields: dict[str, Any] = {
        "pairs": int(found.replicates[index]),
        "difference": mean if math.isfinite(mean) else None,
        "interval": interval,
        "outcome": outcome,
        "counts": counts,
    }
    if interval is None:
        return fields
    std, error = float(found.std[index]), float(found.standard_error[index])
    seed_error = std / math.sqrt(found.replicates[index])
    item_error = math.sqrt(max(0.0, error**2 - seed_error**2))
    fields["seed_error"] = seed_error
    critical = float(found.critical_value[index])
    if critical < MAX_CRITICAL_VALUE:
        fields["resolvable"] = planning.resolvable_difference(error, float(found.degrees[index]), critical)
    if math.isfinite(found.z_critical) and (outcome == "undecided" or counts == "open"):
        fields["replicates_to_decide"] = planning.replicates_to_decide(
            std, margin, found.z_critical, item_error
        )
    return fields


def _decide_by_share(row: VariantRow, baseline: VariantRow, alpha: float) -> VariantRow:
    """Return the row with `outcome` and `counts` corrected for the shares of usable tunings.

    The correction applies if the shares of the variant and the baseline differ significantly. If the baseline
    is usable less often, it does not match the variant (`counts` is "no"), whatever the scores are. If there
    is no interval of the difference, the shares determine `outcome` and `counts`. The rows of controls and of
    unverified variants are never counted.
    """
    if row.role in ("control", "unverified"):
        row = replace(row, counts="not counted")
    if row.usable is None or baseline.usable is None or row.usable_p is None or row.usable_p > alpha:
        return row
    is_worse = _is_usable_less_often(row, baseline)
    if row.interval is None:
        row = replace(row, outcome="worse" if is_worse else "better")
    if row.counts == "not counted" or (is_worse and row.interval is not None):
        return row
    return replace(row, counts="yes" if is_worse else "no")


def _is_usable_less_often(row: VariantRow, baseline: VariantRow) -> bool:
    return row.usable is not None and baseline.usable is not None and row.usable.share < baseline.usable.share


def _test_claim(
    rows: Sequence[VariantRow],
    found: SimultaneousIntervals,
    share_p: Mapping[str, float],
    alpha: float,
) -> dict[str, Any]:
    """Test claim 2: the baseline is not inferior to more than half of the counted variants.

    The partial conjunction tests are over p values that are not corrected for the number of variants.

    Args:
        rows: The rows of all variants, the baseline's first.
        found: The intervals of the variants, in the order of `share_p`.
        share_p: Variant -> p value of the test of equal shares of usable tunings, without correction.
        alpha: The type I error rate of this look.

    Returns:
        The fields of `TaskComparison` that describe the claim.
    """
    holds, beaten, others = [], [], list(share_p)
    for row in rows:
        if row.role != "variant":
            continue
        p = float(found.p_not_superior[others.index(row.variant)])
        p_holds, p_beaten = (p, 1.0 - p) if row.interval is not None else (1.0, 1.0)
        if row.usable_p is not None and row.usable_p <= alpha:  # The shares differ, see `_decide_by_share`.
            if not _is_usable_less_often(row, rows[0]):
                p_holds, p_beaten = 1.0, min(p_beaten, share_p[row.variant])
            elif row.interval is None:
                p_holds = share_p[row.variant]
        holds.append(p_holds)
        beaten.append(p_beaten)
    p_claim = p_against = None
    outcome: VerdictOutcome = "descriptive"
    if holds:  # more than half of the variants for the claim, at least half against it
        p_claim = float(partial_conjunction_p_values(np.array(holds))[len(holds) // 2])
        p_against = float(partial_conjunction_p_values(np.array(beaten))[(len(beaten) - 1) // 2])
        outcome = "supported" if p_claim <= alpha else "refuted" if p_against <= alpha else "undecided"
    return {
        "holds_at_least": largest_count(np.array(holds), alpha),
        "beaten_at_least": largest_count(np.array(beaten), alpha),
        "p_claim": p_claim,
        "p_against": p_against,
        "outcome": outcome,
    }


def _role(variant: str, settings: AnalysisSettings) -> Role:
    if variant in CONTROLS:
        return "control"
    return "unverified" if variant in settings.unverified else "variant"


def _usable_pairs(own: Mapping[int, Tuning], base: Mapping[int, Tuning]) -> list[int]:
    """Return the replicates in which the tunings of the variant and of the baseline are both usable."""
    return [r for r, tuning in base.items() if tuning.is_usable and r in own and own[r].is_usable]


def _share_p_values(
    tunings: Tunings, others: Sequence[str], base: Mapping[int, Tuning]
) -> NDArray[np.float64]:
    """Return the p value of McNemar's test for each variant, shape (others,), without correction.

    The test compares the shares of usable tunings of the variant and the baseline.
    """
    usable, known = np.zeros((2, len(base), len(others)), dtype=bool)
    for column, name in enumerate(others):
        for row, (replicate, baseline) in enumerate(base.items()):
            own = tunings[name].get(replicate)
            if own is not None:
                usable[row, column] = own.is_usable
                known[row, column] = has_result(own) and has_result(baseline)
    of_base = np.array([t.is_usable for t in base.values()], dtype=bool)
    columns = [slice(column, column + 1) for column in range(len(others))]
    alone = [usable_p_values(usable[:, column], of_base, known[:, column])[0] for column in columns]
    return np.array(alone)


def _fixed_rate(
    tunings: Tunings, settings: AnalysisSettings, alpha: float, counted: Collection[str]
) -> FixedRateComparison | None:
    """Compare the baseline and the counted variants at fixed rates.

    Returns:
        The comparison; None if fewer than two replicates have the same rates for all these variants, or if
        these replicates have different numbers of rates.
    """
    names = [settings.baseline, *sorted(counted)]
    shared = [
        replicate
        for replicate, tuning in tunings[settings.baseline].items()
        if all(_rates(tunings[name].get(replicate)) == _rates(tuning) for name in names)
    ]
    sizes = {len(tunings[settings.baseline][r].runs) for r in shared}
    if len(shared) < 2 or len(sizes) != 1:
        return None
    rates = np.array([_rates(tunings[settings.baseline][r]) for r in shared])
    scores = {name: _rate_scores([tunings[name][r] for r in shared]) for name in names}
    centers = list(map(float, np.exp(np.log(rates).mean(axis=0))))
    return compare_at_fixed_rate(centers, scores, settings.baseline, settings.margin, alpha)


def _rates(tuning: Tuning | None) -> tuple[float, ...]:
    return () if tuning is None else tuple(run.learning_rate for run in tuning.runs)


def _rate_scores(tunings: Sequence[Tuning]) -> RateScores:
    scores = [[math.nan if run.test is None else run.test for run in t.runs] for t in tunings]
    chosen = [-1 if t.chosen is None else t.runs.index(t.chosen) for t in tunings]
    return RateScores(np.array(scores), np.array(chosen))
