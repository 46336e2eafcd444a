"""Parsing of command lines by tyro, with one rule for the display and conversion of all options.

`--help` shows a value as one word (`NAME`, `INT`), a list as `NAME [NAME ...]`, and None, which the texts
explain, neither as a value nor as a default. A wrong command line raises UsageError, whose text is one line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import is_dataclass, replace
from itertools import pairwise
from types import NoneType
from typing import Annotated, Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import tyro
from tyro.constructors import (
    MISSING,
    MISSING_NONPROP,
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from orchestrator.study.config_file import convert, option_flag
from orchestrator.util.errors import UsageError, quote_value, suggest_nearest

TEXT_METAVARS = {
    **dict.fromkeys(("data", "validation_data", "test_data"), "PATH"),
    **dict.fromkeys(("learning_rates", "head_learning_rate"), "RATE"),
    "columns": "ROLE=COLUMN",
    "set": "NAME=VALUE",
    "space": "NAME=SPEC",
    "targets": "LAYERS",
    "template": "TEXT",
    "tracking_uri": "ADDRESS",
}
"""Option -> the word for its value, for texts that are no names."""
_Options = TypeVar("_Options")


def parse(
    options_class: type[_Options], words: Sequence[str], program: str, description: str, *markers: Any
) -> _Options:
    """Parse a command line.

    `--help` ends the process.

    Args:
        options_class: Dataclass of the options, or of groups of options.
        words: The words of the command line behind the program.
        program: The program in the usage line and in errors; empty: the path of the script.
        description: The text above the options in `--help`.
        *markers: Markers of `tyro.conf` for all options.

    Raises:
        UsageError: An option is unknown or has a wrong value, or a word is missing.
    """
    rule = _Rule(program)
    registry = ConstructorRegistry()
    registry.struct_rule(rule.describe)
    asks_for_help = bool({"-h", "--help"} & set(words))
    try:
        parsed, unknown = tyro.cli(
            options_class,
            prog=program or None,
            args=list(words),
            description=description,
            config=markers,
            registry=registry,
            return_unknown_args=True,
            console_outputs=asks_for_help,
        )
    except SystemExit:
        if asks_for_help:
            raise
        raise UsageError(rule.describe_failure(words)) from None
    if unknown:
        rule.refuse(unknown[0])
    for name in rule.required:
        if not getattr(parsed, name):
            raise UsageError(f"{program}: {name.upper()} is missing; {rule.help} explains it.")
    return parsed


class _Rule:
    """The rule by which tyro shows and converts options, and the options of one command that it has seen.

    Args:
        program: The program.
    """

    def __init__(self, program: str) -> None:
        self.help = f"{program} --help".strip()
        self.flags: list[str] = []
        self.flags_of_one_value: list[str] = []
        self.required: list[str] = []
        """The words without a flag that must be given."""
        self._in_work: set[Any] = set()
        """Types for which tyro's own rule is being asked."""

    def refuse(self, word: str) -> NoReturn:
        """Raise UsageError for a word that no option takes."""
        option = word.partition("=")[0]
        if option.startswith("-"):
            near = suggest_nearest(option, self.flags, otherwise="No other is similar.")
            raise UsageError(f"{quote_value(option)} is no option here. {near} {self.help} lists all.")
        raise UsageError(f"{quote_value(word)}: no option takes this word; {self.help} lists them.")

    def describe_failure(self, words: Sequence[str]) -> str:
        """Return the error of a command line that tyro does not parse: an option has no value."""
        for word, following in pairwise((*words, "--")):
            if word.replace("_", "-") in self.flags_of_one_value and following.startswith("--"):
                return f"{word}: its value is missing; {self.help} explains it."
        return f"the options cannot be read; {self.help} explains them."

    def describe(self, info: StructTypeInfo) -> StructConstructorSpec | None:
        """Return the options of a dataclass for tyro; None for other types."""
        if not is_dataclass(info.type) or info.type in self._in_work:
            return None
        self._in_work.add(info.type)
        try:
            spec = ConstructorRegistry.get_struct_spec(info)
        finally:
            self._in_work.remove(info.type)
        if not isinstance(spec, StructConstructorSpec):
            return None
        return replace(spec, fields=tuple(self._describe_field(info.type, each) for each in spec.fields))

    def _describe_field(self, options_class: type[Any], field: StructFieldSpec) -> StructFieldSpec:
        hint: Any = field.type
        if is_dataclass(hint):
            return field  # a group of options
        text = field.helptext() if callable(field.helptext) else field.helptext
        # The text has the line breaks of the source, which tyro would keep.
        settings = [tyro.conf.arg(help=" ".join((text or "").split()), help_behavior_hint=_describe_default)]
        flag = option_flag(field.name)
        if hint is not bool:
            spec = _value_spec(options_class, field.name)
            settings.append(spec)
            if spec.nargs == 1:
                self.flags_of_one_value.append(flag)
        if tyro.conf.Positional not in get_args(hint):
            self.flags.append(flag)
        elif get_args(hint)[0] is str and field.default in (MISSING, MISSING_NONPROP):
            self.required.append(field.name)
            field = replace(field, default="")
        described: Any = Annotated[hint, *settings]
        return replace(field, type=described)


def _value_spec(options_class: type[Any], name: str) -> PrimitiveConstructorSpec[Any]:
    """Return how tyro shows and converts the value of an option."""
    hint = get_type_hints(options_class)[name]
    if NoneType in get_args(hint):
        (hint,) = (each for each in get_args(hint) if each is not NoneType)
    is_list = get_origin(hint) is tuple
    word = _value_word(name, get_args(hint)[0] if is_list else hint)
    flag = option_flag(name)

    def from_words(words: list[str]) -> Any:
        try:
            return convert(name, words if is_list else words[0], options_class)
        except UsageError as error:
            raise UsageError(f"{flag}{str(error).removeprefix(name)}") from None

    return PrimitiveConstructorSpec(
        nargs="*" if is_list else 1,
        metavar=f"{word} [{word} ...]" if is_list else word,
        instance_from_str=from_words,
        is_instance=lambda value: True,
        str_from_instance=lambda value: [*map(str, value)] if isinstance(value, tuple) else [str(value)],
    )


def _value_word(name: str, hint: Any) -> str:
    if get_origin(hint) is Literal:
        return f"{{{','.join(get_args(hint))}}}"
    return TEXT_METAVARS.get(name, "NAME") if hint is str else str(hint.__name__).upper()


def _describe_default(default: str) -> str:
    return "" if default in ("None", "False", "", "''") else f"(default: {default})"
