"""The comparison with the tuned baseline over all tasks of a study."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from orchestrator.analyze.run_labels import RunLabel
from orchestrator.analyze.statistics.aggregate import interquartile_mean, probability_of_improvement
from orchestrator.analyze.statistics.conjunction import largest_count
from orchestrator.analyze.tuned.task_comparison import compare_task
from orchestrator.analyze.tuned.tuned_results import TaskComparison, TunedComparison, VariantAggregate
from orchestrator.analyze.tuned.variant_tunings import chosen_test
from orchestrator.record.schema import Record
from orchestrator.record.study_file import StudyFile


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
        compare_task(own, labels, study.settings, study.looks, missing) for _, own in sorted(by_task.items())
    ]
    tasks = tuple(task for task in found if task is not None)
    if not tasks:
        return None
    alpha = min(task.claim_alpha for task in tasks)
    return TunedComparison(
        tasks,
        _aggregate(tasks) if len(tasks) > 1 else (),
        largest_count(np.array([np.nan if t.p_claim is None else t.p_claim for t in tasks]), alpha),
        largest_count(np.array([np.nan if t.p_against is None else t.p_against for t in tasks]), alpha),
    )


def _aggregate(tasks: Sequence[TaskComparison]) -> tuple[VariantAggregate, ...]:
    """Return the aggregate of each variant, the largest mean difference first.

    A task counts for a variant if it has a replicate in which both the variant and the baseline are usable.
    The aggregate uses the replicates in which both are usable on all these tasks, because the arrays of the
    bootstrap have one row per replicate. With fewer than two such replicates there is no aggregate.
    """
    scores = [
        {row.variant: {t.replicate: chosen_test(t) for t in row.tunings if t.is_usable} for row in task.rows}
        for task in tasks
    ]
    baseline = tasks[0].baseline
    names = dict.fromkeys(row.variant for task in tasks for row in task.rows[1:])
    found = []
    for name in names:
        rows = [row for task in tasks for row in task.rows if row.variant == name and row.pairs]
        own = [task for task in scores if set(task.get(name, ())) & set(task[baseline])]
        if not own:
            continue
        shared = sorted(set.intersection(*(set(task[name]) & set(task[baseline]) for task in own)))
        if len(shared) < 2:
            continue
        variant = np.array([[task[name][r] for task in own] for r in shared])
        base = np.array([[task[baseline][r] for task in own] for r in shared])
        found.append(
            VariantAggregate(
                name,
                len(own),
                interquartile_mean(variant - base),
                probability_of_improvement(variant, base),
                dict(Counter(row.counts for row in rows)),
            )
        )
    return tuple(sorted(found, key=lambda each: (-each.mean_difference.value, each.variant)))
