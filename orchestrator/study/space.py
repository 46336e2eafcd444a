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
from orchestrator.util.errors import BadInput, nearest

Value = float | int | str | bool
Own = Callable[[str], Mapping[str, Value]]
"""A variant's own settings with their defaults; rank, alpha and dropout among them if it has them."""

EXAMPLE = "For example: learning_rate=log:1e-4:1e-2 rank=4,8,16 lora_plus.ratio=logint:1:64."
DIGITS = 3  # significant ones of a drawn number: its spelling in reports is its value


@dataclass(frozen=True)
class Hyperparameter:
    """Where it stands in a configuration, and what it may be. `words`: it is one of these. Numbers lie from
    `least` (`open_below`: above it) to `most` (`open_above`: below it)."""

    part: Literal["variant", "optimizer", "schedule", "batches"]
    field: str
    whole: bool = False
    least: float = 0.0
    most: float = math.inf
    open_below: bool = True
    open_above: bool = True
    digits: int = DIGITS
    words: tuple[str, ...] = ()

    def rule(self, value: Value) -> str | None:
        """What `value` breaks, in words; None when it may be."""
        if self.words:
            return None if value in self.words else f"must be one of {', '.join(self.words)}"
        if isinstance(value, (str, bool)):
            return "must be a number"
        if self.whole and value != int(value):
            return "must be a whole number"
        low = value > self.least if self.open_below else value >= self.least
        high = value < self.most if self.open_above else value <= self.most
        if low and high:
            return None
        bounds = f"{'above' if self.open_below else 'at least'} {self.least:g}"
        if self.most < math.inf:
            bounds += f" and {'below' if self.open_above else 'at most'} {self.most:g}"
        return f"must be {bounds}"


def count(part: Literal["variant", "batches"], field: str, most: int) -> Hyperparameter:
    """Return the rule for a whole number.

    Args:
        part: The part of a configuration that has the number.
        field: Its name there.
        most: The largest value that is allowed; the smallest is 1.
    """
    return Hyperparameter(part, field, True, least=1, most=most, open_below=False, open_above=False)


HYPERPARAMETERS: dict[str, Hyperparameter] = {
    "learning_rate": Hyperparameter("optimizer", "learning_rate"),
    "head_learning_rate": Hyperparameter("optimizer", "head_learning_rate"),
    "rank": count("variant", "rank", bounds.RANK),
    "alpha": Hyperparameter("variant", "alpha"),
    "dropout": Hyperparameter("variant", "dropout", most=1, open_below=False),
    "weight_decay": Hyperparameter("optimizer", "weight_decay", open_below=False),
    "beta1": Hyperparameter("optimizer", "beta1", most=1, open_below=False, digits=6),
    "beta2": Hyperparameter("optimizer", "beta2", most=1, open_below=False, digits=6),
    "epsilon": Hyperparameter("optimizer", "epsilon"),
    "clip_norm": Hyperparameter("optimizer", "clip_norm"),
    "warmup": Hyperparameter("schedule", "warmup", most=1, open_below=False, open_above=False),
    "schedule": Hyperparameter("schedule", "name", words=("constant", "linear", "cosine")),
    "batch_size": count("batches", "batch_size", bounds.BATCH_SIZE),
}
WHOLE = replace(count("variant", "extra", bounds.RANK), least=0)
"""The rule for whole numbers among a variant's own settings. The variant itself may allow fewer."""
OF_VARIANTS = frozenset(name for name, each in HYPERPARAMETERS.items() if each.part == "variant")


@dataclass(frozen=True)
class Dimension:
    """One hyperparameter of a space: from `low` to `high` (both can be drawn), or one of `choices`.
    `variant` is empty when it holds for all. `integer`: whole numbers; `whole`: the value's type is int."""

    name: str
    variant: str = ""
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    integer: bool = False
    whole: bool = False
    digits: int = DIGITS
    choices: tuple[Value, ...] = ()

    @property
    def key(self) -> str:
        return f"{self.variant}.{self.name}" if self.variant else self.name

    @property
    def numeric(self) -> bool:
        """Whether its values have an order; choices of numbers are in ascending order."""
        return not any(isinstance(each, (str, bool)) for each in self.choices)

    @property
    def size(self) -> int | None:
        """How many values; None for a real interval."""
        if self.choices:
            return len(self.choices)
        return int(self.high) - int(self.low) + 1 if self.integer else None

    @property
    def ends(self) -> tuple[Value, ...]:
        """All choices, or both ends."""
        return self.choices or (self.value(self.low), self.value(self.high))

    def value(self, drawn: float) -> Value:
        """A number drawn from the interval as the configuration gets it."""
        if self.integer:
            return int(drawn) if self.whole else float(drawn)
        return min(self.high, max(self.low, float(f"{drawn:.{self.digits}g}")))

    @property
    def text(self) -> str:
        """The SPEC that says this, in one spelling."""
        if self.choices:
            return ",".join(spelled(each) for each in self.choices)
        kind = {(False, False): "", (True, False): "log:", (False, True): "int:", (True, True): "logint:"}
        return f"{kind[self.log, self.integer]}{self.low:.10g}:{self.high:.10g}"


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


def parse(
    words: Sequence[str], variants: Sequence[str], own: Own, rates: Sequence[float], fixed: Sequence[str] = ()
) -> Space:
    """The space of `variants` from NAME=SPEC words. What a variant does not have is left out of its space,
    unless it is named as VARIANT.NAME. The learning rate goes from the lowest to the highest of `rates`
    unless it is named, or among `fixed` (names with a value of their own). Raises BadInput."""
    shared: dict[str, Dimension] = {}
    single: dict[tuple[str, str], Dimension] = {}
    for word in words:
        name, spec = _split("--space", word)
        variant, name = _name("--space", name, variants, own)
        dimension = _dimension(word, variant, name, spec, own)
        if dimension.key in {d.key for d in (*shared.values(), *single.values())}:
            raise BadInput(f"--space {word!r}: {dimension.key} is there twice; name it once.")
        if dimension.key in fixed:
            raise BadInput(f"--space {word!r}: --set has fixed {dimension.key}; take one of the two away.")
        if variant:
            single[variant, name] = dimension
        else:
            shared[name] = dimension
    if "learning_rate" not in shared and "learning_rate" not in fixed and len(rates) > 1:
        default = Dimension("learning_rate", low=min(rates), high=max(rates), log=True)
        shared = {"learning_rate": default, **shared}
    of: dict[str, tuple[Dimension, ...]] = {}
    for variant in variants:
        mine = {name: d for (whose, name), d in single.items() if whose == variant}
        replaced = {name for name in mine if _known(variant, name, own)}
        of[variant] = tuple(
            dimension
            for name, dimension in shared.items()
            if (name not in OF_VARIANTS or name in own(variant))
            and name not in replaced
            and (f"{variant}.{name}" not in fixed or not _known(variant, name, own))
        ) + tuple(mine.values())
    return Space(of)


def settings(words: Sequence[str], variants: Sequence[str], own: Own) -> dict[str, Value]:
    """Fixed values from NAME=VALUE words, by NAME or VARIANT.NAME. Raises BadInput."""
    found: dict[str, Value] = {}
    for word in words:
        name, text = _split("--set", word)
        variant, name = _name("--set", name, variants, own)
        key = f"{variant}.{name}" if variant else name
        if key in found:
            raise BadInput(f"--set {word!r}: {key} is there twice; name it once.")
        found[key] = _value("--set", word, variant, name, text, own)
    return found


def applied(configuration: Configuration, values: Mapping[str, Value]) -> Configuration:
    """`configuration` with these values (by NAME or VARIANT.NAME; those of other variants are passed over).
    A batch is split into as many parts as before."""
    for key, value in sorted(values.items(), key=lambda item: "." in item[0]):
        variant, _, name = key.rpartition(".")
        if variant not in ("", configuration.variant.name):
            continue
        known = HYPERPARAMETERS.get(name)
        if known is None or (variant and name in configuration.variant.extra):
            extra = {**configuration.variant.extra, name: value}
            configuration = replace(configuration, variant=replace(configuration.variant, extra=extra))
        elif known.part == "batches":
            size = int(value) // configuration.batches.accumulation
            configuration = replace(configuration, batches=replace(configuration.batches, batch_size=size))
        else:
            part = replace(getattr(configuration, known.part), **{known.field: value})
            configuration = replace(configuration, **{known.part: part})
    return configuration


def told(configuration: Configuration, key: str) -> Value | None:
    """The value that `configuration` has for NAME or VARIANT.NAME: `applied` the other way. None where it has
    none (it is another variant's)."""
    variant, _, name = key.rpartition(".")
    if variant not in ("", configuration.variant.name):
        return None
    if variant and name in configuration.variant.extra:
        return configuration.variant.extra[name]
    known = HYPERPARAMETERS[name]
    if known.part == "batches":
        return configuration.batches.batch_size * configuration.batches.accumulation
    value = getattr(getattr(configuration, known.part), known.field)
    return None if (name, value) == ("rank", 0) else value  # a variant without ranks


def spelled(value: Value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def _split(option: str, word: str) -> tuple[str, str]:
    name, found, text = word.partition("=")
    if not found or not name or not text:
        form = "NAME=SPEC" if option == "--space" else "NAME=VALUE"
        example = EXAMPLE if option == "--space" else "For example: weight_decay=0.01 lora_plus.ratio=4."
        raise BadInput(f"{option} {word!r}: must be {form}. {example}")
    return name.replace("-", "_"), text


def _name(option: str, key: str, variants: Sequence[str], own: Own) -> tuple[str, str]:
    """(variant or "", name)."""
    variant, dot, name = key.rpartition(".")
    if not dot:
        if key not in HYPERPARAMETERS:
            known = [*HYPERPARAMETERS, *(f"{each}.{name}" for each in variants for name in own(each))]
            raise BadInput(f"{option}: no hyperparameter {key!r}. {nearest(key, known)}")
        return "", key
    if variant not in variants:
        raise BadInput(f"{option} {key}: {variant!r} is not in this study. {nearest(variant, variants)}")
    known = [*own(variant), *(name for name in HYPERPARAMETERS if name not in OF_VARIANTS)]
    if name not in known:
        raise BadInput(f"{option} {key}: {variant} has no {name!r}. {nearest(name, known)}")
    return variant, name


def _known(variant: str, name: str, own: Own) -> Hyperparameter | None:
    """None for one of the variant's own settings (ReLoRA has a `warmup` of its own)."""
    mine = variant and name in own(variant) and name not in OF_VARIANTS
    return None if mine else HYPERPARAMETERS[name]


def _value(option: str, word: str, variant: str, name: str, text: str, own: Own) -> Value:
    """One value, of the type that the hyperparameter has."""
    known = _known(variant, name, own)
    default = own(variant)[name] if known is None else None
    if isinstance(default, bool):
        if text not in ("true", "false"):
            raise BadInput(f"{option} {word!r}: {text!r} must be true or false.")
        return text == "true"
    if isinstance(default, str) or (known and known.words):
        value: Value = text
    else:
        number = _number(option, word, text)
        if (known.whole if known else isinstance(default, int)) and number != int(number):
            near = f"; take {max(1, round(number))}"
            raise BadInput(f"{option} {word!r}: {text!r} must be a whole number{near}.")
        value = int(number) if (known.whole if known else isinstance(default, int)) else number
    rule = known or (WHOLE if isinstance(value, int) else None)
    broken = rule.rule(value) if rule else None
    if broken:
        hint = f" {nearest(text, known.words)}" if known and known.words else ""
        raise BadInput(f"{option} {word!r}: {text!r} {broken}.{hint}")
    return value


def _number(option: str, word: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise BadInput(f"{option} {word!r}: {text!r} is not a number.") from None
    if not math.isfinite(value):
        raise BadInput(f"{option} {word!r}: {text!r} must be finite.")
    return value


def _dimension(word: str, variant: str, name: str, spec: str, own: Own) -> Dimension:
    known = _known(variant, name, own)
    if ":" not in spec:
        return _choice(word, variant, name, spec, own)
    default = None if known else own(variant)[name]
    if isinstance(default, (str, bool)) or (known and known.words):
        few = ",".join(known.words[:2]) if known else spelled(default or "")
        raise BadInput(f"--space {word!r}: {name} has no range; take a choice, for example {name}={few}.")
    *kind, low_text, high_text = spec.split(":")
    kinds = {(): (False, False), ("log",): (True, False), ("int",): (False, True), ("logint",): (True, True)}
    if tuple(kind) not in kinds:
        forms = "low:high, log:low:high, int:low:high, logint:low:high or a choice a,b,c"
        hint = f" {nearest(kind[0], ('log', 'int', 'logint'))}" if len(kind) == 1 else ""
        raise BadInput(f"--space {word!r}: {spec!r} must be {forms}.{hint}")
    log, integer = kinds[tuple(kind)]
    whole = known.whole if known else isinstance(default, int)
    if whole and not integer:
        better = f"{'logint' if log else 'int'}:{low_text}:{high_text}"
        raise BadInput(f"--space {word!r}: {name} is a whole number; take {better}.")
    low, high = _number("--space", word, low_text), _number("--space", word, high_text)
    if integer and (low != int(low) or high != int(high)):
        raise BadInput(f"--space {word!r}: the ends must be whole numbers.")
    if low > high:
        better = ":".join([*kind, high_text, low_text])
        raise BadInput(f"--space {word!r} is reversed; did you mean {better}?")
    if low == high:
        raise BadInput(
            f"--space {word!r} has one value only; take --set {word.partition('=')[0]}={low_text}."
        )
    if log and low <= 0:
        raise BadInput(f"--space {word!r}: {low_text!r} must be above 0 for a logarithm.")
    rule = known or (WHOLE if whole else None)
    for text, end in ((low_text, low), (high_text, high)):
        broken = rule.rule(end) if rule else None
        if broken:
            raise BadInput(f"--space {word!r}: {text!r} {broken}.")
    digits = known.digits if known else DIGITS
    return Dimension(name, variant, low, high, log, integer, whole, digits)


def _choice(word: str, variant: str, name: str, spec: str, own: Own) -> Dimension:
    texts = [text for text in spec.split(",") if text]
    typed = word.partition("=")[0]
    if len(texts) <= spec.count(","):
        better = f"take {typed}={','.join(texts)}." if texts else f"name two values or more. {EXAMPLE}"
        raise BadInput(f"--space {word!r}: one of its values is empty; {better}")
    values = [_value("--space", word, variant, name, text, own) for text in texts]
    distinct = list(dict.fromkeys(values))
    if len(distinct) < 2:
        raise BadInput(f"--space {word!r} has one value only; take --set {typed}={texts[0]}.")
    dimension = Dimension(name, variant, choices=tuple(distinct))
    if dimension.numeric:
        dimension = replace(dimension, choices=tuple(sorted(distinct)))  # type: ignore[type-var]
    return dimension
