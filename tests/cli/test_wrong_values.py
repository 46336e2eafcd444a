"""A wrong value of any option of any command is refused in one line that names the option and the value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator import experiments
from orchestrator.cli.commands import COMMANDS
from orchestrator.study.config import make_options
from orchestrator.study.option import choices_of, defaults, flag, option_of, plain_type
from orchestrator.util.errors import UsageError

CLASSES: dict[str, Any] = {
    **{name: experiments.load(name).options_class for name in experiments.MODULES},
    **COMMANDS,
}


def wrong_value(options_class: Any, name: str) -> str:
    """Return a text that the option refuses, whatever the other options are."""
    if choices_of(options_class, name) or plain_type(options_class, name) in (int, float, bool):
        return "wrong"
    return "" if plain_type(options_class, name) is not Path or name != "config" else "none.yaml"


def positions(options_class: Any) -> dict[str, str]:
    return {name: "x" for name in defaults(options_class) if option_of(options_class, name).position}


CASES = [
    (command, name)
    for command, each in CLASSES.items()
    for name in defaults(each)
    if name not in positions(each) and plain_type(each, name) is not str  # looked up later, in other tests
]


@pytest.mark.parametrize(("command", "name"), CASES)
def test_a_wrong_value_is_one_line(command: str, name: str) -> None:
    options_class = CLASSES[command]
    typed = {**positions(options_class), name: wrong_value(options_class, name)}
    with pytest.raises(UsageError) as refused:
        make_options(options_class, typed, command)
    (line,) = str(refused.value).splitlines()
    assert flag(name) in line
