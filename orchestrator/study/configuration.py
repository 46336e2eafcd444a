"""A configuration: one immutable point of a study, identified by its fingerprint.

All defaults are filled in before a configuration is made, so that two ways to write one experiment have the
same fingerprint. Device, lane group size and versions do not change the results; they belong to the
provenance of the record, not to the configuration.

The learning rate schedule is here as well: linear warm-up, then a constant, linear or cosine curve.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, Literal

from pydantic import TypeAdapter

from orchestrator.util.atomic_files import canonical_json
from variants.variant_names import FILE_SUFFIX

Dtype = Literal["float32", "bfloat16", "nf4"]
LRScheduleName = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class VariantChoice:
    """A variant with all its hyperparameters.

    `alpha` is None for a variant without alpha, such as HiRA. `targets` is "blocks" (every linear layer in
    the model's repeated blocks), a comma-separated list of endings of layer names, or "re:" and a regular
    expression. `extra` has the settings that only this variant has: name -> value. `revision` identifies code
    from outside this project: PEFT's version, or a hash of a user's file; it is empty for other variants. A
    variant in a user's file has the file's name with `.py`, which is for readers: `revision` identifies it.
    """

    name: str
    rank: int = 8
    alpha: float | None = 16.0
    dropout: float = 0.0
    targets: str = "blocks"
    extra: Mapping[str, float | int | str | bool] = field(default_factory=dict)
    numerics: int = 1
    revision: str = ""


@dataclass(frozen=True)
class TaskChoice:
    """A task with its data.

    `revision` is a hash of the data; sizes are numbers of examples. `content` identifies the code of a task
    in a user's file, or how a data file is read, as 16 hexadecimal digits. It is empty for tasks of this
    project. A task with a content has the file's name, which is for readers.
    """

    name: str
    revision: str
    train_size: int
    validation_size: int
    test_size: int
    metric: str
    floor: float
    numerics: int = 1
    content: str = ""


@dataclass(frozen=True)
class ModelChoice:
    """A base model, identified by `content`, a SHA-256 or a hub revision; `name` is for readers."""

    name: str
    content: str
    dtype: Dtype = "float32"
    """"nf4": the linear layers of the blocks have weights of 4 bits, all other tensors are bfloat16."""

    @property
    def compute_dtype(self) -> Literal["float32", "bfloat16"]:
        """The data type of the model's activations, and of its weights before any quantization."""
        return "bfloat16" if self.dtype == "nf4" else self.dtype


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW as in transformers' Trainer, without weight decay of biases and norms.

    `clip_norm` is the maximum of the global gradient norm of a lane. `head_learning_rate` is the learning
    rate of a task's head; None stands for `learning_rate`.
    """

    learning_rate: float
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    clip_norm: float = 1.0
    head_learning_rate: float | None = None


@dataclass(frozen=True)
class LRSchedule:
    """The learning rate over `steps` optimizer steps.

    A linear warm-up from 0 takes the fraction `warmup` of the steps; the curve `name` follows. A linear or
    cosine curve ends at `final_factor` times the peak; a constant one ignores `final_factor`.
    """

    steps: int
    name: LRScheduleName = "cosine"
    warmup: float = 0.05
    final_factor: float = 0.0


@dataclass(frozen=True)
class BatchConfig:
    """Batches: `accumulation` micro-batches of `batch_size` examples per optimizer step.

    Training examples of more than `max_length` tokens are truncated.
    """

    batch_size: int
    accumulation: int = 1
    max_length: int = 512


@dataclass(frozen=True)
class DivergenceConfig:
    """The rule that decides whether a lane has diverged.

    A lane diverges when, after warm-up, its smoothed training loss stays above `loss_ratio` times the
    untrained base's loss for the fraction `share` of all steps, or when a loss or gradient is not finite.
    `smoothing` is the weight of the past in the exponential moving average.
    """

    loss_ratio: float = 1.5
    share: float = 0.1
    smoothing: float = 0.8


@dataclass(frozen=True)
class Configuration:
    """One point of a study: everything that determines the numbers of a fine-tune."""

    variant: VariantChoice
    task: TaskChoice
    model: ModelChoice
    optimizer: OptimizerConfig
    lr_schedule: LRSchedule
    batches: BatchConfig
    base_dropout: Literal["on", "off"] = "off"
    """Dropout of the base model itself in training, with the rates in its config.json."""
    divergence: DivergenceConfig = DivergenceConfig()
    evaluations: int = 4
    """Number of evenly spaced evaluations on the validation split; the last one is at the end."""
    test_evaluations: Literal["last", "every"] = "last"
    """Evaluations at which the test split is scored as well."""
    seed: int = 0
    loop_numerics: int = 1
    """Version of the loop's numerics, raised by hand when a change alters results."""

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the canonical JSON.

        The names of the base model and of a user's files are not part of it, only their contents. A head
        learning rate that is not set counts as the learning rate that it stands for.
        """
        data = _drop_names(self).to_json()
        if data["optimizer"]["head_learning_rate"] is None:
            data["optimizer"]["head_learning_rate"] = data["optimizer"]["learning_rate"]
        return hashlib.sha256(canonical_json(data)).hexdigest()

    @cached_property
    def group_key(self) -> str:
        """Key of the lane group: lanes with equal keys have equal tensor shapes and may train together.

        Configurations with equal keys may differ in the optimizer's settings, alpha, the learning rate
        schedule, the divergence rule, the evaluations and the seed.
        """
        nameless = _drop_names(self)
        normalized = replace(
            nameless,
            variant=replace(nameless.variant, alpha=None),
            optimizer=OptimizerConfig(learning_rate=1.0),
            lr_schedule=LRSchedule(steps=1),
            divergence=DivergenceConfig(),
            evaluations=1,
            test_evaluations="last",
            seed=0,
        )
        return hashlib.sha256(canonical_json(normalized.to_json())).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        """Return the configuration as a JSON object, with the same JSON for equal values."""
        adapter = _type_adapter()
        # The validation turns 16 into 16.0 where the type is float, so that equal values have equal JSON.
        data: dict[str, Any] = adapter.dump_python(
            adapter.validate_python(adapter.dump_python(self)), mode="json"
        )
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Configuration:
        """Return the configuration in a JSON object.

        Raises:
            pydantic.ValidationError: The object is not a configuration.
        """
        return _type_adapter().validate_python(data)

    def to_columns(self) -> dict[str, float | int | str | None]:
        """Return all fields as flat columns, name -> value, for Parquet, MLflow and the analysis."""
        nested = self.to_json()
        columns: dict[str, Any] = {"variant": self.variant.name, "task": self.task.name}
        columns |= {"model": self.model.name, "model_content": self.model.content, "dtype": self.model.dtype}
        columns |= {
            k: v for k, v in nested["variant"].items() if k not in ("name", "extra", "numerics", "revision")
        }
        columns |= {f"variant_{k}": v for k, v in nested["variant"]["extra"].items()}
        columns |= nested["optimizer"]
        schedule = self.lr_schedule
        columns |= {"schedule": schedule.name, "warmup": schedule.warmup, "steps_horizon": schedule.steps}
        columns |= {"final_factor": schedule.final_factor}
        columns |= nested["batches"]
        columns |= {
            f"task_{k}": v
            for k, v in nested["task"].items()
            if k not in ("name", "metric", "floor", "content")
        }
        columns |= {f"divergence_{k}": v for k, v in nested["divergence"].items()}
        columns |= {"evaluations": self.evaluations, "seed": self.seed, "base_dropout": self.base_dropout}
        columns |= {"test_evaluations": self.test_evaluations}
        columns |= {"variant_numerics": self.variant.numerics, "loop_numerics": self.loop_numerics}
        if self.task.content:
            columns["task_content"] = self.task.content
        if self.variant.revision:
            columns["variant_revision"] = self.variant.revision
        return columns


def _drop_names(configuration: Configuration) -> Configuration:
    """Return the configuration with empty names in place of those that are for readers only."""
    variant, task = configuration.variant, configuration.task
    return replace(
        configuration,
        variant=replace(variant, name="") if variant.name.endswith(FILE_SUFFIX) else variant,
        task=replace(task, name="") if task.content else task,
        model=replace(configuration.model, name=""),
    )


@lru_cache(maxsize=1)
def _type_adapter() -> TypeAdapter[Configuration]:
    return TypeAdapter(Configuration)


def warmup_steps(schedule: LRSchedule) -> int:
    """Return the number of warm-up steps: `warmup * steps`, rounded up.

    The product is first rounded to 9 decimals, so that 0.07 * 100 = 7.000000000000001 gives 7 steps. Without
    this rounding, transformers' Trainer has 8; otherwise both agree.
    """
    return min(schedule.steps, math.ceil(round(schedule.warmup * schedule.steps, 9)))


def lr_factor(schedule: LRSchedule, step: int) -> float:
    """Return the learning rate in a step as a fraction of the peak, as in transformers' schedules.

    Let w be the number of warm-up steps. While step < w the fraction is step / w; the first step has rate 0.
    Afterwards it is 1 (constant) or f + (1 - f) g, where f is `final_factor`, p = (step - w) / (steps - w) is
    in [0, 1), and g is 1 - p (linear) or (1 + cos(pi p)) / 2 (cosine).

    Args:
        schedule: Steps, warm-up and curve.
        step: Number of optimizer steps taken so far, from 0 to steps - 1.

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: `step` is outside the schedule.
    """
    if not 0 <= step < schedule.steps:
        raise ValueError(f"step {step} is outside a schedule of {schedule.steps} steps")
    warm = warmup_steps(schedule)
    if step < warm:
        return step / warm
    progress = (step - warm) / (schedule.steps - warm)
    if schedule.name == "constant":
        return 1.0
    decay = 1.0 - progress if schedule.name == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return schedule.final_factor + (1.0 - schedule.final_factor) * decay
