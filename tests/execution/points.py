"""Configurations and records for the tests of the broker."""

from __future__ import annotations

from orchestrator.record.schema import Evaluation, Record
from orchestrator.study.configuration import (
    BatchConfig,
    Configuration,
    LRSchedule,
    ModelChoice,
    OptimizerConfig,
    TaskChoice,
    VariantChoice,
)

STEPS = 4  # a lane reports after each of its steps


def configuration(variant: str = "lora", rate: float = 1e-3, seed: int = 0) -> Configuration:
    return Configuration(
        VariantChoice(variant),
        TaskChoice("letters", "r0", 8, 8, 8, "exact_match", 0.0),
        ModelChoice("base", "c0"),
        OptimizerConfig(rate),
        LRSchedule(STEPS),
        BatchConfig(8),
        evaluations=STEPS,
        seed=seed,
    )


POINTS = [configuration(v, rate) for v in ("lora", "hira") for rate in (1e-4, 1e-3, 1e-2)]


def record(point: Configuration, state: str, steps: int = STEPS) -> Record:
    evaluations = tuple(Evaluation(step, "validation", {"loss": 1.0}) for step in range(1, steps + 1))
    stopped_at = steps if state == "stopped" else None
    return Record(point.fingerprint, point, state, steps, evaluations=evaluations, stopped_at=stopped_at)
