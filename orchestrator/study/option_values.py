"""Values of options that were not typed as words: from a YAML file or from Python.

Both are converted to the types of the fields, with errors that name the option and the rule.
"""

from __future__ import annotations

import os
import types
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from orchestrator.util.errors import UsageError, quote_value, suggest_nearest

LISTS = ("variants", "task", "learning_rates", "factors", "tracker")
"""Options that accept several words in one, separated by commas."""
PAIRS = ("set", "space", "columns")
"""Options of NAME=VALUE words, which a file or Python may give as a mapping."""
_RULES = {int: "must be a whole number", float: "must be a number", bool: "must be true or false"}


def field_name(key: str, options_class: type[Any]) -> str:
    """Return the name of the field of an option.

    Args:
        key: The option in any spelling: `learning-rates`, `--learning_rates`.
        options_class: The class of the options.

    Raises:
        UsageError: There is no such option; the error names the nearest one.
    """
    name = key.removeprefix("--").replace("-", "_")
    names = {each.name for each in fields(options_class)}
    if name in names:
        return name
    raise UsageError(f"{quote_value(key)} is no option here. {suggest_nearest(name, names)}")


def convert(name: str, value: object, options_class: type[Any]) -> Any:
    """Return the value of an option with the type of its field.

    Args:
        name: Name of the field.
        value: Text, a number, a truth value, None, a path, or a list of them; for NAME=VALUE words also a
            mapping.
        options_class: Class of the options.

    Raises:
        UsageError: The value has another type.
    """
    import pydantic

    annotation = get_type_hints(options_class)[name]
    if isinstance(value, Mapping) and name in PAIRS:
        value = [f"{key}={each}" for key, each in value.items()]
    accepted = _accepted(annotation)
    if any(get_origin(each) is tuple for each in accepted):
        words = [value] if isinstance(value, (str, int, float, os.PathLike)) else value
        value = [_text(word) for word in words] if isinstance(words, (list, tuple)) else words
    elif str in accepted and not isinstance(value, bool):
        value = _text(value)
    if value == "" and Path in accepted:
        raise UsageError(f"{name} is empty; name a path, or leave it out.")
    try:
        return pydantic.TypeAdapter(annotation).validate_python(value)
    except pydantic.ValidationError:
        shown = f"{name} has no value;" if value is None else f"{name}: {quote_value(str(value))}"
        raise UsageError(f"{shown} {_rule(name, accepted)}.") from None


def split_lists(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return options (field -> value) in which a word such as `lora,dora` is split at its commas.

    This concerns the options in `LISTS`. A word that is the path of a file is not split.
    """
    return {
        name: tuple(part for word in value for part in _split(word))
        if name in LISTS and isinstance(value, tuple)
        else value
        for name, value in values.items()
    }


def _split(word: str) -> list[str]:
    if "," not in word or os.path.exists(word):
        return [word]
    return [part.strip() for part in word.split(",") if part.strip()]


def _accepted(annotation: Any) -> tuple[Any, ...]:
    """Return the types of a union, or the one type that is none."""
    is_union = get_origin(annotation) in (Union, types.UnionType)
    return get_args(annotation) if is_union else (annotation,)


def _text(value: object) -> object:
    """Return a number or a path as a word of a command line; any other value as it is."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return str(value) if is_number or isinstance(value, os.PathLike) else value


def _rule(name: str, accepted: tuple[Any, ...]) -> str:
    if name in PAIRS:
        return "must be a list of NAME=VALUE, or a mapping"
    for each in accepted:
        if get_origin(each) is tuple:
            return "must be a list of words"
        if get_origin(each) is Literal:
            return f"must be one of: {', '.join(map(str, get_args(each)))}"
        if each in _RULES:
            return _RULES[each]
    return "must be one word"
