"""A wrong value of any option of any command is refused in one line that names the option and the value."""

from __future__ import annotations

from pathlib import Path
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
    """Return a text that the option refuses, whatever the other options are."""
    option = options_class.declared()[name]
    if option.choices or option.plain_type in (int, float, bool):
        return "wrong"
    return "" if option.plain_type is not Path or name != "config" else "none.yaml"


def positions(options_class: Any) -> dict[str, str]:
    return {name: "x" for name, option in options_class.declared().items() if option.position}


CASES = [
    (command, name)
    for command, each in CLASSES.items()
    for name in defaults(each)
    if name not in positions(each)
    if each.declared()[name].plain_type is not str  # looked up later, in other tests
]


@pytest.mark.parametrize(("command", "name"), CASES)
def test_a_wrong_value_is_one_line(command: str, name: str) -> None:
    options_class = CLASSES[command]
    typed = {**positions(options_class), name: wrong_value(options_class, name)}
    with pytest.raises(UsageError) as refused:
        make_options(options_class, typed, command)
    (line,) = str(refused.value).splitlines()
    assert flag(name) in line
