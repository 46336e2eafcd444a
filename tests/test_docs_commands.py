"""The commands of README.md and the documentation exist, and have the options that are shown with them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli.commands import COMMANDS
from orchestrator.experiments.catalogue import experiments

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHELL_BLOCK = re.compile(r"^ *```sh\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
PROGRAM = re.compile(
    r"(?:(?:^|\s|bin/)lora-orchestrator\s|python -m orchestrator\s|python experiments/(?=\w+\.py))(.*)"
)


def commands(page: Path) -> Iterator[str]:
    """Yield the words behind the program's name, of each command in the page's shell blocks."""
    for block in SHELL_BLOCK.findall(page.read_text()):
        for line in block.replace("\\\n", " ").splitlines():
            if found := PROGRAM.search(line):
                yield found[1]


def options_of(name: str) -> type[Any] | None:
    """Return the class of a command's options; None if there is no such command."""
    by_script = {each.script: each.options_class for each in experiments().values()}
    if name.endswith(".py"):
        return by_script.get(name.removesuffix(".py"))
    if name in experiments():
        return experiments()[name].options_class
    return COMMANDS.get(name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_commands_of_a_page_have_the_options_that_it_shows(page: Path) -> None:
    for command in commands(page):
        words = [word.strip("'[]") for word in re.split(r"\s#", command)[0].split()]
        if not words or words[0].startswith("-"):
            continue
        name, *rest = ["fetch-" + words[1], *words[2:]] if words[0] == "fetch" else words
        options = options_of(name)
        assert options is not None, f"{command!r}: there is no command {name!r}"
        known = {"--" + field.name.replace("_", "-") for field in fields(options)} | {"--help"}
        shown = {word.partition("=")[0] for word in rest if word.startswith("--")}
        assert shown <= known, f"{command!r}: {name} has no {', '.join(sorted(shown - known))}"
