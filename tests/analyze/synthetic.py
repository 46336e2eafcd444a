"""Synthetic records, so that the analysis is tested without training.

The scores come from a dry run of the task `letters` with five variants, seven rates and three seeds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from configurations import template

from orchestrator.analyze.analysis import analyze
from orchestrator.analyze.results import Results
from orchestrator.record.schema import Evaluation, Provenance, Record, RecordState
from orchestrator.record.study_file import StudyFile
from orchestrator.study.configuration import LRSchedule

RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
NOTHING = (0.0, 0.0, 0.0)
DIVERGED = (None, None, None)

# The scores of three seeds at each rate, by variant. None stands for a diverged run.
STUDY: dict[str, Sequence[Sequence[float | None]]] = {
    "lora": [NOTHING, (0.01,) * 3, (0.22, 0.25, 0.17), (0.96, 0.95, 0.99), NOTHING, DIVERGED, DIVERGED],
    "rslora": [NOTHING, (0.12, 0.1, 0.09), (0.58, 0.75, 0.68), (0.89, 0.96, 0.26), NOTHING, *2 * [DIVERGED]],
    "lora-plus": [
        *[(0.17, 0.21, 0.12), (0.61, 0.86, 0.66), (0.92, 0.13, 0.52), (0.0, None, 0.0)],
        *3 * [DIVERGED],
    ],
    "pissa": [
        *[(0.0, 0.0, 0.01), (0.32, 0.29, 0.25), (0.96, 0.96, 1.0), (0.65, 1.0, 0.99)],
        *[NOTHING, DIVERGED, DIVERGED],
    ],
    "hira": [*4 * [NOTHING], (0.25, 0.35, 0.19), (0.87, 0.99, 1.0), (0.0, 0.0, None)],
}


def record(
    variant: str = "lora",
    rate: float = 1e-2,
    seed: int = 0,
    validation: float | None = 0.5,
    test: float | None = None,
    *,
    state: RecordState | None = None,
    floor: float = 0.0,
    untrained: float = 0.0,
    task: str = "letters",
    model: str = "letters-base",
    rank: int = 8,
    alpha: float | None = 16.0,
    extra: dict[str, Any] | None = None,
    steps: int = 60,
    reason: str = "",
    provenance: Provenance | None = None,
) -> Record:
    """Build a record.

    Without a `validation` score the record is diverged, unless `state` is given. By default, `test` equals
    `validation`. In a stopped record, `validation` is the last validation score during training.
    """
    state = state or ("diverged" if validation is None else "finished")
    point = template(variant, task, rate, **(extra or {}))
    configuration = replace(
        point,
        variant=replace(point.variant, rank=rank, alpha=alpha),
        task=replace(point.task, floor=floor),
        model=replace(point.model, name=model),
        lr_schedule=LRSchedule(steps),
        seed=seed,
    )
    scores: list[Evaluation] = []
    if validation is not None:
        scores.append(Evaluation(steps, "validation", {"loss": 1.0, "exact_match": validation}))
        if state == "finished":
            scores.append(
                Evaluation(steps, "test", {"loss": 1.0, "exact_match": validation if test is None else test})
            )
    before = {"loss": 3.0, "exact_match": untrained}
    return Record(
        fingerprint=configuration.fingerprint,
        configuration=configuration,
        state=state,
        steps=steps,
        reason=reason or {"diverged": "smoothed training loss 4.9 above 1.5 x 3.1"}.get(state, ""),
        evaluations=tuple(scores),
        baseline_scores={"validation": before, "test": before},
        provenance=provenance or Provenance("0123abc", {"torch": "2.13.0", "ray": "2.60.0"}),
    )


def analyze_curves(records: Iterable[Record]) -> Results:
    """Analyze the records of a grid of learning rates."""
    return analyze(StudyFile("curves", "", "python experiments/lr_sensitivity.py"), records)


def study(scores: dict[str, Sequence[Sequence[float | None]]] = STUDY, **more: Any) -> list[Record]:
    """Build the records of a study, with test scores that differ a little from the validation scores."""
    records = []
    for v, (variant, curve) in enumerate(scores.items()):
        for r, (rate, seeds) in enumerate(zip(RATES, curve, strict=False)):
            for seed, value in enumerate(seeds):
                shift = ((7 * v + 3 * r + 5 * seed) % 7 - 3) / 100
                test = None if value is None else min(1.0, max(0.0, value + (shift if value > 0.05 else 0.0)))
                alpha = None if variant == "hira" else 16.0
                records.append(record(variant, rate, seed, value, test, alpha=alpha, **more))
    return records


def several_tasks() -> list[Record]:
    """Build the records of a study of two tasks."""
    return study() + study({k: STUDY[k] for k in ("lora", "pissa")}, task="digits", model="vit", floor=0.1)
