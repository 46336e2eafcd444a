"""The second stage of a tuned comparison: each variant at the point that the first stage chose, with fresh
seeds, against the tuned baseline."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from orchestrator.analyze.panels import Value
from orchestrator.analyze.selection import Choice
from orchestrator.analyze.significance import Comparison, SeedScore, compare_to_baseline
from orchestrator.analyze.tuning import TuningResult, selection_frequencies
from orchestrator.record.schema import Record
from orchestrator.study.configuration import Configuration

CONTROLS = ("full", "head_only")
"""No variants of LoRA: compared, but not counted in the claim about most variants."""


@dataclass(frozen=True)
class ChosenPoint:
    """What tuning chose for a variant, and what that took: `points` tried with `seeds` each, by the
    `states` of their runs; optimizer steps, and those of all runs to the end. `otherwise`: how often
    resampled seeds would choose each point; empty with one seed. It goes into choice.json."""

    configuration: Configuration
    settings: Mapping[str, Value]
    validation: float
    edges: tuple[str, ...]
    points: int
    seeds: int
    states: Mapping[str, int]
    steps: int
    most_steps: int
    otherwise: tuple[tuple[Mapping[str, Value], float], ...] = ()

    @classmethod
    def from_tuning(cls, result: TuningResult) -> ChosenPoint | None:
        """None where no point has a score."""
        best = result.best
        if best is None or best.validation.mean is None:
            return None
        shares = [(p.settings, share) for p, share in selection_frequencies(result) or ()]
        return cls(
            replace(best.configuration, seed=0),
            best.settings,
            best.validation.mean,
            result.edges,
            len(result.points),
            len({seed for p in result.points for seed in p.scores}),
            result.states,
            result.steps,
            result.most_steps,
            tuple(shares),
        )


@dataclass(frozen=True)
class TunedChoice(Choice):
    """choice.json of the first stage. `points`: those of a search a variant, None for a grid. `variants`:
    None for one that has no score at any point."""

    points: int | None
    variants: Mapping[str, ChosenPoint | None]


@dataclass(frozen=True)
class TunedComparison:
    """One task and base model. `chosen` is empty, and so are the words about tuning, where the first
    stage's choice is not at hand. `item_errors`: of each variant's mean difference, the standard error that
    comes from the test split's having so many items and no more. `untuned`: variants without a score at any
    point of the first stage. `looks`: the numbers of seeds from which a verdict was read before this one."""

    task: str
    model: str
    metric: str
    steps: int
    seeds: tuple[int, ...]
    failed: int
    comparison: Comparison
    configurations: Mapping[str, Configuration]
    chosen: Mapping[str, ChosenPoint]
    item_errors: Mapping[str, float]
    test_items: int
    untuned: tuple[str, ...] = ()
    looks: tuple[int, ...] = ()


def compare_tuned(
    records: Sequence[Record],
    baseline: str,
    margin: float,
    tuning_choices: Mapping[str, ChosenPoint | None] | None = None,
    looks: Sequence[int] = (),
) -> TunedComparison | None:
    """`records` are of one task and model. None without a score of the baseline. Of a variant with several
    points the chosen one counts, else the one with most seeds. What `tuning` knows and the records do not is
    unknown in the claim. `looks`: see StudyFile."""
    chosen = {variant: found for variant, found in (tuning_choices or {}).items() if found is not None}
    points = _records_by_variant(records, chosen)
    scores = {
        variant: {
            r.configuration.seed: SeedScore(value, r.state == "diverged")
            for r in own
            if (value := r.score("test")) is not None and math.isfinite(value)
        }
        for variant, own in points.items()
    }
    if not scores.get(baseline):
        return None
    first = points[baseline][0].configuration
    return TunedComparison(
        first.task.name,
        first.model.name,
        first.task.metric,
        first.schedule.steps,
        tuple(sorted({r.configuration.seed for own in points.values() for r in own})),
        sum(r.state == "failed" for own in points.values() for r in own),
        compare_to_baseline(scores, baseline, margin, CONTROLS, unknown=tuple(tuning_choices or ())),
        {variant: replace(own[0].configuration, seed=0) for variant, own in points.items()},
        {variant: chosen[variant] for variant in points if variant in chosen},
        _item_errors(points, baseline),
        first.task.test_size,
        tuple(variant for variant, found in (tuning_choices or {}).items() if found is None),
        tuple(n for n in looks if n < max(len(own) for own in points.values())),
    )


def _records_by_variant(
    records: Sequence[Record], chosen: Mapping[str, ChosenPoint]
) -> dict[str, list[Record]]:
    found: dict[str, dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        point = replace(record.configuration, seed=0).fingerprint
        found[record.configuration.variant.name][point].append(record)
    selected = {}
    for variant in sorted(found):
        points = found[variant]
        wanted = chosen[variant].configuration.fingerprint if variant in chosen else ""
        name = wanted if wanted in points else max(points, key=lambda p: (len(points[p]), p))
        selected[variant] = sorted(points[name], key=lambda r: r.configuration.seed)
    return selected


def _item_errors(points: Mapping[str, Sequence[Record]], baseline: str) -> dict[str, float]:
    """Per item the mean over seeds of its outcome, minus the baseline's; their deviation over sqrt(items)."""
    import numpy as np

    means = {}
    for variant, own in points.items():
        rows = [r.items["test"].correct for r in own if r.state == "finished" and "test" in r.items]
        if rows and all(rows) and len({len(row) for row in rows}) == 1:
            means[variant] = np.mean(rows, axis=0)
    if baseline not in means:
        return {}
    size = len(means[baseline])
    return {
        v: float(np.std(m - means[baseline], ddof=1) / math.sqrt(size))
        for v, m in means.items()
        if v != baseline and len(m) == size > 1
    }
