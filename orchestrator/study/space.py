"""The values of hyperparameters in a configuration, --set, and the space of a search.

The key of a hyperparameter is NAME, for all variants that have it, or VARIANT.NAME for one variant. NAME is
one of `HYPERPARAMETERS` or, after a variant, one of this variant's own settings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from orchestrator.study.configuration import HYPERPARAMETERS, Configuration, Hyperparameter, Value
from orchestrator.study.option import format_value
from orchestrator.util.errors import UsageError, suggest_nearest
from variants.variant_settings import canonical_key

Defaults = Mapping[str, Mapping[str, Value]]
"""Variant of the study -> its settings -> default, including rank, alpha, dropout and targets."""
VARIANT_HYPERPARAMETERS = frozenset(name for name, each in HYPERPARAMETERS.items() if each.part == "variant")
EXAMPLES = {
    "--set": "must be NAME=VALUE. For example: weight_decay=0.01 lora_plus.ratio=4.",
    "--space": "must be NAME=SPEC. For example: rank=4,8,16 learning_rate=log:1e-4:1e-2 alpha=logint:1:64.",
}
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
        return min(self.high, max(self.low, float(f"{drawn:.{self.hyperparameter.digits}g}")))

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


def parse_fixed_values(words: Sequence[str], defaults: Defaults) -> dict[str, Value]:
    """Return the values that --set fixes, by NAME or VARIANT.NAME.

    Args:
        words: The NAME=VALUE words.
        defaults: Settings of each variant.

    Raises:
        UsageError: A word is malformed or out of bounds, or a name occurs twice.
    """
    settings = _settings(defaults)
    return _parse_words("--set", words, settings, lambda named, text: parse_value(named.hyperparameter, text))


def parse_space(
    words: Sequence[str], defaults: Defaults, learning_rates: Sequence[float], fixed_names: Sequence[str] = ()
) -> Space:
    """Return the space that --space describes.

    A hyperparameter that a variant does not have is left out of its dimensions.

    Args:
        words: The NAME=SPEC words.
        defaults: Settings of each variant.
        learning_rates: The grid. The learning rate is varied between its ends, unless `words` or
            `fixed_names` contain it or the grid has one rate.
        fixed_names: Names to which --set gives a value.

    Raises:
        UsageError: A word is malformed, out of bounds, or conflicts with another.
    """
    settings = _settings(defaults)
    found = _parse_words("--space", words, settings, _parse_dimension)
    if both := next((key for key in found if key in fixed_names), None):
        raise UsageError(f"--space {both}: --set has fixed {both}; take one of the two away.")
    named = {*found, *fixed_names}
    if "learning_rate" not in named and len(learning_rates) > 1:
        ends = min(learning_rates), max(learning_rates)
        found = {"learning_rate": Dimension(HYPERPARAMETERS["learning_rate"], "", *ends, log=True), **found}
    space: dict[str, tuple[Dimension, ...]] = {}
    for variant in defaults:
        known = settings[variant]
        # ReLoRA has a `warmup` of its own, which replaces no value of the schedule's warm-up.
        replaced = {name for name in known if f"{variant}.{name}" in named and known[name].field != "extra"}
        shared = (d for d in found.values() if not d.variant and d.name in known.keys() - replaced)
        space[variant] = (*shared, *(d for d in found.values() if d.variant == variant))
    return space


def _settings(defaults: Defaults) -> dict[str, Mapping[str, Hyperparameter]]:
    """Return variant -> name -> hyperparameter or own setting, and HYPERPARAMETERS for the name "".

    The type of an own setting is that of its default. It hides a hyperparameter of the same name (`warmup`).
    """
    settings: dict[str, Mapping[str, Hyperparameter]] = {"": HYPERPARAMETERS}
    for variant, has in defaults.items():
        known = {n: each for n, each in HYPERPARAMETERS.items() if each.part != "variant" or n in has}
        for name in has.keys() - VARIANT_HYPERPARAMETERS:
            rule = Hyperparameter(ge=0, le=100_000) if type(has[name]) is int else Hyperparameter()
            known[name] = replace(rule, name=name, field="extra", value_type=type(has[name]))
        settings[variant] = known
    return settings


def _parse_words(
    option: str,
    words: Sequence[str],
    settings: Mapping[str, Mapping[str, Hyperparameter]],
    parse: Callable[[Dimension, str], _Parsed],
) -> dict[str, _Parsed]:
    """Return key -> what `parse` makes of a dimension without values and the text after the "="."""
    variants = [variant for variant in settings if variant]
    found: dict[str, _Parsed] = {}
    for word in words:
        key, text = setting_key(word), word.partition("=")[2]
        variant, _, name = key.rpartition(".")
        try:
            if not key or not text:
                raise ValueError(EXAMPLES[option])
            if key in found:
                raise ValueError(f"{key} occurs twice; name it once.")
            if variant not in settings:
                raise ValueError(f"{variant!r} is not in this study. {suggest_nearest(variant, variants)}")
            if name not in settings[variant]:
                extra = [f"{v}.{n}" for v in variants for n in settings[v] if settings[v][n].field == "extra"]
                nearest = suggest_nearest(name, [*settings[variant], *extra])
                raise ValueError(f"{variant or 'the study'} has no {name!r}. {nearest}")
            found[key] = parse(Dimension(settings[variant][name], variant), text)
        except ValueError as error:
            raise UsageError(f"{option} {word!r}: {error}") from None
    return found


def setting_key(word: str) -> str:
    """Return the key (NAME or VARIANT.NAME) of a word of --set or --space."""
    return canonical_key(word.partition("=")[0])


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


def _parse_dimension(dimension: Dimension, text: str) -> Dimension:
    """Return a dimension with the values that the SPEC in `text` gives it."""
    hyperparameter = dimension.hyperparameter
    if not hyperparameter.searchable:
        raise ValueError(f"a search cannot vary {dimension.name}; take `lora-orchestrator sensitivity`.")
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
    if low > high:
        raise ValueError(f"it is reversed; did you mean {':'.join([*kinds, high_text, low_text])}?")
    if log and low <= 0:
        raise ValueError(f"{low_text!r} must be above 0 for a logarithm.")
    return replace(dimension, low=low, high=high, log=log, has_integer_steps=has_integer_steps)
