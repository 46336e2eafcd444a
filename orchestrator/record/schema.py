"""The record: the result of one configuration, written by a worker and read by everything else."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar, Literal

from pydantic import TypeAdapter

from orchestrator.study.configuration import Configuration

SCHEMA_VERSION = 1
"""Version of the record's JSON, to be raised when a field changes its meaning."""

MAX_FAILURES = 3
"""A configuration that has failed this many times is not trained again."""

RecordState = Literal["finished", "diverged", "stopped", "failed"]
FINAL_STATES = ("finished", "diverged")
"""The states of a record that is reused for every later request of its configuration."""

# JSON has no NaN and infinities, which the curve of a diverged lane may hold; they are written as strings.
_WITH_NAN = {"ser_json_inf_nan": "strings"}


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step of a lane.

    `loss` is the mean over the step's targets: of the cross-entropy in nats, or of the squared error for a
    regression task. `gradient_norm` is the L2 norm of all gradients of the lane before clipping.
    """

    __pydantic_config__: ClassVar = _WITH_NAN
    step: int
    loss: float
    learning_rate: float
    gradient_norm: float


@dataclass(frozen=True)
class Evaluation:
    """Scores on one split after `step` optimizer steps: "loss", the task's metric, and others by name."""

    __pydantic_config__: ClassVar = _WITH_NAN
    step: int
    split: Literal["validation", "test"]
    scores: Mapping[str, float]


@dataclass(frozen=True)
class ItemResults:
    """Results per item at the end of training, in the order of the split. `answers` may be empty."""

    __pydantic_config__: ClassVar = _WITH_NAN
    correct: tuple[float, ...] = ()
    loss: tuple[float, ...] = ()
    answers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cost:
    """Cost of one lane. A lane group's seconds are divided equally among the lanes in it at the time.

    `start_seconds`, `train_seconds`, `evaluate_seconds` and `other_seconds` are disjoint. Over all lanes of a
    trainer they add up to the time from the start of its process to the end of its last lane.
    """

    train_seconds: float = 0.0
    """Time of optimizer steps."""
    evaluate_seconds: float = 0.0
    """Time of evaluations, generated answers included."""
    tokens: int = 0
    """Target tokens of the optimizer steps, on all workers."""
    trainable_parameters: int = 0
    peak_memory: int = 0
    """Peak memory in bytes while the lane was in its lane group, of all lanes of the group together: memory
    allocated on the GPU, or the resident size of the process on a CPU."""
    generate_seconds: float = 0.0
    """The part of `evaluate_seconds` in which answers were generated and graded."""
    start_seconds: float = 0.0
    """Time from the start of the trainer's process to its first step or evaluation: imports, the base model,
    the data, and the first adapters. 0 for lanes that were leased later."""
    other_seconds: float = 0.0
    """All other time of the trainer: later adapters, checkpoints, calls of the broker, waiting."""


TIME_FIELDS = ("train_seconds", "evaluate_seconds", "generate_seconds", "start_seconds", "other_seconds")
"""The fields of `Cost` in seconds, in the order in which a checkpoint stores them."""


@dataclass(frozen=True)
class Provenance:
    """Properties of a run that are not part of its configuration: code, machine, attempt and times."""

    commit: str = "unknown"
    versions: Mapping[str, str] = field(default_factory=dict)
    device: str = "cpu"
    host: str = ""
    lane_group_size: int = 1
    """The largest number of lanes in the lane group."""
    workers: int = 1
    attempt: int = 0
    resumed_from: tuple[int, ...] = ()
    """Steps at which an interrupted lane continued, one entry for each interruption."""
    started: float = 0.0
    ended: float = 0.0
    """Seconds since the epoch."""
    kernels: str = "torch"
    """Code of the base model's norms, rotary embedding and activation: "torch", or "liger" and version."""


@dataclass(frozen=True)
class Record:
    """The result of one configuration. It is immutable; a configuration trained again makes a new record."""

    __pydantic_config__: ClassVar = _WITH_NAN
    fingerprint: str
    configuration: Configuration
    state: RecordState
    steps: int
    """Optimizer steps taken."""
    reason: str = ""
    """Why the lane ended, for any state but finished."""
    traceback: str = ""
    curve: tuple[StepMetrics, ...] = ()
    evaluations: tuple[Evaluation, ...] = ()
    baseline_scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Split -> scores of the base model without an adapter."""
    items: Mapping[str, ItemResults] = field(default_factory=dict)
    """Split -> results per item. A finished record has "validation" and "test"."""
    cost: Cost = Cost()
    provenance: Provenance = Provenance()
    stopping_settings: str = ""
    """For a stopped record: the settings of the early stopping that stopped it."""
    stopped_at: int | None = None
    """For a stopped record: the last step whose scores early stopping had seen. A lane that continued from a
    checkpoint may have been trained further."""
    schema_version: int = SCHEMA_VERSION

    def score(self, split: Literal["validation", "test"]) -> float | None:
        """Return the task's metric at the end of training.

        Returns:
            The score; the task's floor for a diverged record; None for a stopped or failed one.
        """
        if self.state == "diverged":
            return self.configuration.task.floor
        if self.state != "finished":
            return None
        last = [e for e in self.evaluations if e.split == split]
        return last[-1].scores[self.configuration.task.metric] if last else None

    def to_json(self) -> dict[str, Any]:
        """Return the record as a JSON object, with NaN and infinities as strings."""
        # Through bytes, because dump_python(mode="json") leaves NaN and infinities as floats.
        data: dict[str, Any] = json.loads(_type_adapter().dump_json(self))
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Record:
        """Return the record in a JSON object.

        Raises:
            pydantic.ValidationError: The object is no record.
        """
        return _type_adapter().validate_python(data)


@dataclass(frozen=True)
class LaneProgress:
    """Progress of a lane in training, as the driver receives it: the start, or one evaluation."""

    configuration: Configuration
    step: int = 0
    """Optimizer steps taken; 0 at the start."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """Score name -> value on the validation split; empty at the start."""
    train_loss: float = math.nan
    """Training loss of this step, as in `StepMetrics`; NaN at the start."""
    curve: tuple[StepMetrics, ...] = ()
    """A selection of the steps since the last evaluation, see `run_values.select_live_steps`."""


@lru_cache(maxsize=1)
def _type_adapter() -> TypeAdapter[Record]:
    return TypeAdapter(Record)
