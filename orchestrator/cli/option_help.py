"""How `--help` shows the options of all commands: a rule for tyro, in place of a setting for each option."""

from __future__ import annotations

from dataclasses import is_dataclass, replace
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

import tyro
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

TEXT_METAVARS = {
    **dict.fromkeys(("data", "validation_data", "test_data", "on"), "PATH"),
    **dict.fromkeys(("learning_rates", "head_learning_rate"), "RATE"),
    "columns": "ROLE=COLUMN",
    "price_per_gpu_hour": "USD",
    "set": "NAME=VALUE",
    "space": "NAME=SPEC",
    "targets": "LAYERS",
    "template": "TEXT",
    "tracking_uri": "ADDRESS",
}
"""Option -> the word for its value, for texts that are no names."""

OPTION_HELP = ConstructorRegistry()
"""`with OPTION_HELP:` applies the rule to calls of tyro.

A value is shown as one word (`NAME`, `INT`), a list as `NAME [NAME ...]`, and None, which the texts explain,
neither as a value nor as a default. The lines of a text are joined, so that tyro wraps it as a whole.
"""
_in_work: set[Any] = set()
"""Types to which the rule is being applied, and for which tyro's own rule is asked."""


@OPTION_HELP.struct_rule
def _describe_fields(info: StructTypeInfo) -> StructConstructorSpec | None:
    if not is_dataclass(info.type) or info.type in _in_work:
        return None
    _in_work.add(info.type)
    try:
        spec = ConstructorRegistry.get_struct_spec(info)
    finally:
        _in_work.remove(info.type)
    if not isinstance(spec, StructConstructorSpec):
        return None
    return replace(spec, fields=tuple(map(_describe_field, spec.fields)))


def _describe_field(field: StructFieldSpec) -> StructFieldSpec:
    hint: Any = field.type
    if is_dataclass(hint):
        return field  # a group of options
    if get_origin(hint) is not Annotated:  # the others have metavars of their own
        hint = Annotated[hint, tyro.conf.arg(metavar=_metavar(field.name, hint))]
    text = field.helptext() if callable(field.helptext) else field.helptext
    hint = Annotated[
        hint, tyro.conf.arg(help=" ".join((text or "").split()), help_behavior_hint=_describe_default)
    ]
    return replace(field, type=hint)


def _metavar(name: str, hint: Any) -> str | None:
    """Return the word for the value of an option; None for a switch."""
    choices = [each for each in get_args(hint) if each is not NoneType]
    if NoneType in get_args(hint):
        (hint,) = choices
    if hint is bool:
        return None
    if get_origin(hint) is Literal:
        return f"{{{','.join(get_args(hint))}}}"
    if get_origin(hint) is tuple:
        word = _metavar(name, get_args(hint)[0])
        return f"{word} [{word} ...]"
    return TEXT_METAVARS.get(name, "NAME") if hint is str else str(hint.__name__).upper()


def _describe_default(default: str) -> str:
    return "" if default in ("None", "False", "", "''") else f"(default: {default})"
