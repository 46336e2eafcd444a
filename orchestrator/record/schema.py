"""The record: the result of one configuration, written by a worker and read by everything else.

Each field of `Record`, `Cost`, `Provenance` and `StepMetrics` without `NO_COLUMN` is a column of the Parquet
files and of the frames of `orchestrator.load`. `show` prints the columns of `Cost` and `Provenance`; those of
`Cost` and `StepMetrics` are also metrics of MLflow and the other trackers. No other module lists the fields.
"""

from __future__ import annotations

import json
import math
import platform
import re
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import TypeAdapter

from orchestrator.study.configuration import Configuration, Field, read_fields

SCHEMA_VERSION = 1
"""Version of the record's JSON, to be raised when a field changes its meaning."""

MAX_FAILURES = 3
"""A configuration that has failed this many times is not trained again."""

PACKAGES = ("torch", "transformers", "ray")
"""The packages whose versions a record has."""
_REPOSITORY = Path(__file__).resolve().parents[2]
_SOURCES = ("orchestrator", "variants", "experiments")

RecordState = Literal["finished", "diverged", "stopped", "failed"]
FINAL_STATES = ("finished", "diverged")
"""The states of a record that is reused for every later request of its configuration."""

NO_COLUMN = Field(column="")
Seconds = Annotated[float, Field(unit="s")]
Bytes = Annotated[int, Field(unit="bytes")]
"""A size; 0 if it was not measured."""
UnixTime = Annotated[float, Field(unit="UTC")]
"""Seconds since the epoch."""

COLUMN_TYPES: Mapping[Any, str] = {
    str: "string",
    int: "int64",
    float: "float64",
    tuple[int, ...]: "list<int64>",
    Mapping[str, str]: "string",
}
"""Type of a field -> Arrow type of its column, unless its unit is "UTC"."""

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
    loss: Annotated[float, Field(column="train_loss")]
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

    train_seconds: Seconds = 0.0
    """Time of optimizer steps."""
    evaluate_seconds: Seconds = 0.0
    """Time of evaluations, generated answers included."""
    tokens: int = 0
    """Target tokens of the optimizer steps, on all workers."""
    trainable_parameters: int = 0
    peak_memory: Bytes = 0
    """Peak memory while the lane was in its lane group, of all lanes of the group together: memory
    allocated on the GPU, or the resident size of the process on a CPU."""
    generate_seconds: Seconds = 0.0
    """The part of `evaluate_seconds` in which answers were generated and graded."""
    start_seconds: Seconds = 0.0
    """Time from the start of the trainer's process to its first step or evaluation: imports, the base model,
    the data, and the first adapters. 0 for lanes that were leased later."""
    other_seconds: Seconds = 0.0
    """All other time of the trainer: later adapters, checkpoints, calls of the broker, waiting."""

    @property
    def seconds(self) -> float:
        """Time of optimizer steps and evaluations."""
        return self.train_seconds + self.evaluate_seconds


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
    started: UnixTime = 0.0
    ended: UnixTime = 0.0
    kernels: str = "torch"
    """Code of the base model's norms, rotary embedding and activation: "torch", or "liger" and version."""


@dataclass(frozen=True)
class Record:
    """The result of one configuration. It is immutable; a configuration trained again makes a new record."""

    __pydantic_config__: ClassVar = _WITH_NAN
    fingerprint: str
    configuration: Annotated[Configuration, NO_COLUMN]
    state: RecordState
    steps: int
    """Optimizer steps taken."""
    reason: str = ""
    """Why the lane ended, for any state but finished."""
    traceback: Annotated[str, NO_COLUMN] = ""
    curve: Annotated[tuple[StepMetrics, ...], NO_COLUMN] = ()
    evaluations: Annotated[tuple[Evaluation, ...], NO_COLUMN] = ()
    baseline_scores: Annotated[Mapping[str, Mapping[str, float]], NO_COLUMN] = field(default_factory=dict)
    """Split -> scores of the base model without an adapter."""
    items: Annotated[Mapping[str, ItemResults], NO_COLUMN] = field(default_factory=dict)
    """Split -> results per item. A finished record has "validation" and "test"."""
    cost: Annotated[Cost, NO_COLUMN] = Cost()
    provenance: Annotated[Provenance, NO_COLUMN] = Provenance()
    stopping_settings: Annotated[str, Field(column="scheduler")] = ""
    """For a stopped record: the settings of the early stopping that stopped it."""
    stopped_at: int | None = None
    """For a stopped record: the last step whose scores early stopping had seen. A lane that continued from a
    checkpoint may have been trained further."""
    schema_version: Annotated[int, NO_COLUMN] = SCHEMA_VERSION

    def score(self, split: Literal["validation", "test"]) -> float | None:
        """Return the task's metric at the end of training.

        Returns:
            The score; the task's floor for a diverged record; None for a stopped or failed one.
        """
        if self.state == "diverged":
            return self.configuration.task.floor
        if self.state != "finished":
            return None
        return self._last(split, self.configuration.task.metric)

    def quality(self, split: Literal["validation", "test"], by: Literal["score", "loss"]) -> float | None:
        """Return `score`, or by "loss" the inverse perplexity exp(-loss) at the end of training.

        A higher value is better. The inverse perplexity of a diverged record is 0, its limit.
        """
        if by == "score" or self.state not in FINAL_STATES:
            return self.score(split)
        loss = self._last(split, "loss") if self.state == "finished" else math.inf
        return None if loss is None else math.exp(-loss)

    def _last(self, split: str, name: str) -> float | None:
        last = [e for e in self.evaluations if e.split == split]
        return last[-1].scores[name] if last else None

    def results(self) -> dict[str, float | None]:
        """Return `RESULTS` by name.

        They are the task's metric at the end of training and without an adapter, and `Cost.seconds`.
        """
        metric, before = self.configuration.task.metric, self.baseline_scores
        values = self.score("validation"), self.score("test")
        untrained = (before.get(split, {}).get(metric) for split in ("validation", "test"))
        return dict(zip(RESULTS, (*values, *untrained, self.cost.seconds), strict=True))

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
    curve: tuple[StepMetrics, ...] = ()
    """A selection of the steps since the last evaluation, this one included, see
    `run_values.select_live_steps`."""


def _find_columns(part: type) -> dict[str, Field]:
    found = {each.column: each for each in read_fields(part) if each.column}
    for each in found.values():
        if each.value_type not in COLUMN_TYPES:
            raise TypeError(f"{part.__name__}.{each.field}: must have a type of COLUMN_TYPES, or NO_COLUMN")
    return found


COLUMNS = {part: _find_columns(part) for part in (Record, Cost, Provenance, StepMetrics)}
"""Class -> column -> field."""
RESULTS = ("validation_score", "test_score", "untrained_validation_score", "untrained_test_score", "seconds")
"""The columns of `Record.results`."""
TIME_FIELDS = tuple(name for name, each in COLUMNS[Cost].items() if each.unit == "s")
"""The fields of `Cost` in seconds."""


def column_values(part: Record | Cost | Provenance | StepMetrics) -> dict[str, Any]:
    """Return the values of the columns that the fields of an object make, by name."""
    return {name: getattr(part, each.field) for name, each in COLUMNS[type(part)].items()}


@lru_cache(maxsize=1)
def _type_adapter() -> TypeAdapter[Record]:
    return TypeAdapter(Record)


def current_provenance(device: str, **fields: Any) -> Provenance:
    """Return the provenance of a lane that this process trains.

    No library is imported for its version.

    Args:
        device: Name of the device.
        **fields: The fields of `Provenance` that describe the lane: kernels, lane_group_size, workers,
            attempt, resumed_from, started, ended.
    """
    host, versions = socket.gethostname(), package_versions()
    return Provenance(commit=current_commit(), versions=versions, device=device, host=host, **fields)


@lru_cache(maxsize=1)
def current_commit() -> str:
    """Return the commit of the running code, as `read_commit` does. It is read once per process."""
    return read_commit(_REPOSITORY)


def read_commit(repository: Path) -> str:
    """Return the commit that is checked out in `repository`.

    Returns:
        The commit, with "-dirty" if a source file differs from it or is new. "unknown" without git, outside a
        repository, or if the repository does not track the sources: an installed copy inside another project
        must not get that project's commit.
    """
    if _git(repository, "ls-files", "--error-unmatch", "orchestrator/__init__.py") is None:
        return "unknown"
    head = _git(repository, "rev-parse", "HEAD")
    if not head:
        return "unknown"
    source_folders = [name for name in _SOURCES if (repository / name).is_dir()]
    return head + ("-dirty" if _git(repository, "status", "--porcelain", "--", *source_folders) else "")


def _git(repository: Path, *arguments: str) -> str | None:
    try:
        command = ["git", "-C", str(repository), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


@lru_cache(maxsize=1)
def package_versions() -> Mapping[str, str]:
    """Return versions by name: Python, the numerical libraries, and the NVIDIA driver if there is one."""
    found = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    driver = _nvidia_driver(Path("/proc/driver/nvidia/version"))
    return found | ({"cuda_driver": driver} if driver else {})


def _nvidia_driver(file: Path) -> str:
    try:
        match = re.search(r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)?)\s", file.read_text())
    except OSError:
        return ""
    return match[1] if match else ""
