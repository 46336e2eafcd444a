"""Options: the fields of dataclasses that derive from `Options`.

A field declares the type, the bounds, the default and the help of an option. The command line, the file of
--config, the arguments of `orchestrator.Study` and study.yaml are made from the fields. This module converts
and checks the values of all four. A wrong value raises an error of one line.
"""

from __future__ import annotations

import ast
import inspect
import os
import pkgutil
import sys
from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import pydantic
from pydantic import Field
from pydantic_core import ErrorDetails

from orchestrator.util.errors import UsageError, quote_value, suggest_nearest
from orchestrator.util.redaction import redact_secrets

Text = Annotated[str, Field(min_length=1)]
"""A word that is not empty."""
Words = Annotated[tuple[Text, ...], Field(min_length=1)]
"""One word or more."""
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=10_000)]
"""A number of things of which a study keeps each in memory."""
Examples = Annotated[int, Field(ge=1, le=10_000_000)]
"""A number of examples, steps or tokens. A larger one is a slip, and would fill the memory."""


@dataclass(frozen=True)
class Option:
    """The properties of an option beside its bounds, default and help.

    A field has it as metadata in `Annotated`. `Options.declared` adds the last three, which follow from the
    field's annotation.
    """

    value: str = ""
    """The word for a value in `--help`. With "=" in it, such as NAME=VALUE, each word is a pair."""
    paths: bool = False
    """True if a value may be any file or folder. A value of another option may be a file that ends in .py."""
    commas: bool = False
    """True if a word may hold several, separated by commas."""
    sets: str = ""
    """The hyperparameter that the option sets."""
    rival: str = ""
    """The option that says the same in another way; only one of the two may be given."""
    needs: str = ""
    """The option without which this one has no meaning."""
    saved: bool = True
    """False if the option concerns one run only; study.yaml then leaves it out."""
    position: bool = False
    """True if the value is given without the name of the option."""
    registry: str = ""
    """The mapping, "module:name", whose keys are the choices; it may be in a package above this one."""
    section: str = ""
    """Title of the section of `--help` that begins with this option."""
    plain_type: Any = str
    """The type without bounds and without None; `tuple` for a list of words."""
    choices: tuple[str, ...] = ()
    """All values, or words of a list, if there is a fixed set of them."""
    hint: Any = str
    """The annotation."""

    @cached_property
    def adapter(self) -> pydantic.TypeAdapter[Any]:
        """The converter of pydantic, which also checks a value."""
        return pydantic.TypeAdapter(self.hint)

    @property
    def is_pairs(self) -> bool:
        """True if each word is NAME=VALUE; a file or Python may give a mapping."""
        return "=" in self.value


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a command. Values are converted to the types of the fields.

    Raises:
        UsageError: A value has another type, or breaks a bound or a rule.
    """

    unused: ClassVar[Mapping[str, str]] = {}
    """Options of the shared sections that this experiment refuses -> the reason and the fix, for the error.
    `--help` leaves them out, and a file of another experiment does not give them."""
    always: ClassVar[tuple[str, ...]] = ()
    """Variants that a study of this experiment always has."""
    default_config: ClassVar[str] = ""
    """The preset that a study takes if no option of `own_protocol` and no file is given."""
    own_protocol: ClassVar[tuple[str, ...]] = ("task", "data", "model", "dry_run")
    """Options that choose another protocol than that of `default_config`."""

    def __post_init__(self) -> None:
        for name, default in defaults(type(self)).items():
            value = getattr(self, name)
            if value is not default:
                object.__setattr__(self, name, convert(type(self), name, value, flag(name)))
        given = self.given()
        for name in given:
            if name in self.unused:
                raise UsageError(f"{self.shown(name)}: {self.unused[name]}.")
            option = self.declared()[name]
            if option.rival in given:
                both = f"{self.shown(name)} and {self.shown(option.rival)} both say the same"
                raise UsageError(f"{both}; take one of the two away.")
            if option.needs and option.needs not in given:
                needed = " ".join([flag(option.needs), ", ".join(self.declared()[option.needs].choices[1:])])
                needs = f"has no meaning without {needed.strip()}; add it, or leave this out"
                raise UsageError(f"{self.shown(name)} {needs}.")

    @classmethod
    @cache
    def declared(cls) -> Mapping[str, Option]:
        """Return the options of this class: name of the field -> option."""
        found = {}
        plain_hints = get_type_hints(cls)
        for name, hint in get_type_hints(cls, include_extras=True).items():
            metadata = getattr(hint, "__metadata__", ())
            option = next((each for each in metadata if isinstance(each, Option)), Option())
            plain = plain_hints[name]
            if type(None) in get_args(plain):
                (plain,) = (each for each in get_args(plain) if each is not type(None))
            if option.registry:
                plain = hint = Literal[tuple(pkgutil.resolve_name(option.registry))]
            if get_origin(hint) is not ClassVar:
                kind = tuple if get_origin(plain) is tuple else plain
                word = get_args(plain)[0] if kind is tuple else plain
                choices = get_args(word) if get_origin(word) is Literal else ()
                found[name] = replace(option, plain_type=kind, choices=choices, hint=hint)
        return found

    def given(self) -> dict[str, Any]:
        """Return the options that differ from their defaults: name -> value."""
        values = {name: (getattr(self, name), default) for name, default in defaults(type(self)).items()}
        return {name: value for name, (value, default) in values.items() if value != default}

    def shown(self, name: str) -> str:
        """Return an option as on the command line, for errors: `--steps 5`."""
        value = getattr(self, name)
        if value is True:
            return flag(name)
        shown = f"{value:g}" if isinstance(value, float) else f"{value}"
        return redact_secrets(f"{flag(name)} {' '.join(value) if isinstance(value, tuple) else shown}")


def flag(name: str) -> str:
    """Return the option of a field: `learning_rates` -> `--learning-rates`."""
    return f"--{name.replace('_', '-')}"


def defaults(options_class: Any) -> dict[str, Any]:
    """Return the default of each option: name -> value; MISSING for one that must be given."""
    return {
        each.name: each.default if each.default_factory is MISSING else each.default_factory()
        for each in fields(options_class)
    }


def sections(options_class: Any) -> dict[str, list[str]]:
    """Return the title of each section of options -> its options.

    A section begins with an option that names it, or with the first option of a class: that of
    `StoreOptions` is "store".
    """
    found: dict[str, list[str]] = {}
    for each in (each for each in options_class.__mro__ if issubclass(each, Options)):
        title = each.__name__.removesuffix("Options").lower()
        seen = [name for names in found.values() for name in names]
        for name in inspect.get_annotations(each):
            if name in defaults(options_class) and name not in seen:
                title = options_class.declared()[name].section or title
                found.setdefault(title, []).append(name)
    return found


def help_texts(options_class: Any) -> dict[str, str]:
    """Return the help of each option: the text below its field in the source, in one line."""
    found: dict[str, str] = {}
    for each in options_class.__mro__:
        if not issubclass(each, Options):
            continue
        module = ast.parse(inspect.getsource(sys.modules[each.__module__]))
        (source,) = (n for n in module.body if isinstance(n, ast.ClassDef) and n.name == each.__name__)
        for field, text in zip(source.body, source.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                name = ast.unparse(field.target)
                found.setdefault(name, " ".join(str(ast.literal_eval(text.value)).split()))
    return found


def find_option(key: str, options_class: Any, others: Collection[str] = ()) -> str:
    """Return the name of an option.

    Args:
        key: The option in any spelling: `learning-rates`, `--learning_rates`.
        options_class: Class of the options.
        others: Further valid names.

    Raises:
        UsageError: There is no such option; the error names the nearest one.
    """
    name = key.removeprefix("--").replace("-", "_")
    names = dict.fromkeys([*defaults(options_class), *others])
    if name not in names:
        near = suggest_nearest(name, names, "`--help` lists all.")
        raise UsageError(f"{quote_value(key)} is no option here. {near}")
    return name


def convert(options_class: Any, name: str, value: object, label: str) -> Any:
    """Return the value of an option with the type of its field.

    Args:
        options_class: Class of the options.
        name: Name of the option.
        value: A text, a number, a truth value, None, a path, a list of them, or a mapping for pairs.
        label: The option in errors.

    Raises:
        UsageError: The value has another type or breaks a bound.
    """
    option = options_class.declared()[name]
    plain = option.plain_type
    if isinstance(value, Mapping) and option.is_pairs:
        value = [f"{key}={format_value(each)}" for key, each in value.items()]
    if plain is tuple:
        words = [value] if isinstance(value, (str, int, float, os.PathLike)) else value
        value = [_word(word) for word in words] if isinstance(words, (list, tuple)) else words
        if option.commas and isinstance(value, list):
            value = [part for word in value for part in _split(word)]
    elif plain is str and not isinstance(value, bool):
        value = _word(value)
    elif plain in (int, float) and isinstance(value, bool):
        value = str(value)  # pydantic would take it as a number
    if value == "" and plain is Path:
        raise UsageError(f"{label} is empty; name a path, or leave it out.")
    try:
        return option.adapter.validate_python(value)
    except pydantic.ValidationError as error:
        raise UsageError(f"{label} {_explain(option, error.errors()[0], value)}") from None


def format_value(value: object) -> str:
    """Return the value of a hyperparameter, or a list of values, as on the command line: `true`, `4,8,16`."""
    if isinstance(value, (list, tuple)):
        return ",".join(map(format_value, value))
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def _word(value: object) -> object:
    """Return a number or a path as a word of a command line; any other value as it is."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return str(value) if is_number or isinstance(value, os.PathLike) else value


def _split(word: Any) -> list[Any]:
    """Split a word at its commas, unless it is the path of a file."""
    if not isinstance(word, str) or "," not in word or os.path.exists(word):
        return [word]
    return [part.strip() for part in word.split(",") if part.strip()]


_BOUNDS = {
    "greater_than_equal": "must be {ge} or more",
    "greater_than": "must be above {gt}",
    "less_than_equal": "must be {le} or less; take {le}",
    "less_than": "must be below {lt}",
    "finite_number": "must be a finite number",
}
_TYPES = {
    "int": "must be a whole number",
    "float": "must be a number",
    "bool": "must be true or false",
    "tuple": "must be a list of words",
}
"""Type of a violation in pydantic, or its start -> the rule."""


def _explain(option: Option, violation: ErrorDetails, value: object) -> str:
    """Return the value, the rule that it breaks, and the fix."""
    kind = violation["type"]
    if "too_short" in kind:
        return "is empty; name one, or leave it out."
    if value is None:
        return "has no value; give one, or leave it out."
    given = str(violation["input"])
    if option.choices:
        near = suggest_nearest(given, option.choices, otherwise=" ")
        return f"{quote_value(given)}: must be one of {', '.join(option.choices)}. {near}".strip()
    if option.is_pairs:
        return f"{quote_value(given)}: must be a list of {option.value}, or a mapping."
    return f"{given if kind in _BOUNDS else quote_value(given)}: {broken_rule(violation)}."


def broken_rule(violation: ErrorDetails) -> str:
    """Return the rule that a value breaks: `must be 1 or more`."""
    rules = {**_BOUNDS, **_TYPES}
    rule = next((rules[start] for start in rules if violation["type"].startswith(start)), "must be one word")
    limits = {name: f"{limit:.12g}" for name, limit in violation.get("ctx", {}).items() if name in rule}
    return rule.format(**limits)
