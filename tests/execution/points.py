"""Configurations and records for the tests of the broker, and a study of such configurations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from io import StringIO
from typing import TYPE_CHECKING, Any

from configurations import template
from rich.console import Console

from orchestrator.record.schema import Evaluation, Record
from orchestrator.record.store import Store
from orchestrator.record.study_file import StudyFile
from orchestrator.study.configuration import BatchConfig, Configuration, LRSchedule
from orchestrator.study.options import StudyOptions

if TYPE_CHECKING:
    from orchestrator.launch.study import Study

STEPS = 4  # a lane reports after each of its steps


def configuration(variant: str = "lora", rate: float = 1e-3, seed: int = 0) -> Configuration:
    return replace(
        template(variant, rate=rate),
        lr_schedule=LRSchedule(STEPS),
        batches=BatchConfig(8),
        evaluations=STEPS,
        seed=seed,
    )


POINTS = [configuration(v, rate) for v in ("lora", "hira") for rate in (1e-4, 1e-3, 1e-2)]


def record(point: Configuration, state: str, steps: int = STEPS) -> Record:
    evaluations = tuple(Evaluation(step, "validation", {"loss": 1.0}) for step in range(1, steps + 1))
    stopped_at = steps if state == "stopped" else None
    return Record(point.fingerprint, point, state, steps, evaluations=evaluations, stopped_at=stopped_at)


def study_of(
    points: Sequence[Configuration],
    store: Store,
    options: StudyOptions | None = None,
    **more: Any,
) -> Study:
    """Return a study that trains these points and prints into a text. Every point counts as a template."""
    from orchestrator.experiments import load
    from orchestrator.launch.study import Study

    return Study(
        experiment=load("study"),
        options=options or StudyOptions(),
        store=store,
        file=StudyFile("s", "?", "x", folder=store.root),
        console=Console(record=True, file=StringIO(), width=300),
        requested=list(points),
        pending=list(points),
        **{"templates": tuple(points), **more},
    )
