"""A record: what one configuration gave. Written by the worker, read by everything else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar, Literal

from orchestrator.study.configuration import Configuration

SCHEMA_VERSION = 1

MAX_FAILURES = 3
"""A configuration that failed is tried again twice, no more."""

RecordState = Literal["finished", "diverged", "stopped", "failed"]

# A diverged lane's curve may hold NaN and infinities; JSON has none, so they are written as strings.
_WITH_NAN = {"ser_json_inf_nan": "strings"}


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step of a lane, as it was taken (losses in nats a token)."""

    __pydantic_config__: ClassVar = _WITH_NAN
    step: int
    loss: float
    learning_rate: float
    gradient_norm: float


@dataclass(frozen=True)
class Evaluation:
    """Scores on one split after `step` optimizer steps; `scores` holds "loss" and the task's metric."""

    __pydantic_config__: ClassVar = _WITH_NAN
    step: int
    split: Literal["validation", "test"]
    scores: Mapping[str, float]


@dataclass(frozen=True)
class ItemResults:
    """Per-item outcomes at the end of training, in the split's order. `answers` may be empty."""

    __pydantic_config__: ClassVar = _WITH_NAN
    correct: tuple[float, ...] = ()
    loss: tuple[float, ...] = ()
    answers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cost:
    """Seconds of the pack are shared equally among the lanes it held at the time."""

    train_seconds: float = 0.0
    evaluate_seconds: float = 0.0
    tokens: int = 0
    trainable_parameters: int = 0


@dataclass(frozen=True)
class Provenance:
    """What may differ between two runs of one configuration without changing its identity."""

    commit: str = "unknown"
    versions: Mapping[str, str] = field(default_factory=dict)
    device: str = "cpu"
    host: str = ""
    pack_lanes: int = 1
    workers: int = 1
    attempt: int = 0
    resumed_from: tuple[int, ...] = ()
    """The steps from which an interrupted lane went on, one entry a time."""
    started: float = 0.0
    ended: float = 0.0
    """Seconds since the epoch."""


@dataclass(frozen=True)
class Record:
    __pydantic_config__: ClassVar = _WITH_NAN
    fingerprint: str
    configuration: Configuration
    state: RecordState
    steps: int
    """Optimizer steps taken."""
    reason: str = ""
    """Why it ended, in words, for a state other than finished."""
    traceback: str = ""
    curve: tuple[StepMetrics, ...] = ()
    evaluations: tuple[Evaluation, ...] = ()
    untrained: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """split -> scores of the base without an adapter."""
    items: Mapping[str, ItemResults] = field(default_factory=dict)
    """split -> outcomes; for a finished record both "validation" and "test"."""
    cost: Cost = Cost()
    provenance: Provenance = Provenance()
    scheduler: str = ""
    """For a stopped record: the settings of the scheduler that stopped it."""
    stopped_at: int | None = None
    """For a stopped record: the last step whose scores that scheduler had seen. A lane that went on from a
    checkpoint may have been trained further."""
    schema_version: int = SCHEMA_VERSION

    def score(self, split: Literal["validation", "test"]) -> float | None:
        """The task's metric at the end. A diverged record is worth the task's floor; a stopped or failed one
        has none (censored, missing)."""
        if self.state == "diverged":
            return self.configuration.task.floor
        if self.state != "finished":
            return None
        last = [e for e in self.evaluations if e.split == split]
        return last[-1].scores[self.configuration.task.metric] if last else None

    def to_json(self) -> dict[str, Any]:
        # By way of bytes: dump_python(mode="json") leaves NaN and infinities as floats, which JSON has not.
        return json.loads(_type_adapter().dump_json(self))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Record:
        """Raises pydantic.ValidationError on data that is not a record."""
        return _type_adapter().validate_python(data)


@lru_cache(maxsize=1)
def _type_adapter() -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(Record)
