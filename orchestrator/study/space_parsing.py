"""Parsing of --space and --set: NAME=SPEC and NAME=VALUE words into dimensions and values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.study import space
from orchestrator.study.configuration import Hyperparameter
from orchestrator.study.space import Dimension, Space, Value, VariantDefaults
from orchestrator.util.errors import UsageError, suggest_nearest
from variants.variant_names import canonical_key

EXAMPLE = "For example: learning_rate=log:1e-4:1e-2 rank=4,8,16 lora_plus.ratio=logint:1:64."


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
    found: dict[str, Dimension] = {}
    for word in words:
        argument = _parse_argument("--space", word, variants, defaults)
        if argument.hyperparameter and not argument.hyperparameter.searchable:
            raise argument.error(f"a search cannot vary {argument.name}; take hyperparameter_sensitivity.py.")
        dimension = argument.parse_dimension()
        if argument.key in found:
            raise argument.error(f"{argument.key} occurs twice; name it once.")
        if argument.key in fixed_names:
            raise argument.error(f"--set has fixed {argument.key}; take one of the two away.")
        found[argument.key] = dimension
    if "learning_rate" not in (*found, *fixed_names) and len(learning_rates) > 1:
        default = Dimension("learning_rate", low=min(learning_rates), high=max(learning_rates), log=True)
        found = {"learning_rate": default, **found}
    dimensions: dict[str, tuple[Dimension, ...]] = {}
    for variant in variants:
        own = [d for d in found.values() if d.variant == variant]
        named = [key.rpartition(".")[2] for key in fixed_names if key.rpartition(".")[0] == variant]
        replaced = {n for n in (*(d.name for d in own), *named) if _find_hyperparameter(variant, n, defaults)}
        missing = space.VARIANT_HYPERPARAMETERS - set(defaults(variant))
        shared = [d for d in found.values() if not d.variant and d.name not in replaced | missing]
        dimensions[variant] = (*shared, *own)
    return Space(dimensions)


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
    fixed_values: dict[str, Value] = {}
    for word in words:
        argument = _parse_argument("--set", word, variants, defaults)
        if argument.key in fixed_values:
            raise argument.error(f"{argument.key} occurs twice; name it once.")
        fixed_values[argument.key] = argument.parse_value(argument.text)
    return fixed_values


def _find_hyperparameter(variant: str, name: str, defaults: VariantDefaults) -> Hyperparameter | None:
    """Return the hyperparameter; None for a variant's own setting (ReLoRA has a `warmup` of its own)."""
    is_variant_setting = variant and name in defaults(variant) and name not in space.VARIANT_HYPERPARAMETERS
    return None if is_variant_setting else space.HYPERPARAMETERS[name]


def _parse_argument(option: str, word: str, variants: Sequence[str], defaults: VariantDefaults) -> _Argument:
    """Split a word and look up its name."""
    key, found, text = word.partition("=")
    key = canonical_key(key)
    if not found or not key or not text:
        rule = "must be NAME=VALUE. For example: weight_decay=0.01 lora_plus.ratio=4."
        raise UsageError(
            f"{option} {word!r}: {rule if option == '--set' else f'must be NAME=SPEC. {EXAMPLE}'}"
        )
    variant, dot, name = key.rpartition(".")
    if dot and variant not in variants:
        hint = suggest_nearest(variant, variants)
        raise UsageError(f"{option} {key}: {variant!r} is not in this study. {hint}")
    if dot:
        known = {*defaults(variant), *(space.HYPERPARAMETERS.keys() - space.VARIANT_HYPERPARAMETERS)}
        if name not in known:
            own = [each for each in defaults(variant) if each not in space.VARIANT_HYPERPARAMETERS]
            others = ", ".join(sorted(known.difference(own)))
            settings = f"Its own settings: {', '.join(own) or 'none'}; others: {others}."
            hint = suggest_nearest(name, known, settings, cutoff=0.6)
            raise UsageError(f"{option} {key}: {variant} has no {name!r}. {hint}")
    elif key not in space.HYPERPARAMETERS:
        known = {
            *space.HYPERPARAMETERS,
            *(f"{each}.{setting}" for each in variants for setting in defaults(each)),
        }
        raise UsageError(f"{option}: no hyperparameter {key!r}. {suggest_nearest(key, known)}")
    hyperparameter = _find_hyperparameter(variant, name, defaults)
    default = None if hyperparameter else defaults(variant)[name]
    return _Argument(option, word, variant, name, text, hyperparameter, default)


@dataclass(frozen=True)
class _Argument:
    """A word of --space or --set: its parts, and the hyperparameter or variant setting that it names."""

    option: str
    word: str
    variant: str
    """The variant in front of the name; empty for all variants."""
    name: str
    text: str
    """The part after "="."""
    hyperparameter: Hyperparameter | None
    """None for a variant's own setting."""
    default: Value | None
    """The default of a variant's own setting; its type is the setting's type."""

    @property
    def key(self) -> str:
        """NAME, or VARIANT.NAME."""
        return f"{self.variant}.{self.name}" if self.variant else self.name

    @property
    def is_int(self) -> bool:
        return self.hyperparameter.value_type is int if self.hyperparameter else isinstance(self.default, int)

    @property
    def is_text(self) -> bool:
        """True if the values are names, or true and false."""
        rule = self.hyperparameter
        return isinstance(self.default, (str, bool)) or bool(rule and rule.value_type is str)

    def error(self, message: str) -> UsageError:
        return UsageError(f"{self.option} {self.word!r}: {message}")

    def parse_value(self, text: str) -> Value:
        """Return one value, of the hyperparameter's type."""
        if isinstance(self.default, bool):
            if text not in ("true", "false"):
                raise self.error(f"{text!r} must be true or false.")
            return text == "true"
        value: Value = text
        if not self.is_text:
            value = self._parse_number(text)
            if self.is_int and value != int(value):
                raise self.error(f"{text!r} must be a whole number; take {max(1, round(value))}.")
            value = int(value) if self.is_int else value
        self._check_rule(text, value)
        return value

    def _parse_number(self, text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise self.error(f"{text!r} is not a number.") from None
        if not math.isfinite(value):
            raise self.error(f"{text!r} must be finite.")
        return value

    def _check_rule(self, text: str, value: Value) -> None:
        rule = self.hyperparameter or (space.INT_SETTING_RULE if self.is_int else None)
        if rule and (broken := rule.find_violation(value)):
            hint = f" {suggest_nearest(text, rule.choices)}" if rule.choices else ""
            raise self.error(f"{text!r} {broken}.{hint}")

    def parse_dimension(self) -> Dimension:
        """Return the dimension that the word describes: choices, or an interval."""
        return self._parse_interval() if ":" in self.text else self._parse_choices()

    def _parse_interval(self) -> Dimension:
        if self.is_text:
            few = ",".join(self.hyperparameter.choices[:2]) if self.hyperparameter else self.default
            example = f"{self.name}={space.format_value(few or '')}"
            raise self.error(f"{self.name} has no range; take a choice, for example {example}.")
        *kinds, low_text, high_text = self.text.split(":")
        kind = ":".join(kinds)
        if kinds and kind not in ("log", "int", "logint"):
            forms = "low:high, log:low:high, int:low:high, logint:low:high or a choice a,b,c"
            hint = f" {suggest_nearest(kind, ('log', 'int', 'logint'))}" if len(kinds) == 1 else ""
            raise self.error(f"{self.text!r} must be {forms}.{hint}")
        log, has_integer_steps = kind.startswith("log"), kind.endswith("int")
        if self.is_int and not has_integer_steps:
            raise self.error(f"{self.name} is a whole number; take {kind}int:{low_text}:{high_text}.")
        low, high = self._parse_number(low_text), self._parse_number(high_text)
        if has_integer_steps and (low != int(low) or high != int(high)):
            raise self.error("the ends must be whole numbers.")
        if low > high:
            raise self.error(f"it is reversed; did you mean {':'.join([*kinds, high_text, low_text])}?")
        if low == high:
            raise self._single_value_error(low_text)
        if log and low <= 0:
            raise self.error(f"{low_text!r} must be above 0 for a logarithm.")
        self._check_rule(low_text, low)
        self._check_rule(high_text, high)
        digits = (self.hyperparameter or Hyperparameter()).significant_digits
        return Dimension(self.name, self.variant, low, high, log, has_integer_steps, self.is_int, digits)

    def _parse_choices(self) -> Dimension:
        texts = [text for text in self.text.split(",") if text]
        if len(texts) <= self.text.count(","):
            typed = f"take {self.key}={','.join(texts)}." if texts else f"name two values or more. {EXAMPLE}"
            raise self.error(f"one of its values is empty; {typed}")
        values = list(dict.fromkeys(map(self.parse_value, texts)))
        if len(values) < 2:
            raise self._single_value_error(texts[0])
        if not self.is_text:
            values.sort(key=float)
        return Dimension(self.name, self.variant, choices=tuple(values))

    def _single_value_error(self, text: str) -> UsageError:
        return self.error(f"it has one value only; take --set {self.key}={text}.")
