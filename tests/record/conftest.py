"""The fixture `make_record`, which makes synthetic records, and the fixtures of tests/study/in_process.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from configurations import template

from orchestrator.record.schema import Cost, Evaluation, ItemResults, Provenance, Record, StepMetrics
from orchestrator.study.configuration import BatchConfig, Configuration, LRSchedule

__all__ = ["MakeRecord", "configuration", "make_record", "record"]

MakeRecord = Callable[..., Record]


def configuration(seed: int = 0, rate: float = 1e-3, variant: str = "lora", **extra: Any) -> Configuration:
    point = template(variant, rate=rate, **extra)
    task = replace(point.task, floor=0.05)
    return replace(point, task=task, lr_schedule=LRSchedule(20), batches=BatchConfig(8), seed=seed)


def record(
    seed: int = 0, rate: float = 1e-3, state: Any = "finished", steps: int = 20, **changes: Any
) -> Record:
    """Return a record like one of a real lane. A diverged record ends with losses that are not finite."""
    own = configuration(seed, rate, changes.pop("variant", "lora"), **changes.pop("extra", {}))
    bad = state == "diverged"
    curve = [StepMetrics(s, 3.0 / s, rate * s / steps, 1.0 / s) for s in range(1, steps + 1)]
    if bad:
        curve[-2] = StepMetrics(steps - 1, math.inf, rate, math.inf)
        curve[-1] = StepMetrics(steps, math.nan, rate, -math.inf)
    evaluations = [
        Evaluation(s, "validation", {"loss": 2.0 / s, "exact_match": s / 40, "accuracy": s / 30})
        for s in range(5, steps + 1, 5)
    ]
    if state == "finished":
        evaluations.append(Evaluation(steps, "test", {"loss": 0.2, "exact_match": 0.45, "accuracy": 0.6}))
    whole = Record(
        fingerprint=own.fingerprint,
        configuration=own,
        state=state,
        steps=steps,
        reason="" if state == "finished" else f"{state} for a test",
        traceback="Traceback: no such tensor" if state == "failed" else "",
        curve=tuple(curve),
        evaluations=tuple(evaluations),
        baseline_scores={
            "validation": {"loss": math.inf, "exact_match": 0.1},
            "test": {"exact_match": 0.125},
        },
        items={"validation": ItemResults((1.0, 0.0), (0.5, math.nan), ("a", "b"))},
        cost=Cost(2.0, 0.5, 4096, 1234, 3 * 2**20),
        provenance=Provenance(
            "abc123", {"torch": "2.9", "ray": "2.60"}, "cpu", "box", started=1e9, ended=1e9 + 4
        ),
        stopping_settings="asha 4" if state == "stopped" else "",
    )
    return replace(whole, **changes)


@pytest.fixture(scope="session")
def make_record() -> MakeRecord:
    return record
