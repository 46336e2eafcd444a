"""Parsing of --space and --set: NAME=SPEC and NAME=VALUE words into dimensions and values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from orchestrator.study.space import (
    HYPERPARAMETERS,
    INT_SETTING_RULE,
    SIGNIFICANT_DIGITS,
    VARIANT_HYPERPARAMETERS,
    Dimension,
    Hyperparameter,
    Space,
    Value,
    VariantDefaults,
    format_value,
)
from orchestrator.util.errors import UsageError, suggest_nearest

EXAMPLE = "For example: learning_rate=log:1e-4:1e-2 rank=4,8,16 lora_plus.ratio=logint:1:64."


def parse_space(
    words: Sequence[str],
    variants: Sequence[str],
    variant_defaults: VariantDefaults,
    learning_rates: Sequence[float],
    fixed_names: Sequence[str] = (),
) -> Space:
    """Return the space that --space describes.

    A hyperparameter that a variant does not have is left out of its dimensions.

    Args:
        words: The NAME=SPEC words.
        variants: Names of the variants.
        variant_defaults: Settings of each variant.
        learning_rates: Unless named or fixed, the learning rate is varied from the lowest to the highest.
        fixed_names: Names to which --set gives a value.

    Raises:
        UsageError: A word is malformed, out of bounds, or conflicts with another.
    """
    shared: dict[str, Dimension] = {}
    variant_dimensions: dict[tuple[str, str], Dimension] = {}
    for word in words:
        name, spec = _split_argument("--space", word)
        variant, name = _parse_name("--space", name, variants, variant_defaults)
        dimension = _parse_dimension(word, variant, name, spec, variant_defaults)
        if dimension.key in {d.key for d in (*shared.values(), *variant_dimensions.values())}:
            raise UsageError(f"--space {word!r}: {dimension.key} occurs twice; name it once.")
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
    """Return the values that --set fixes, by NAME or VARIANT.NAME.

    Args:
        words: The NAME=VALUE words.
        variants: Names of the variants.
        variant_defaults: Settings of each variant.

    Raises:
        UsageError: A word is malformed or out of bounds, or a name occurs twice.
    """
    fixed_values: dict[str, Value] = {}
    for word in words:
        name, text = _split_argument("--set", word)
        variant, name = _parse_name("--set", name, variants, variant_defaults)
        key = f"{variant}.{name}" if variant else name
        if key in fixed_values:
            raise UsageError(f"--set {word!r}: {key} occurs twice; name it once.")
        fixed_values[key] = _parse_value("--set", word, variant, name, text, variant_defaults)
    return fixed_values


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
    """Return the variant (or "") and the name of a key."""
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
    """Return the hyperparameter; None for a variant's own setting (ReLoRA has a `warmup` of its own)."""
    is_variant_setting = variant and name in variant_defaults(variant) and name not in VARIANT_HYPERPARAMETERS
    return None if is_variant_setting else HYPERPARAMETERS[name]


def _parse_value(
    option: str, word: str, variant: str, name: str, text: str, variant_defaults: VariantDefaults
) -> Value:
    """Return one value, of the hyperparameter's type."""
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
        is_int = hyperparameter.is_int if hyperparameter else isinstance(default, int)
        if is_int and number != int(number):
            nearest = max(1, round(number))
            raise UsageError(f"{option} {word!r}: {text!r} must be a whole number; take {nearest}.")
        value = int(number) if is_int else number
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
        dimension = replace(dimension, choices=tuple(sorted(distinct)))
    return dimension
