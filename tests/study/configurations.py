"""A configuration, and the options of the studies that come with the program, for tests to change."""

from __future__ import annotations

from typing import Any

import pydantic
from orchestrator.experiments.lr_sensitivity import CurveOptions

from orchestrator.study.config import make_options
from orchestrator.study.configuration import (
    BatchConfig,
    Configuration,
    LRSchedule,
    ModelChoice,
    OptimizerConfig,
    TaskChoice,
    Value,
    VariantChoice,
)

read_configuration = pydantic.TypeAdapter(Configuration).validate_python
"""Returns the configuration in a JSON object."""


def template(
    variant: str = "lora", task: str = "letters", rate: float = 1.0, **extra: Value
) -> Configuration:
    """Return the default configuration of a variant on a task, at a learning rate."""
    return Configuration(
        variant=VariantChoice(variant, alpha=None if variant == "hira" else 16.0, extra=extra),
        task=TaskChoice(task, "r1", 960, 200, 200, "exact_match", 0.0),
        model=ModelChoice("letters-base", "c0ffee"),
        optimizer=OptimizerConfig(rate),
        lr_schedule=LRSchedule(60),
        batches=BatchConfig(16),
    )


def shipped(name: str, **typed: Any) -> CurveOptions:
    """Return the options of a study that comes with the program, and of options typed beside its name."""
    return make_options(CurveOptions, {"config": name, **typed}, "study")[0]
