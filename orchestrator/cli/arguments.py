"""The options of a study from a command line."""

from __future__ import annotations

import shlex
import shutil
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, field, fields, make_dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from orchestrator.study.config_file import (
    ConfigFile,
    given_values,
    group_title,
    option_groups,
    option_words,
    read_config,
    split_lists,
)
from orchestrator.study.options import StudyOptions
from orchestrator.study.presets import complete_options, preset_defaults
from orchestrator.util.errors import UsageError
from orchestrator.util.redaction import redact_secrets
from variants import catalogue

Options = TypeVar("Options", bound=StudyOptions)


def parse_options(
    description: str, options_class: type[Options], words: Sequence[str], program: str = ""
) -> Options:
    """Parse the options of a study as `parse_with_config` does, and return them without the file."""
    return parse_with_config(description, options_class, words, program)[0]


def parse_with_config(
    description: str, options_class: type[Options], words: Sequence[str], program: str = ""
) -> tuple[Options, ConfigFile | None]:
    """Parse the options of a study, and read the file of --config.

    `--help` ends the process.

    Args:
        description: The text above the options in `--help`.
        options_class: `StudyOptions`, or a subclass with options of the experiment's own.
        words: The words of the command line after the program.
        program: The program in the usage line; by default the path of the script.

    Returns:
        The options, and the file or None.

    Raises:
        UsageError: An option is unknown or has a wrong value, or the file cannot be read.
    """
    import tyro

    from orchestrator.cli.option_parser import parse

    config_path = find_value(words, "--config")
    config = read_config(Path(config_path), options_class) if config_path else None
    arguments_class = grouped_arguments(options_class, find_value(words, "--preset"), config)
    described = wrap_description(f"{description.strip()}\n\n{known_names()}")
    markers = tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff
    arguments = parse(arguments_class, words, program, described, *markers)
    groups = [getattr(arguments, each.name) for each in fields(arguments)]
    values = {each.name: getattr(group, each.name) for group in groups for each in fields(group)}
    try:
        return make_options(values, options_class), config
    except UsageError as error:
        raise (config.locate(error, words) if config else error) from None


def known_names() -> str:
    """Return the names of variants and tasks in two paragraphs, for `--help`."""
    from orchestrator.finetune.tasks import task_names

    tasks = {*task_names.names(), *task_names.entry_points_by_name()}
    return f"Variants: {' '.join(catalogue.names())}\n\nTasks: {' '.join(sorted(tasks))}"


def wrap_description(description: str) -> str:
    """Return a description whose paragraphs are as wide as the terminal; indented ones stay as they are.

    A leading space in every line keeps tyro from joining them.
    """
    wrapper = textwrap.TextWrapper(
        shutil.get_terminal_size().columns, initial_indent=" ", subsequent_indent=" ", break_on_hyphens=False
    )
    parts = description.strip().split("\n\n")
    return "\n\n".join(part if part.startswith(" ") else wrapper.fill(part) for part in parts)


def find_value(words: Sequence[str], wanted: str) -> str | None:
    """Return the value of an option, the last one if there are several; None without one.

    Args:
        words: The words of a command line, without the program.
        wanted: The option, such as `--preset`.
    """
    found = None
    for word, following in pairwise((*words, "")):
        option, equals, value = word.partition("=")
        if option == wanted:
            found = value if equals else following
    return found


def default_values(
    options_class: type[StudyOptions], preset: str | None = None, config: ConfigFile | None = None
) -> dict[str, Any]:
    """Return the defaults of options: field -> value.

    Args:
        options_class: Class of the options.
        preset: Name of the preset that replaces their defaults; None for the one that the file names, if any.
        config: File whose values replace those of the preset.

    Raises:
        UsageError: There is no such preset.
    """
    defaults = {each.name: each.default for each in fields(options_class) if each.default is not MISSING}
    values = config.values if config else {}
    if name := preset or values.get("preset"):
        try:
            defaults |= preset_defaults(name, options_class, catalogue.names())
        except UsageError as error:
            raise (config.locate(error, ()) if config and not preset else error) from None
    return {**defaults, **values}


def grouped_arguments(
    options_class: type[StudyOptions], preset: str | None = None, config: ConfigFile | None = None
) -> type[Any]:
    """Return a dataclass with one field for each group of options.

    tyro shows each field as a titled section. A group is a dataclass among the bases of `options_class`, such
    as `GridOptions`, whose section is called "grid options".

    Args:
        options_class: The options of the experiment.
        preset: The preset that replaces their defaults.
        config: The file that replaces their defaults.

    Raises:
        UsageError: There is no such preset.
    """
    defaults = default_values(options_class, preset, config)
    groups = []
    for group in option_groups(options_class):
        values = {each.name: defaults[each.name] for each in fields(group) if each.name in defaults}
        make: Callable[..., Any] = group
        groups.append((group_title(group), group, field(default_factory=partial(make, **values))))
    arguments = make_dataclass(options_class.__name__, groups, frozen=True)
    arguments.__doc__ = options_class.__doc__
    return arguments


def make_options(values: Mapping[str, Any], options_class: type[Options]) -> Options:
    """Build options from the values of all fields, and check them.

    Args:
        values: Field -> value, with the defaults of `default_values` for options that were not given.
        options_class: Class of the options.

    Raises:
        UsageError: An option has a wrong value.
    """
    return options_class(**complete_options(split_lists(values), options_class, catalogue.names()))


def repeatable_command(program: str, options: StudyOptions) -> str:
    """Return a command line with these options, however they were given; secrets are redacted.

    Values of the --config file are written as options, and --config itself is left out.

    Args:
        program: The words before the options.
        options: The options.
    """
    given = given_values(options, catalogue.names())
    words = option_words({name: value for name, value in given.items() if name != "config"})
    return shlex.join([*shlex.split(program), *map(redact_secrets, words)])
