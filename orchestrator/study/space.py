"""What a search varies: hyperparameters by name, their ranges as typed, and how values enter a configuration.

A name is one of `HYPERPARAMETERS`, for all variants that have it, or VARIANT.NAME for one variant alone; then
it may also be one of that variant's own settings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from orchestrator.study import bounds
from orchestrator.study.configuration import Configuration
from orchestrator.util.errors import UsageError, suggest_nearest

Value = float | int | str | bool
VariantDefaults = Callable[[str], Mapping[str, Value]]
"""A variant's own settings with their defaults; rank, alpha and dropout among them if it has them."""

EXAMPLE = "For example: learning_rate=log:1e-4:1e-2 rank=4,8,16 lora_plus.ratio=logint:1:64."
SIGNIFICANT_DIGITS = 3  # significant ones of a drawn number: its spelling in reports is its value


@dataclass(frozen=True)
class Hyperparameter:
    """Where it stands in a configuration, and what it may be. `words`: it is one of these. Numbers lie from
    `least` (`open_below`: above it) to `most` (`open_above`: below it)."""

    part: Literal["variant", "optimizer", "schedule", "batches"]
    field: str
    is_int: bool = False
    low: float = 0.0
    high: float = math.inf
    low_exclusive: bool = True
    high_exclusive: bool = True
    significant_digits: int = SIGNIFICANT_DIGITS
    choices: tuple[str, ...] = ()

    def find_violation(self, value: Value) -> str | None:
        """What `value` breaks, in words; None when it may be."""
        if self.choices:
            return None if value in self.choices else f"must be one of {', '.join(self.choices)}"
        if isinstance(value, (str, bool)):
            return "must be a number"
        if self.is_int and value != int(value):
            return "must be a whole number"
        is_above_low = value > self.low if self.low_exclusive else value >= self.low
        is_below_high = value < self.high if self.high_exclusive else value <= self.high
        if is_above_low and is_below_high:
            return None
        bounds = f"{'above' if self.low_exclusive else 'at least'} {self.low:g}"
        if self.high < math.inf:
            bounds += f" and {'below' if self.high_exclusive else 'at most'} {self.high:g}"
        return f"must be {bounds}"


def int_hyperparameter(part: Literal["variant", "batches"], field: str, high: int) -> Hyperparameter:
    """Return the rule for a whole number.

    Args:
        part: The part of a configuration that has the number.
        field: Its name there.
        most: The largest value that is allowed; the smallest is 1.
    """
    return Hyperparameter(part, field, True, low=1, high=high, low_exclusive=False, high_exclusive=False)


HYPERPARAMETERS: dict[str, Hyperparameter] = {
    "learning_rate": Hyperparameter("optimizer", "learning_rate"),
    "head_learning_rate": Hyperparameter("optimizer", "head_learning_rate"),
    "rank": int_hyperparameter("variant", "rank", bounds.MAX_RANK),
    "alpha": Hyperparameter("variant", "alpha"),
    "dropout": Hyperparameter("variant", "dropout", high=1, low_exclusive=False),
    "weight_decay": Hyperparameter("optimizer", "weight_decay", low_exclusive=False),
    "beta1": Hyperparameter("optimizer", "beta1", high=1, low_exclusive=False, significant_digits=6),
    "beta2": Hyperparameter("optimizer", "beta2", high=1, low_exclusive=False, significant_digits=6),
    "epsilon": Hyperparameter("optimizer", "epsilon"),
    "clip_norm": Hyperparameter("optimizer", "clip_norm"),
    "warmup": Hyperparameter("schedule", "warmup", high=1, low_exclusive=False, high_exclusive=False),
    "schedule": Hyperparameter("schedule", "name", choices=("constant", "linear", "cosine")),
    "batch_size": int_hyperparameter("batches", "batch_size", bounds.MAX_BATCH_SIZE),
}
INT_SETTING_RULE = replace(int_hyperparameter("variant", "extra", bounds.MAX_RANK), low=0)
"""The rule for whole numbers among a variant's own settings. The variant itself may allow fewer."""
VARIANT_HYPERPARAMETERS = frozenset(name for name, each in HYPERPARAMETERS.items() if each.part == "variant")


@dataclass(frozen=True)
class Dimension:
    """One hyperparameter of a space: from `low` to `high` (both can be drawn), or one of `choices`.
    `variant` is empty when it holds for all. `integer`: whole numbers; `whole`: the value's type is int."""

    name: str
    variant: str = ""
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    has_integer_steps: bool = False
    is_int: bool = False
    significant_digits: int = SIGNIFICANT_DIGITS
    choices: tuple[Value, ...] = ()

    @property
    def key(self) -> str:
        return f"{self.variant}.{self.name}" if self.variant else self.name

    @property
    def is_numeric(self) -> bool:
        """Whether its values have an order; choices of numbers are in ascending order."""
        return not any(isinstance(each, (str, bool)) for each in self.choices)

    @property
    def size(self) -> int | None:
        """How many values; None for a real interval."""
        if self.choices:
            return len(self.choices)
        return int(self.high) - int(self.low) + 1 if self.has_integer_steps else None

    @property
    def choices_or_ends(self) -> tuple[Value, ...]:
        """All choices, or both ends."""
        return self.choices or (self.to_value(self.low), self.to_value(self.high))

    def to_value(self, drawn: float) -> Value:
        """A number drawn from the interval as the configuration gets it."""
        if self.has_integer_steps:
            return int(drawn) if self.is_int else float(drawn)
        return min(self.high, max(self.low, float(f"{drawn:.{self.significant_digits}g}")))

    @property
    def spec_text(self) -> str:
        """The SPEC that says this, in one spelling."""
        if self.choices:
            return ",".join(format_value(each) for each in self.choices)
        kind = {(False, False): "", (True, False): "log:", (False, True): "int:", (True, True): "logint:"}
        return f"{kind[self.log, self.has_integer_steps]}{self.low:.10g}:{self.high:.10g}"


@dataclass(frozen=True)
class Space:
    """What is varied of each variant, the shared dimensions first: what all have, all have in one order."""

    variants: Mapping[str, tuple[Dimension, ...]]

    @property
    def dimensions(self) -> tuple[Dimension, ...]:
        """Of all variants together, each once."""
        found = {d.key: d for dimensions in self.variants.values() for d in dimensions}
        return tuple(sorted(found.values(), key=lambda d: d.variant != ""))

    def size(self, variant: str) -> float:
        """How many points there are at most; infinite with a real interval."""
        return math.prod(d.size or math.inf for d in self.variants[variant])


def parse_space(
    words: Sequence[str],
    variants: Sequence[str],
    variant_defaults: VariantDefaults,
    learning_rates: Sequence[float],
    fixed_names: Sequence[str] = (),
) -> Space:
    """The space of `variants` from NAME=SPEC words. What a variant does not have is left out of its space,
    unless it is named as VARIANT.NAME. The learning rate goes from the lowest to the highest of `rates`
    unless it is named, or among `fixed` (names with a value of their own). Raises BadInput."""
    shared: dict[str, Dimension] = {}
    variant_dimensions: dict[tuple[str, str], Dimension] = {}
    for word in words:
        name, spec = _split_argument("--space", word)
        variant, name = _parse_name("--space", name, variants, variant_defaults)
        dimension = _parse_dimension(word, variant, name, spec, variant_defaults)
        if dimension.key in {d.key for d in (*shared.values(), *variant_dimensions.values())}:
            raise UsageError(f"--space {word!r}: {dimension.key} is there twice; name it once.")
        if dimension.key in fixed_names:
            raise UsageError(f"--space {word!r}: --set has fixed {dimension.key}; take one of the two away.")
        if variant:
            variant_dimensions[variant, name] = dimension
        else:
            shared[name] = dimension
    if "learning_rate" not in shared and "learning_rate" not in fixed_names and len(learning_rates) > 1:
        default = Dimension("learning_rate", low=min(learning_rates), high=max(learning_rates), log=True)
        shared = {"learning_rate": default, **shared}
    dimensions: dict[str, tuple[Dimension, ...]] = {}
    for variant in variants:
        own_dimensions = {name: d for (whose, name), d in variant_dimensions.items() if whose == variant}
        replaced = {name for name in own_dimensions if _find_hyperparameter(variant, name, variant_defaults)}
        dimensions[variant] = tuple(
            dimension
            for name, dimension in shared.items()
            if (name not in VARIANT_HYPERPARAMETERS or name in variant_defaults(variant))
            and name not in replaced
            and (
                f"{variant}.{name}" not in fixed_names
                or not _find_hyperparameter(variant, name, variant_defaults)
            )
        ) + tuple(own_dimensions.values())
    return Space(dimensions)


def parse_fixed_values(
    words: Sequence[str], variants: Sequence[str], variant_defaults: VariantDefaults
) -> dict[str, Value]:
    """Fixed values from NAME=VALUE words, by NAME or VARIANT.NAME. Raises BadInput."""
    fixed_values: dict[str, Value] = {}
    for word in words:
        name, text = _split_argument("--set", word)
        variant, name = _parse_name("--set", name, variants, variant_defaults)
        key = f"{variant}.{name}" if variant else name
        if key in fixed_values:
            raise UsageError(f"--set {word!r}: {key} is there twice; name it once.")
        fixed_values[key] = _parse_value("--set", word, variant, name, text, variant_defaults)
    return fixed_values


def apply_values(configuration: Configuration, values: Mapping[str, Value]) -> Configuration:
    """`configuration` with these values (by NAME or VARIANT.NAME; those of other variants are passed over).
    A batch is split into as many parts as before."""
    for key, value in sorted(values.items(), key=lambda item: "." in item[0]):
        variant, _, name = key.rpartition(".")
        if variant not in ("", configuration.variant.name):
            continue
        hyperparameter = HYPERPARAMETERS.get(name)
        if hyperparameter is None or (variant and name in configuration.variant.extra):
            extra = {**configuration.variant.extra, name: value}
            configuration = replace(configuration, variant=replace(configuration.variant, extra=extra))
        elif hyperparameter.part == "batches":
            size = int(value) // configuration.batches.accumulation
            configuration = replace(configuration, batches=replace(configuration.batches, batch_size=size))
        else:
            part = replace(getattr(configuration, hyperparameter.part), **{hyperparameter.field: value})
            configuration = replace(configuration, **{hyperparameter.part: part})
    return configuration


def get_value(configuration: Configuration, key: str) -> Value | None:
    """The value that `configuration` has for NAME or VARIANT.NAME: `applied` the other way. None where it has
    none (it is another variant's)."""
    variant, _, name = key.rpartition(".")
    if variant not in ("", configuration.variant.name):
        return None
    if variant and name in configuration.variant.extra:
        return configuration.variant.extra[name]
    hyperparameter = HYPERPARAMETERS[name]
    if hyperparameter.part == "batches":
        return configuration.batches.batch_size * configuration.batches.accumulation
    value = getattr(getattr(configuration, hyperparameter.part), hyperparameter.field)
    return None if (name, value) == ("rank", 0) else value  # a variant without ranks


def format_value(value: Value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def _split_argument(option: str, word: str) -> tuple[str, str]:
    name, found, text = word.partition("=")
    if not found or not name or not text:
        form = "NAME=SPEC" if option == "--space" else "NAME=VALUE"
        example = EXAMPLE if option == "--space" else "For example: weight_decay=0.01 lora_plus.ratio=4."
        raise UsageError(f"{option} {word!r}: must be {form}. {example}")
    return name.replace("-", "_"), text


def _parse_name(
    option: str, key: str, variants: Sequence[str], variant_defaults: VariantDefaults
) -> tuple[str, str]:
    """(variant or "", name)."""
    variant, dot, name = key.rpartition(".")
    if not dot:
        if key not in HYPERPARAMETERS:
            known = [
                *HYPERPARAMETERS,
                *(f"{each}.{name}" for each in variants for name in variant_defaults(each)),
            ]
            raise UsageError(f"{option}: no hyperparameter {key!r}. {suggest_nearest(key, known)}")
        return "", key
    if variant not in variants:
        raise UsageError(
            f"{option} {key}: {variant!r} is not in this study. {suggest_nearest(variant, variants)}"
        )
    known = [
        *variant_defaults(variant),
        *(name for name in HYPERPARAMETERS if name not in VARIANT_HYPERPARAMETERS),
    ]
    if name not in known:
        raise UsageError(f"{option} {key}: {variant} has no {name!r}. {suggest_nearest(name, known)}")
    return variant, name


def _find_hyperparameter(variant: str, name: str, variant_defaults: VariantDefaults) -> Hyperparameter | None:
    """None for one of the variant's own settings (ReLoRA has a `warmup` of its own)."""
    is_variant_setting = variant and name in variant_defaults(variant) and name not in VARIANT_HYPERPARAMETERS
    return None if is_variant_setting else HYPERPARAMETERS[name]


def _parse_value(
    option: str, word: str, variant: str, name: str, text: str, variant_defaults: VariantDefaults
) -> Value:
    """One value, of the type that the hyperparameter has."""
    hyperparameter = _find_hyperparameter(variant, name, variant_defaults)
    default = variant_defaults(variant)[name] if hyperparameter is None else None
    if isinstance(default, bool):
        if text not in ("true", "false"):
            raise UsageError(f"{option} {word!r}: {text!r} must be true or false.")
        return text == "true"
    if isinstance(default, str) or (hyperparameter and hyperparameter.choices):
        value: Value = text
    else:
        number = _parse_number(option, word, text)
        if (hyperparameter.is_int if hyperparameter else isinstance(default, int)) and number != int(number):
            near = f"; take {max(1, round(number))}"
            raise UsageError(f"{option} {word!r}: {text!r} must be a whole number{near}.")
        value = (
            int(number) if (hyperparameter.is_int if hyperparameter else isinstance(default, int)) else number
        )
    rule = hyperparameter or (INT_SETTING_RULE if isinstance(value, int) else None)
    broken = rule.find_violation(value) if rule else None
    if broken:
        hint = (
            f" {suggest_nearest(text, hyperparameter.choices)}"
            if hyperparameter and hyperparameter.choices
            else ""
        )
        raise UsageError(f"{option} {word!r}: {text!r} {broken}.{hint}")
    return value


def _parse_number(option: str, word: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise UsageError(f"{option} {word!r}: {text!r} is not a number.") from None
    if not math.isfinite(value):
        raise UsageError(f"{option} {word!r}: {text!r} must be finite.")
    return value


def _parse_dimension(
    word: str, variant: str, name: str, spec: str, variant_defaults: VariantDefaults
) -> Dimension:
    hyperparameter = _find_hyperparameter(variant, name, variant_defaults)
    if ":" not in spec:
        return _parse_choices(word, variant, name, spec, variant_defaults)
    default = None if hyperparameter else variant_defaults(variant)[name]
    if isinstance(default, (str, bool)) or (hyperparameter and hyperparameter.choices):
        few = ",".join(hyperparameter.choices[:2]) if hyperparameter else format_value(default or "")
        raise UsageError(f"--space {word!r}: {name} has no range; take a choice, for example {name}={few}.")
    *kind, low_text, high_text = spec.split(":")
    kinds = {(): (False, False), ("log",): (True, False), ("int",): (False, True), ("logint",): (True, True)}
    if tuple(kind) not in kinds:
        forms = "low:high, log:low:high, int:low:high, logint:low:high or a choice a,b,c"
        hint = f" {suggest_nearest(kind[0], ('log', 'int', 'logint'))}" if len(kind) == 1 else ""
        raise UsageError(f"--space {word!r}: {spec!r} must be {forms}.{hint}")
    log, has_integer_steps = kinds[tuple(kind)]
    is_int = hyperparameter.is_int if hyperparameter else isinstance(default, int)
    if is_int and not has_integer_steps:
        better = f"{'logint' if log else 'int'}:{low_text}:{high_text}"
        raise UsageError(f"--space {word!r}: {name} is a whole number; take {better}.")
    low, high = _parse_number("--space", word, low_text), _parse_number("--space", word, high_text)
    if has_integer_steps and (low != int(low) or high != int(high)):
        raise UsageError(f"--space {word!r}: the ends must be whole numbers.")
    if low > high:
        better = ":".join([*kind, high_text, low_text])
        raise UsageError(f"--space {word!r} is reversed; did you mean {better}?")
    if low == high:
        raise UsageError(
            f"--space {word!r} has one value only; take --set {word.partition('=')[0]}={low_text}."
        )
    if log and low <= 0:
        raise UsageError(f"--space {word!r}: {low_text!r} must be above 0 for a logarithm.")
    rule = hyperparameter or (INT_SETTING_RULE if is_int else None)
    for text, end in ((low_text, low), (high_text, high)):
        broken = rule.find_violation(end) if rule else None
        if broken:
            raise UsageError(f"--space {word!r}: {text!r} {broken}.")
    digits = hyperparameter.significant_digits if hyperparameter else SIGNIFICANT_DIGITS
    return Dimension(name, variant, low, high, log, has_integer_steps, is_int, digits)


def _parse_choices(
    word: str, variant: str, name: str, spec: str, variant_defaults: VariantDefaults
) -> Dimension:
    texts = [text for text in spec.split(",") if text]
    typed = word.partition("=")[0]
    if len(texts) <= spec.count(","):
        better = f"take {typed}={','.join(texts)}." if texts else f"name two values or more. {EXAMPLE}"
        raise UsageError(f"--space {word!r}: one of its values is empty; {better}")
    values = [_parse_value("--space", word, variant, name, text, variant_defaults) for text in texts]
    distinct = list(dict.fromkeys(values))
    if len(distinct) < 2:
        raise UsageError(f"--space {word!r} has one value only; take --set {typed}={texts[0]}.")
    dimension = Dimension(name, variant, choices=tuple(distinct))
    if dimension.is_numeric:
        dimension = replace(dimension, choices=tuple(sorted(distinct)))  # type: ignore[type-var]
    return dimension
