"""The options of a study from a command line, and a run elsewhere when --on asks for one."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import MISSING, field, fields, is_dataclass, make_dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from orchestrator.study.options import CLUSTER_FILE, StudyOptions
from orchestrator.study.presets import complete_options, preset_defaults
from orchestrator.study.retired_options import check_retired_options
from variants import catalogue

Options = TypeVar("Options", bound=StudyOptions)


def parse_options(
    description: str, options_class: type[Options], words: Sequence[str], program: str = ""
) -> Options:
    """Parse the options of a study.

    `--help` and unknown options end the process (exit codes 0 and 2).

    Args:
        description: The text above the options in `--help`.
        options_class: `StudyOptions`, or a subclass with options of the experiment's own.
        words: The words of the command line behind the program.
        program: The program in the usage line; by default the path of the script.

    Raises:
        UsageError: An option was renamed or removed, or has a wrong value.
    """
    check_retired_options(words)
    import tyro

    arguments = tyro.cli(
        grouped_arguments(options_class, find_preset(words)),
        prog=program or None,
        args=list(words),
        description=wrap_description(description),
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
    )
    return flatten_arguments(arguments, options_class)


def run_elsewhere(options: StudyOptions) -> int | None:
    """Run this process's command on a cluster if --on, or the user, asks for it.

    Returns:
        The exit code of the command there; None if it is to run on this machine.

    Raises:
        UsageError: A cluster is up and the command does not say where to run, or it cannot run there.
    """
    if options.on is None and (options.dry_run or options.plan or not Path(CLUSTER_FILE).is_file()):
        return None  # without looking for a cluster, which takes a moment
    from orchestrator.cluster.remote.target import run_if_remote

    return run_if_remote(options)


def wrap_description(description: str) -> str:
    """Return a description whose paragraphs are as wide as the terminal; indented ones stay as they are.

    A leading space in every line keeps tyro from joining them.
    """
    wrapper = textwrap.TextWrapper(
        shutil.get_terminal_size().columns, initial_indent=" ", subsequent_indent=" ", break_on_hyphens=False
    )
    parts = description.strip().split("\n\n")
    return "\n\n".join(part if part.startswith(" ") else wrapper.fill(part) for part in parts)


def find_preset(arguments: Sequence[str]) -> str | None:
    """Return the value of --preset, the last one if there are several; None without one.

    Args:
        arguments: The words of a command line, without the program.
    """
    found = None
    for word, following in pairwise((*arguments, "")):
        option, equals, value = word.partition("=")
        if option == "--preset":
            found = value if equals else following
    return found


def grouped_arguments(options_class: type[StudyOptions], preset: str | None = None) -> type[Any]:
    """Return a dataclass with one field for each group of options.

    tyro shows each field as a titled section. A group is a dataclass among the bases of `options_class`, such
    as `GridOptions`, whose section is called "grid options".

    Args:
        options_class: The options of the script.
        preset: The preset that replaces their defaults.

    Raises:
        UsageError: There is no such preset.
    """
    defaults = {each.name: each.default for each in fields(options_class) if each.default is not MISSING}
    if preset is not None:
        defaults |= preset_defaults(preset, options_class, catalogue.names())
    groups = []
    for group in options_class.__mro__:
        if not is_dataclass(group) or issubclass(group, StudyOptions):
            continue
        values = {each.name: defaults[each.name] for each in fields(group) if each.name in defaults}
        title = group.__name__.removesuffix("Options").lower()
        groups.append((title, group, field(default_factory=partial(group, **values))))
    arguments = make_dataclass(options_class.__name__, groups, frozen=True)
    arguments.__doc__ = options_class.__doc__
    return arguments


def flatten_arguments(arguments: Any, options_class: type[Options]) -> Options:
    """Return the options of a parsed `grouped_arguments(options_class)`.

    Raises:
        UsageError: An option has a wrong value.
    """
    groups = [getattr(arguments, each.name) for each in fields(arguments)]
    values = {each.name: getattr(group, each.name) for group in groups for each in fields(group)}
    return options_class(**complete_options(values, options_class, catalogue.names()))
