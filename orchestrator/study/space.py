"""Hyperparameters by name: their values in a configuration, --set, and the space of a search.

The key of a hyperparameter is NAME, for all variants that have it, or VARIANT.NAME for one variant. NAME is
one of `HYPERPARAMETERS` or, after a variant, one of this variant's own settings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from orchestrator.study.configuration import HYPERPARAMETERS, Configuration, Hyperparameter, Value
from orchestrator.util.errors import UsageError, suggest_nearest
from variants.variant_names import canonical_key

VARIANT_HYPERPARAMETERS = frozenset(name for name, each in HYPERPARAMETERS.items() if each.part == "variant")
VariantDefaults = Callable[[str], Mapping[str, Value]]
"""Function from a variant to its settings with their defaults, including rank, alpha and dropout."""
EXAMPLE = "For example: learning_rate=log:1e-4:1e-2 rank=4,8,16 lora_plus.ratio=logint:1:64."
SET_EXAMPLE = "For example: weight_decay=0.01 lora_plus.ratio=4."
_KINDS = ("log", "int", "logint")
_Parsed = TypeVar("_Parsed")


@dataclass(frozen=True)
class Dimension:
    """One hyperparameter of a space: the closed interval from `low` to `high`, or `choices`.

    `variant` is empty for a dimension of all variants. With `has_integer_steps` the interval has integers
    only, of the hyperparameter's type.
    """

    hyperparameter: Hyperparameter
    variant: str = ""
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    has_integer_steps: bool = False
    choices: tuple[Value, ...] = ()

    @property
    def name(self) -> str:
        """Name of the hyperparameter."""
        return self.hyperparameter.name

    @property
    def key(self) -> str:
        """NAME, or VARIANT.NAME for a dimension of one variant."""
        return f"{self.variant}.{self.name}" if self.variant else self.name

    @property
    def is_numeric(self) -> bool:
        """True if all values are numbers; choices are then in ascending order."""
        return self.hyperparameter.value_type in (int, float)

    @property
    def size(self) -> int | None:
        """Number of values; None for an interval of real numbers."""
        if self.choices:
            return len(self.choices)
        return int(self.high) - int(self.low) + 1 if self.has_integer_steps else None

    @property
    def choices_or_ends(self) -> tuple[Value, ...]:
        """All choices, or both ends of the interval."""
        return self.choices or (self.to_value(self.low), self.to_value(self.high))

    def to_value(self, drawn: float) -> Value:
        """Convert a number sampled from the interval to a value of the hyperparameter."""
        if self.has_integer_steps:
            return self.hyperparameter.value_type(drawn)
        return min(self.high, max(self.low, float(f"{drawn:.{self.hyperparameter.significant_digits}g}")))

    @property
    def spec_text(self) -> str:
        """The SPEC of this dimension as in --space, in canonical form."""
        if self.choices:
            return ",".join(format_value(each) for each in self.choices)
        kind = "log" * self.log + "int" * self.has_integer_steps
        return f"{kind}{':' * bool(kind)}{self.low:.10g}:{self.high:.10g}"


Space = Mapping[str, tuple[Dimension, ...]]
"""Variant -> its dimensions: first those of all variants, in the same order, then the variant's own."""


def apply_values(configuration: Configuration, values: Mapping[str, Value]) -> Configuration:
    """Return a configuration with the given values.

    The accumulation steps stay the same; a batch size is divided by them. A number of steps lowers the number
    of evaluations to at most this number.

    Args:
        configuration: The configuration to change.
        values: NAME or VARIANT.NAME -> value. Keys of other variants are ignored, and VARIANT.NAME has
            precedence over NAME.
    """
    for key, value in sorted(values.items(), key=lambda item: "." in item[0]):
        variant, _, name = key.rpartition(".")
        if variant not in ("", configuration.variant.name):
            continue
        hyperparameter = HYPERPARAMETERS.get(name)
        if hyperparameter is None or (variant and name in configuration.variant.extra):
            extra = {**configuration.variant.extra, name: value}
            configuration = replace(configuration, variant=replace(configuration.variant, extra=extra))
            continue
        if name == "batch_size":
            value = int(value) // configuration.batches.accumulation
        if name == "steps":
            evaluations = min(configuration.evaluations, int(value))
            configuration = replace(configuration, evaluations=evaluations)
        part = replace(getattr(configuration, hyperparameter.part), **{hyperparameter.field: value})
        configuration = replace(configuration, **{hyperparameter.part: part})
    return configuration


def get_value(configuration: Configuration, key: str) -> Value | None:
    """Return the value of a hyperparameter in a configuration, as `apply_values` takes it.

    Args:
        configuration: The configuration.
        key: NAME, or VARIANT.NAME.

    Returns:
        The value; None if the configuration has none, for example if VARIANT is another variant.
    """
    variant, _, name = key.rpartition(".")
    if variant not in ("", configuration.variant.name):
        return None
    hyperparameter = HYPERPARAMETERS.get(name)
    if hyperparameter is None or (variant and name in configuration.variant.extra):
        return configuration.variant.extra.get(name)
    if name == "batch_size":
        return configuration.batches.batch_size * configuration.batches.accumulation
    value: Value | None = getattr(getattr(configuration, hyperparameter.part), hyperparameter.field)
    return None if (name, value) == ("rank", 0) else value  # Rank 0 stands for no rank.


def format_value(value: Value) -> str:
    """Format a value as on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def parse_fixed_values(
    words: Sequence[str], variants: Sequence[str], defaults: VariantDefaults
) -> dict[str, Value]:
    """Return the values that --set fixes, by NAME or VARIANT.NAME.

    Args:
        words: The NAME=VALUE words.
        variants: Names of the variants.
        defaults: Settings of each variant.

    Raises:
        UsageError: A word is malformed or out of bounds, or a name occurs twice.
    """
    rule = f"must be NAME=VALUE. {SET_EXAMPLE}"
    return _parse_words("--set", rule, words, variants, defaults, _parse_fixed)


def parse_space(
    words: Sequence[str],
    variants: Sequence[str],
    defaults: VariantDefaults,
    learning_rates: Sequence[float],
    fixed_names: Sequence[str] = (),
) -> Space:
    """Return the space that --space describes.

    A hyperparameter that a variant does not have is left out of its dimensions.

    Args:
        words: The NAME=SPEC words.
        variants: Names of the variants.
        defaults: Settings of each variant.
        learning_rates: The grid. The learning rate is varied between its ends, unless `words` or
            `fixed_names` contain it or the grid has one rate.
        fixed_names: Names to which --set gives a value.

    Raises:
        UsageError: A word is malformed, out of bounds, or conflicts with another.
    """
    rule = f"must be NAME=SPEC. {EXAMPLE}"
    found = _parse_words("--space", rule, words, variants, defaults, _parse_dimension)
    if both := next((key for key in found if key in fixed_names), None):
        raise UsageError(f"--space {both}: --set has fixed {both}; take one of the two away.")
    named = {*found, *fixed_names}
    if "learning_rate" not in named and len(learning_rates) > 1:
        ends = min(learning_rates), max(learning_rates)
        found = {"learning_rate": Dimension(HYPERPARAMETERS["learning_rate"], "", *ends, log=True), **found}
    space: dict[str, tuple[Dimension, ...]] = {}
    for variant in variants:
        settings = variant_settings(variant, defaults)
        # ReLoRA has a `warmup` of its own, which replaces no value of the schedule's warm-up.
        replaced = {n for n, each in settings.items() if f"{variant}.{n}" in named and each.field != "extra"}
        shared = (d for d in found.values() if not d.variant and d.name in settings.keys() - replaced)
        space[variant] = (*shared, *(d for d in found.values() if d.variant == variant))
    return space


def variant_settings(variant: str, defaults: VariantDefaults) -> dict[str, Hyperparameter]:
    """Return the hyperparameters and the own settings of a variant by name.

    The type of a setting is that of its default. It hides a hyperparameter of the same name (`warmup`).
    """
    has = defaults(variant)
    settings = {n: each for n, each in HYPERPARAMETERS.items() if each.part != "variant" or n in has}
    for name in has.keys() - VARIANT_HYPERPARAMETERS:
        is_int = type(has[name]) is int
        settings[name] = Hyperparameter(
            name=name,
            part="variant",
            field="extra",
            value_type=type(has[name]),
            ge=0 if is_int else None,
            le=HYPERPARAMETERS["rank"].le if is_int else None,  # the variant may allow fewer
        )
    return settings


def _parse_words(
    option: str,
    rule: str,
    words: Sequence[str],
    variants: Sequence[str],
    defaults: VariantDefaults,
    parse: Callable[[str, Hyperparameter, str], _Parsed],
) -> dict[str, _Parsed]:
    """Return key -> what `parse` returns for the variant, the hyperparameter and the text after the "="."""
    found: dict[str, _Parsed] = {}
    for word in words:
        key, _, text = word.partition("=")
        key = canonical_key(key)
        try:
            if not key or not text:
                raise ValueError(rule)
            if key in found:
                raise ValueError(f"{key} occurs twice; name it once.")
            variant, hyperparameter = _find(key, variants, defaults)
            found[key] = parse(variant, hyperparameter, text)
        except ValueError as error:
            raise UsageError(f"{option} {word!r}: {error}") from None
    return found


def _find(key: str, variants: Sequence[str], defaults: VariantDefaults) -> tuple[str, Hyperparameter]:
    """Return the variant and the hyperparameter of a key."""
    variant, dot, name = key.rpartition(".")
    if not dot:
        if key in HYPERPARAMETERS:
            return "", HYPERPARAMETERS[key]
        own = [f"{each}.{setting}" for each in variants for setting in defaults(each)]
        raise ValueError(f"no hyperparameter {key!r}. {suggest_nearest(key, [*HYPERPARAMETERS, *own])}")
    if variant not in variants:
        raise ValueError(f"{variant!r} is not in this study. {suggest_nearest(variant, variants)}")
    settings = variant_settings(variant, defaults)
    if name not in settings:
        raise ValueError(f"{variant} has no {name!r}. {suggest_nearest(name, settings, cutoff=0.6)}")
    return variant, settings[name]


def parse_value(hyperparameter: Hyperparameter, text: str) -> Value:
    """Return the value that a text stands for, of the hyperparameter's type.

    Raises:
        ValueError: There is no such value.
    """
    if hyperparameter.value_type is bool:
        if text not in ("true", "false"):
            raise ValueError(f"{text!r} must be true or false.")
        return text == "true"
    value: Value = text
    if hyperparameter.value_type is not str:
        try:
            value = float(text)
        except ValueError:
            raise ValueError(f"{text!r} is not a number.") from None
    if broken := hyperparameter.find_violation(value):
        choices = hyperparameter.choices
        raise ValueError(f"{text!r} {broken}.{f' {suggest_nearest(text, choices)}' if choices else ''}")
    return hyperparameter.value_type(value)


def _parse_fixed(_variant: str, hyperparameter: Hyperparameter, text: str) -> Value:
    return parse_value(hyperparameter, text)


def _parse_dimension(variant: str, hyperparameter: Hyperparameter, text: str) -> Dimension:
    dimension = Dimension(hyperparameter, variant)
    if not hyperparameter.searchable:
        raise ValueError(f"a search cannot vary {dimension.name}; take hyperparameter_sensitivity.py.")
    if ":" in text:
        return _parse_interval(dimension, text)
    texts = [each for each in text.split(",") if each]
    if len(texts) <= text.count(","):
        raise ValueError(f"one of its values is empty; take {dimension.key}={','.join(texts) or 'a,b'}.")
    values = list(dict.fromkeys(parse_value(hyperparameter, each) for each in texts))
    if len(values) < 2:
        raise ValueError(f"it has one value only; take --set {dimension.key}={texts[0]}.")
    return replace(dimension, choices=tuple(sorted(values, key=float) if dimension.is_numeric else values))


def _parse_interval(dimension: Dimension, text: str) -> Dimension:
    name, value_type = dimension.name, dimension.hyperparameter.value_type
    *kinds, low_text, high_text = text.split(":")
    kind = ":".join(kinds)
    if kinds and kind not in _KINDS:
        forms = "low:high, log:low:high, int:low:high, logint:low:high or a choice a,b,c"
        raise ValueError(f"{kind!r} is no kind of range; take {forms}. {suggest_nearest(kind, _KINDS)}")
    log, has_integer_steps = kind.startswith("log"), kind.endswith("int")
    if not dimension.is_numeric:
        raise ValueError(f"{name} has no range; take a choice a,b,c.")
    if value_type is int and not has_integer_steps:
        raise ValueError(f"{name} is a whole number; take {kind}int:{low_text}:{high_text}.")
    low, high = (float(parse_value(dimension.hyperparameter, each)) for each in (low_text, high_text))
    if has_integer_steps and not (low.is_integer() and high.is_integer()):
        raise ValueError("the ends must be whole numbers.")
    if low == high:
        raise ValueError(f"it has one value only; take --set {dimension.key}={low_text}.")
    if low > high:
        raise ValueError(f"it is reversed; did you mean {':'.join([*kinds, high_text, low_text])}?")
    if log and low <= 0:
        raise ValueError(f"{low_text!r} must be above 0 for a logarithm.")
    return replace(dimension, low=low, high=high, log=log, has_integer_steps=has_integer_steps)
