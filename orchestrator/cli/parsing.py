"""Parsing of command lines: every field of a class of options is an option, which `--help` shows."""

from __future__ import annotations

import argparse
import shutil
import textwrap
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from orchestrator.study.configuration import HYPERPARAMETERS, Hyperparameter
from orchestrator.study.option import defaults, flag, help_texts, sections
from orchestrator.study.options import StudyOptions
from orchestrator.util.errors import UsageError, quote_value, suggest_nearest


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message.removeprefix('argument ')}; {self.prog} --help explains it.")


def parse(options_class: Any, words: Sequence[str], program: str, description: str) -> dict[str, Any]:
    """Return the options that a command line gives: option or hyperparameter -> text, list of texts, or bool.

    `--help` prints the options and ends the process.

    Args:
        options_class: Class of the options.
        words: The words of the command line behind the program.
        program: The program in the usage line and in errors.
        description: The text above the options in `--help`.

    Raises:
        UsageError: An option is unknown, or a word is missing.
    """
    width = shutil.get_terminal_size().columns
    positions = [each.value for each in options_class.declared().values() if each.position]
    parser = _Parser(
        prog=program,
        usage=" ".join(["%(prog)s", *positions, "[options]"]),
        description=_wrap(description, width),
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=6, width=width),
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    wants_help = bool({"-h", "--help"} & set(words))
    texts = help_texts(options_class) if wants_help else {}
    for title, names in sections(options_class).items():
        group = parser.add_argument_group(f"{title} options")
        for name in names:
            place = parser if options_class.declared()[name].position else group
            text = texts.get(name, "").replace("%", "%%")
            hidden = name in options_class.unused
            _add_option(place, options_class, name, argparse.SUPPRESS if hidden else text)
    if issubclass(options_class, StudyOptions):
        _add_hyperparameters(parser, options_class)
    spelled = [
        word.replace("_", "-", word.partition("=")[0].count("_")) if word.startswith("--") else word
        for word in words
    ]
    values, unknown = parser.parse_known_intermixed_args(spelled)
    if unknown:
        _refuse(unknown[0], parser)
    return vars(values)


def _wrap(description: str, width: int) -> str:
    """Return a description whose paragraphs are as wide as the terminal; indented ones stay as they are."""
    parts = description.strip().split("\n\n")
    return "\n\n".join(
        part if part.startswith(" ") else textwrap.fill(part, width, break_on_hyphens=False) for part in parts
    )


def _add_option(group: Any, options_class: Any, name: str, text: str) -> None:
    option, default = options_class.declared()[name], defaults(options_class)[name]
    kind, choices = option.plain_type, option.choices
    if option.position:
        count = "*" if kind is tuple else "?" if "[" in option.value else None
        group.add_argument(name, metavar=option.value.strip("[]"), help=text, nargs=count)
    elif kind is bool:
        group.add_argument(flag(name), action="store_const", const=True, help=text)
        no, hidden = f"--no-{flag(name)[2:]}", argparse.SUPPRESS
        group.add_argument(no, dest=name, action="store_const", const=False, help=hidden)
    else:
        words = {tuple: "NAME", str: "NAME", int: "INT", float: "FLOAT", Path: "PATH"}
        word = option.value or (f"{{{','.join(choices)}}}" if choices else words.get(kind, "NAME"))
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        shown = "" if shown in (None, "") or isinstance(default, Path) else f" (default: {shown})"
        group.add_argument(
            flag(name),
            dest=name,
            metavar=word,
            help=text if text == argparse.SUPPRESS else text + shown,
            **({"nargs": "*", "action": "extend"} if kind is tuple else {}),
        )


def free_hyperparameters(options_class: Any) -> dict[str, Hyperparameter]:
    """Return the hyperparameters that no option of its own sets; each has an option in place of --set."""
    options = options_class.declared()
    taken = {*options, *(each.sets for each in options.values())}
    return {name: each for name, each in HYPERPARAMETERS.items() if name not in taken}


def _add_hyperparameters(parser: argparse.ArgumentParser, options_class: Any) -> None:
    group = parser.add_argument_group("hyperparameter options, in place of --set NAME=VALUE")
    for name, each in free_hyperparameters(options_class).items():
        word = f"{{{','.join(each.choices)}}}" if each.choices else each.value_type.__name__.upper()
        group.add_argument(flag(name), dest=name, metavar=word, help=each.help.replace("%", "%%"))


def _refuse(word: str, parser: argparse.ArgumentParser) -> NoReturn:
    """Raise UsageError for a word that no option takes."""
    name = word.partition("=")[0]
    if name.startswith("--"):
        flags = [each for action in parser._actions for each in action.option_strings]
        near = suggest_nearest(name, flags, otherwise="No other is similar.")
        raise UsageError(f"{quote_value(name)} is no option here. {near} {parser.prog} --help lists all.")
    raise UsageError(f"{quote_value(word)}: no option takes this word; {parser.prog} --help lists them.")
