"""A configuration: one point of a study, immutable, and the fingerprint that is its identity everywhere.

Every field is *resolved*: defaults are filled in before a configuration is made, so that two spellings of
one experiment have one fingerprint. What does not change the numbers (device, pack size, versions) is not
here; it is provenance, kept in the record.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, Literal

from orchestrator.util.canonical_json import canonical_json

Dtype = Literal["float32", "bfloat16"]
LRScheduleName = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class VariantChoice:
    """A variant with all its hyperparameters.

    `alpha` is None for a variant that has none (HiRA). `targets` is "blocks" (every linear layer inside the
    model's repeated blocks), a comma-separated list of layer-name endings, or a regular expression behind
    "re:". `extra` holds what only this variant knows.
    """

    name: str
    rank: int = 8
    alpha: float | None = 16.0
    dropout: float = 0.0
    targets: str = "blocks"
    extra: Mapping[str, float | int | str | bool] = field(default_factory=dict)
    numerics: int = 1


@dataclass(frozen=True)
class TaskChoice:
    """A task with its data: `revision` names the data's content, sizes are in examples."""

    name: str
    revision: str
    train_size: int
    validation_size: int
    test_size: int
    metric: str
    floor: float
    numerics: int = 1


@dataclass(frozen=True)
class ModelChoice:
    """A base model: `name` is for people, `content` (a SHA-256 or a hub revision) is the identity."""

    name: str
    content: str
    dtype: Dtype = "float32"


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW as transformers' Trainer runs it: biases and norms do not decay. `clip_norm` bounds the global
    gradient norm of a lane. `head_learning_rate` is that of a task's head; None: the same as all."""

    learning_rate: float
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    clip_norm: float = 1.0
    head_learning_rate: float | None = None


@dataclass(frozen=True)
class LRSchedule:
    """The learning rate over `steps` optimizer steps: linear warm-up from 0 for the share `warmup`, then
    `name`."""

    steps: int
    name: LRScheduleName = "cosine"
    warmup: float = 0.05


@dataclass(frozen=True)
class BatchConfig:
    """`batch_size` examples a micro-batch, `accumulation` micro-batches an optimizer step."""

    batch_size: int
    accumulation: int = 1
    max_length: int = 512


@dataclass(frozen=True)
class DivergenceConfig:
    """A lane diverges when, after warm-up, its smoothed training loss stays above `loss_ratio` times the
    untrained base's for the fraction `share` of all steps (or when a loss or gradient is not finite).
    `smoothing` is the weight of the past in the exponential moving average."""

    loss_ratio: float = 1.5
    share: float = 0.1
    smoothing: float = 0.8


@dataclass(frozen=True)
class Configuration:
    variant: VariantChoice
    task: TaskChoice
    model: ModelChoice
    optimizer: OptimizerConfig
    schedule: LRSchedule
    batches: BatchConfig
    base_dropout: Literal["on", "off"] = "off"
    """Whether the base model's own dropout is on in training, with the rates in its config.json."""
    divergence: DivergenceConfig = DivergenceConfig()
    evaluations: int = 4
    """How many times a lane is evaluated on the validation split, evenly spaced, the last at the end."""
    seed: int = 0
    loop_numerics: int = 2
    """Raised by hand when a change of the loop alters results. With 1, warm-up began at (step + 1) / w,
    weight decay reached biases and norms, tensors had no fixed order, prompts began without BOS, dropout
    reached what PiSSA and ReLoRA freeze, and clipping divided by the norm without 1e-6."""

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the canonical JSON, the base by content alone: its name is for people. A head that
        learns at the rate of all the rest is left out, however that was said, and so is dropout of the base
        that is off: earlier versions had no such field."""
        data = replace(self, model=replace(self.model, name="")).to_json()
        if data["optimizer"]["head_learning_rate"] in (None, data["optimizer"]["learning_rate"]):
            del data["optimizer"]["head_learning_rate"]
        if data["base_dropout"] == "off":
            del data["base_dropout"]
        return hashlib.sha256(canonical_json(data)).hexdigest()

    @cached_property
    def group_key(self) -> str:
        """Lanes of one shape train in one pack: all but learning rates, decay, alpha, schedule and seed."""
        normalized = replace(
            self,
            variant=replace(self.variant, alpha=None),
            model=replace(self.model, name=""),
            optimizer=OptimizerConfig(learning_rate=1.0),
            schedule=LRSchedule(steps=1),
            divergence=DivergenceConfig(),
            evaluations=1,
            seed=0,
        )
        return hashlib.sha256(canonical_json(normalized.to_json())).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        adapter = _type_adapter()
        # Validating first turns 16 into 16.0 where a float is meant: one value, one spelling.
        return adapter.dump_python(adapter.validate_python(adapter.dump_python(self)), mode="json")

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Configuration:
        """Raises pydantic.ValidationError on data that is not a configuration."""
        return _type_adapter().validate_python(data)

    def to_columns(self) -> dict[str, float | int | str | None]:
        """One level of named columns for Parquet, MLflow and the analysis."""
        nested = self.to_json()
        columns: dict[str, Any] = {"variant": self.variant.name, "task": self.task.name}
        columns |= {"model": self.model.name, "model_content": self.model.content, "dtype": self.model.dtype}
        columns |= {k: v for k, v in nested["variant"].items() if k not in ("name", "extra", "numerics")}
        columns |= {f"variant_{k}": v for k, v in nested["variant"]["extra"].items()}
        columns |= nested["optimizer"]
        columns |= {
            "schedule": self.schedule.name,
            "warmup": self.schedule.warmup,
            "steps_horizon": self.schedule.steps,
        }
        columns |= nested["batches"]
        columns |= {f"task_{k}": v for k, v in nested["task"].items() if k not in ("name", "metric", "floor")}
        columns |= {f"divergence_{k}": v for k, v in nested["divergence"].items()}
        columns |= {"evaluations": self.evaluations, "seed": self.seed, "base_dropout": self.base_dropout}
        columns |= {"variant_numerics": self.variant.numerics, "loop_numerics": self.loop_numerics}
        return columns


@lru_cache(maxsize=1)
def _type_adapter() -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(Configuration)
