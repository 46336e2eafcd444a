"""The commands of README.md and the documentation exist, and have the options that are shown with them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from orchestrator import experiments
from orchestrator.cli.commands import COMMANDS
from orchestrator.study.configuration import HYPERPARAMETERS

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
    by_script = {module: name for name, module in experiments.MODULES.items()}
    name = by_script.get(name.removesuffix(".py"), name) if name.endswith(".py") else name
    return experiments.load(name).options_class if name in experiments.MODULES else COMMANDS.get(name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_commands_of_a_page_have_the_options_that_it_shows(page: Path) -> None:
    for command in commands(page):
        words = [word.strip("'[]") for word in re.split(r"\s#", command)[0].split()]
        if not words or words[0].startswith("-"):
            continue
        name, *rest = ["fetch-" + words[1], *words[2:]] if words[0] == "fetch" else words
        options = options_of(name)
        assert options is not None, f"{command!r}: there is no command {name!r}"
        names = [*(field.name for field in fields(options)), *HYPERPARAMETERS]
        known = {"--" + each.replace("_", "-") for each in names} | {"--help"}
        shown = {word.partition("=")[0] for word in rest if word.startswith("--")}
        assert shown <= known, f"{command!r}: {name} has no {', '.join(sorted(shown - known))}"
