"""A wrong value of any option of any command is refused in one line that names the option and the value."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator import experiments
from orchestrator.cli.commands import COMMANDS
from orchestrator.study.config import make_options
from orchestrator.study.option import defaults, flag
from orchestrator.util.errors import UsageError

CLASSES: dict[str, Any] = {
    **{name: experiments.load(name).options_class for name in experiments.MODULES},
    **COMMANDS,
}


def wrong_value(options_class: Any, name: str) -> str:
    """Return a text that the option refuses, whatever the other options are: a word, or none."""
    option = options_class.declared()[name]
    return "wrong" if option.choices or option.plain_type in (int, float, bool) else ""


def positions(options_class: Any) -> dict[str, str]:
    return {name: "x" for name, option in options_class.declared().items() if option.position}


CASES = {
    (each.declared()[name], name): command
    for command, each in CLASSES.items()
    for name in defaults(each)
    if name not in positions(each)
}


@pytest.mark.parametrize(("command", "name"), [(command, name) for (_, name), command in CASES.items()])
def test_a_wrong_value_is_one_line(command: str, name: str) -> None:
    options_class = CLASSES[command]
    value = wrong_value(options_class, name)
    with pytest.raises(UsageError) as refused:
        make_options(options_class, {**positions(options_class), name: value}, command)
    (line,) = str(refused.value).splitlines()
    assert flag(name) in line
    assert repr(value) in line or (not value and "is empty" in line)
