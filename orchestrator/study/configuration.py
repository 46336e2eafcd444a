"""A configuration: one immutable point of a study, identified by its fingerprint.

All defaults are filled in before a configuration is made, so that two ways to write one experiment have the
same fingerprint. Device, lane group size and versions do not change the results; they belong to the
provenance of the record, not to the configuration.

A hyperparameter is a field that is annotated with a `Hyperparameter`. From the annotation follow --set,
--space, the help of the command line, the columns of tables and the parameters in MLflow. To add one, add its
field with a default and `omit_default`, and use it where it acts.

The learning rate schedule is here as well: linear warm-up, then a constant, linear or cosine curve.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cached_property, lru_cache
from types import UnionType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import pydantic
from pydantic import TypeAdapter, ValidationError

from orchestrator.study.option import broken_rule
from orchestrator.util.atomic_files import canonical_json
from variants.variant_settings import FILE_SUFFIX

Dtype = Literal["float32", "bfloat16", "nf4"]
LRScheduleName = Literal["constant", "linear", "cosine"]
Value = float | int | str | bool


@dataclass(frozen=True, kw_only=True)
class Field:
    """A field of a configuration or of a record as a column of tables and trackers.

    Only `column`, `omit_default` and `unit` are written in annotations. The other attributes follow from the
    field.
    """

    column: str | None = None
    """Name of the column; empty for no column. None stands for the hyperparameter's name, if it is given, or
    for what `_column_name` returns."""
    omit_default: bool = False
    """True for a field that was added after records had been written: with its default, the fingerprint is as
    without the field, so that these records are found again."""
    unit: str = ""
    """Unit of a number of a record: "s", "bytes", or "UTC" for a time in seconds since the epoch."""
    part: str = ""
    """Field of `Configuration` whose field this is; empty for a field of `Configuration` itself."""
    field: str = ""
    value_type: type[Value] = str
    """The field's type without None, str if it is a Literal. In a record, it may be a tuple or a mapping."""
    choices: tuple[str, ...] = ()
    """All valid values, if the type is a Literal."""
    default: Any = None


@dataclass(frozen=True)
class Hyperparameter(Field):
    """A field whose value a user may set and a search may vary, with the bounds of its values."""

    help: str = ""
    """One sentence for --help; empty if an option of its own sets the hyperparameter."""
    name: str = ""
    """Name in --set, --space and --factors; the field's name if empty."""
    gt: float | None = None
    ge: float | None = None
    lt: float | None = None
    le: float | None = None
    digits: int = 3
    """Significant digits of a sampled number. Reports show three digits, so they show the exact value."""
    searchable: bool = True
    """False if a search cannot vary it, because its points would not be comparable or need other data."""

    @property
    def bounds(self) -> Any:
        """The bounds as pydantic's annotation of a number."""
        return pydantic.Field(gt=self.gt, ge=self.ge, lt=self.lt, le=self.le, allow_inf_nan=False)

    def find_violation(self, value: object) -> str | None:
        """Return the rule that `value` violates, as a phrase for an error message; None if it is valid."""
        if self.choices:
            return None if value in self.choices else f"must be one of {', '.join(self.choices)}"
        if self.value_type is str:
            return None if isinstance(value, str) and value else "must be a text"
        try:
            number = self._number.validate_python(value, strict=True)
        except ValidationError as error:
            return broken_rule(error.errors()[0])
        return "must be a whole number" if self.value_type is int and not number.is_integer() else None

    @cached_property
    def _number(self) -> TypeAdapter[float]:
        return TypeAdapter(Annotated[float, self.bounds])


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
    rank: Annotated[int, Hyperparameter(ge=1, le=100_000)] = 8
    alpha: Annotated[float | None, Hyperparameter(gt=0)] = 16.0
    dropout: Annotated[float, Hyperparameter(ge=0, lt=1)] = 0.0
    targets: Annotated[str, Hyperparameter(searchable=False)] = "blocks"
    extra: Annotated[Mapping[str, Value], Field(column="")] = field(default_factory=dict)
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
    train_size: Annotated[int, Hyperparameter(ge=1, le=10_000_000, searchable=False)]
    validation_size: int
    test_size: int
    metric: Annotated[str, Field(column="")]
    floor: Annotated[float, Field(column="")]
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

    learning_rate: Annotated[float, Hyperparameter(gt=0)]
    weight_decay: Annotated[float, Hyperparameter("Weight decay of AdamW. Default: the task's.", ge=0)] = 0.0
    beta1: Annotated[float, Hyperparameter("Decay of AdamW's mean gradient.", ge=0, lt=1, digits=6)] = 0.9
    beta2: Annotated[float, Hyperparameter("Decay of AdamW's mean square.", ge=0, lt=1, digits=6)] = 0.999
    epsilon: Annotated[float, Hyperparameter("Term in the denominator of AdamW.", gt=0)] = 1e-8
    clip_norm: Annotated[float, Hyperparameter("Norm to which larger gradients are scaled down.", gt=0)] = 1.0
    head_learning_rate: Annotated[float | None, Hyperparameter(gt=0)] = None


@dataclass(frozen=True)
class LRSchedule:
    """The learning rate over `steps` optimizer steps.

    A linear warm-up from 0 takes the fraction `warmup` of the steps; the curve `name` follows. A linear or
    cosine curve ends at `final_factor` times the peak; a constant one ignores `final_factor`.
    """

    steps: Annotated[int, Hyperparameter(column="steps_horizon", ge=1, le=10_000_000, searchable=False)]
    name: Annotated[LRScheduleName, Hyperparameter(name="schedule")] = "cosine"
    warmup: Annotated[
        float, Hyperparameter("Fraction of the steps in warm-up. Default: the task's.", ge=0, le=1)
    ] = 0.05
    final_factor: Annotated[float, Hyperparameter("Last rate as a fraction of the peak.", ge=0, lt=1)] = 0.0


@dataclass(frozen=True)
class BatchConfig:
    """Batches: `accumulation` micro-batches of `batch_size` examples per optimizer step.

    Training examples of more than `max_length` tokens are truncated.
    """

    batch_size: Annotated[int, Hyperparameter(ge=1, le=1_000_000)]
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
        data = _identity(self)
        if data["optimizer"]["head_learning_rate"] is None:
            data["optimizer"]["head_learning_rate"] = data["optimizer"]["learning_rate"]
        return hashlib.sha256(canonical_json(data)).hexdigest()

    @cached_property
    def group_key(self) -> str:
        """Key of the lane group: lanes with equal keys have equal tensor shapes and may train together.

        Configurations with equal keys may differ in the optimizer's settings, alpha, the learning rate
        schedule, the divergence rule, the evaluations and the seed.
        """
        normalized = replace(
            self,
            variant=replace(self.variant, alpha=None),
            optimizer=OptimizerConfig(learning_rate=1.0),
            lr_schedule=LRSchedule(steps=1),
            divergence=DivergenceConfig(),
            evaluations=1,
            test_evaluations="last",
            seed=0,
        )
        return hashlib.sha256(canonical_json(_identity(normalized))).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        """Return the configuration as a JSON object, with the same JSON for equal values."""
        adapter = _type_adapter()
        # The validation turns 16 into 16.0 where the type is float, so that equal values have equal JSON.
        data: dict[str, Any] = adapter.dump_python(
            adapter.validate_python(adapter.dump_python(self)), mode="json"
        )
        return data

    def to_columns(self) -> dict[str, float | int | str | None]:
        """Return the fields as flat columns, name -> value, for Parquet, MLflow and the analysis.

        A variant's own settings are `variant_NAME`. A text that is empty has no column.
        """
        nested = self.to_json()
        columns: dict[str, Any] = {}
        for each in FIELDS:
            value = (nested[each.part] if each.part else nested)[each.field]
            if each.column and value != "":
                columns[each.column] = value
        return columns | {f"variant_{name}": value for name, value in nested["variant"]["extra"].items()}


def _identity(configuration: Configuration) -> dict[str, Any]:
    """Return the JSON that identifies a configuration: without names for readers and new defaults."""
    variant, task = configuration.variant, configuration.task
    data = replace(
        configuration,
        variant=replace(variant, name="") if variant.name.endswith(FILE_SUFFIX) else variant,
        task=replace(task, name="") if task.content else task,
        model=replace(configuration.model, name=""),
    ).to_json()
    for each in FIELDS:
        owner = data[each.part] if each.part else data
        if each.omit_default and owner[each.field] == each.default:
            del owner[each.field]
    return data


def read_fields(owner: type, part: str = "") -> Iterator[Field]:
    """Yield the fields of a dataclass, and those of its fields that are dataclasses and have no `Field`."""
    hints = get_type_hints(owner, include_extras=True)
    for each in fields(owner):
        hint = hints[each.name]
        if isinstance(hint, type) and is_dataclass(hint):
            yield from read_fields(hint, each.name)
            continue
        plain, *notes = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        found: Field = next((note for note in notes if isinstance(note, Field)), Field())
        facts: dict[str, Any] = {"part": part, "field": each.name, "default": each.default}
        facts["choices"] = get_args(plain) if get_origin(plain) is Literal else ()
        facts["value_type"] = str if facts["choices"] else _without_none(plain)
        if found.column is None:
            facts["column"] = getattr(found, "name", "") or _column_name(part, each.name)
        if isinstance(found, Hyperparameter):
            facts["name"] = found.name or each.name
        yield replace(found, **facts)


def _without_none(hint: Any) -> Any:
    return get_args(hint)[0] if isinstance(hint, UnionType) else hint


def _column_name(part: str, field: str) -> str:
    if not part:
        return field
    if field == "name":
        return part
    needs_part = part in ("task", "divergence") or field in ("numerics", "revision", "content")
    return f"{part}_{field}" if needs_part else field


FIELDS: tuple[Field, ...] = tuple(read_fields(Configuration))
"""All fields of a configuration, those of its parts included, in the order of their declaration."""
HYPERPARAMETERS = {each.name: each for each in FIELDS if isinstance(each, Hyperparameter)}
"""Name of a hyperparameter -> its field."""
COLUMNS = {each.column: each for each in FIELDS if each.column and each.default != ""}
"""Column -> field of the columns that every configuration has. The variants' own settings and the texts that
may be empty are left out."""


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
