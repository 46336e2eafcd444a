"""The commands of README.md and the documentation exist, and accept the options that are shown with them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator import experiments
from orchestrator.cli.commands import COMMANDS
from orchestrator.cli.parsing import parse
from orchestrator.study.config import make_options

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


def run_options(name: str, words: list[str]) -> None:
    """Make the options of a command, as the program does before it runs the command."""
    scripts = {f"{module}.py": command for command, module in experiments.MODULES.items()}
    name = scripts.get(name, name.removesuffix(".py"))
    options_class: Any = COMMANDS.get(name) or experiments.options_of(name)
    make_options(options_class, parse(options_class, words, name, ""), name, experiments.options_of)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_commands_of_a_page_have_the_options_that_it_shows(page: Path) -> None:
    for command in commands(page):
        words = shlex.split(command if command.count("'") % 2 == 0 else command[:-1], comments=True)
        if not words or words[0].startswith("-") or "--help" in words:
            continue
        name, *rest = ["fetch-" + words[1], *words[2:]] if words[0] == "fetch" else words
        run_options(name, rest)
