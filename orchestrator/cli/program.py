"""The program `lora-orchestrator`, which is also `python -m orchestrator`: its commands and its help.

The libraries that a command needs are imported after a status line, so that a terminal shows at once that the
program has begun.
"""

from __future__ import annotations

import inspect
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import orchestrator
from orchestrator.util.errors import UsageError, suggest_nearest
from orchestrator.util.graceful_interrupts import PROGRAM, format_command, print_status

if TYPE_CHECKING:
    from orchestrator.study.config_file import ConfigFile

HELP_OPTIONS, VERSION_OPTIONS = ("-h", "--help"), ("--version", "-V")
_FIRST_STEPS = """\
Train LoRA and its variants, tune them alike, and report which one is better.

Type first:
  {program} study --dry-run     a small study here, in minutes
  {program} study --help        options: --variants, --task, ...
  {program} study --plan        what it would train, time, price
  {program} study --data A.csv  a study on data of your own
  {program} check               do these machines suffice?
  {program} study               the study; repeat it after a crash
"""


def run_program() -> int:
    """Run the command that this process's command line names, and return the exit code.

    Raises:
        UsageError: There is no such command, or one of its options is wrong.
    """
    words = sys.argv[1:]
    if not words or words[0] in HELP_OPTIONS:
        print(_overview())
        return 0
    if words[0] in VERSION_OPTIONS:
        print(f"{PROGRAM} {orchestrator.__version__}")
        return 0
    if words[0] == "fetch":
        if not words[1:] or words[1] in HELP_OPTIONS:
            print(_fetch_usage())
            return 0
        if words[1] != "model":
            raise UsageError(f"fetch {words[1]}: write `fetch model NAME`.")
        words = ["fetch-model", *words[2:]]
    return run_command(words[0], words[1:], f"{_program()} {_typed_name(words[0])}")


def run_script(command: str) -> int:
    """Run an experiment with the options of this process's command line: for the scripts in `experiments/`.

    Args:
        command: Name of the experiment's command, such as `study`.

    Returns:
        The exit code.

    Raises:
        UsageError: An option is wrong.
    """
    return run_command(command, sys.argv[1:], _program())


def run_command(name: str, words: Sequence[str], program: str) -> int:
    """Run a command.

    Args:
        name: Name of the command.
        words: The words of the command line after the name.
        program: The words before the options, for `--help` and for the command that a study stores.

    Returns:
        The exit code.

    Raises:
        UsageError: There is no such command, or one of its options is wrong.
    """
    if not set(HELP_OPTIONS) & set(words):
        print_status("Reading libraries, data, models and records ...")
    from orchestrator.cli.commands import COMMANDS
    from orchestrator.experiments.catalogue import experiments

    if name in COMMANDS:
        return int(_parse(COMMANDS[name], inspect.getdoc(COMMANDS[name]) or "", words, program).run())
    if name not in experiments():
        choices = [_typed_name(each) for each in (*experiments(), *COMMANDS)]
        raise UsageError(f"{name!r} is no command of {_program()}. {suggest_nearest(name, choices)}")
    experiment = experiments()[name]
    description = experiment.description.replace(f"{PROGRAM} {name}", program)
    if not experiment.trains:
        return experiment.run(_parse(experiment.options_class, description, words, program))
    from orchestrator.cli.arguments import parse_with_config, repeatable_command

    options, config = parse_with_config(description, experiment.options_class, words, program)
    with _located_errors(config, words):
        from orchestrator.launch.experiment import StudyRequest

        # The command that is stored does not depend on a file that may change or be moved.
        command = repeatable_command(program, options) if options.config else ""
        return experiment.run(options, StudyRequest(options, command))


@contextmanager
def _located_errors(config: ConfigFile | None, words: Sequence[str]) -> Iterator[None]:
    """Name the line of the --config file in a UsageError about an option that the file sets."""
    try:
        yield
    except UsageError as error:
        if config is None:
            raise
        raise config.locate(error, words) from None


def _parse(options_class: type[Any], description: str, words: Sequence[str], program: str) -> Any:
    """Parse the options of a command, of any class, and return an object of the class."""
    from orchestrator.cli.arguments import parse_options, wrap_description
    from orchestrator.study.options import StudyOptions

    if issubclass(options_class, StudyOptions):
        return parse_options(description, options_class, words, program)
    from orchestrator.cli.option_parser import parse

    return parse(options_class, words, program, wrap_description(description))


def _program() -> str:
    """Return the program as it was typed: `lora-orchestrator`, `python -m orchestrator` or a script."""
    return format_command(sys.argv[:1])


def _overview() -> str:
    """Return the text of `lora-orchestrator --help`."""
    from orchestrator.cli.commands import COMMANDS
    from orchestrator.experiments.catalogue import experiments

    studies = {name: each.summary for name, each in experiments().items()}
    lines = [_FIRST_STEPS.format(program=_program()), "Experiments, each a question:", *_table(studies)]
    lines += [
        "",
        "Commands:",
        *_table(_summaries(COMMANDS)),
        "",
        f"{_program()} COMMAND --help explains one.",
    ]
    return "\n".join(lines)


def _fetch_usage() -> str:
    """Return the text of `lora-orchestrator fetch --help`."""
    from orchestrator.cli.commands import COMMANDS

    summaries = _summaries({"fetch-model": COMMANDS["fetch-model"]})
    usage = f"usage: {_program()} fetch model NAME\n"
    return "\n".join([usage, *_table(summaries), "", f"{_program()} fetch model --help explains it."])


def _summaries(commands: Mapping[str, type[Any]]) -> dict[str, str]:
    """Return the first line of the description of each command, by the name that one types."""
    return {
        _typed_name(name): (inspect.getdoc(each) or "").partition("\n")[0] for name, each in commands.items()
    }


def _typed_name(command: str) -> str:
    """Return the name of a command as one types it: `fetch model` for `fetch-model`."""
    return command.replace("fetch-", "fetch ")


def _table(texts: dict[str, str]) -> Iterator[str]:
    width = max(map(len, texts))
    for name, text in texts.items():
        yield textwrap.fill(
            text,
            min(100, shutil.get_terminal_size().columns),
            initial_indent=f"  {name:{width}}  ",
            subsequent_indent=" " * (width + 4),
        )


def main() -> NoReturn:
    """Run the program and end the process: the entry point of `lora-orchestrator`."""
    from orchestrator.util.command import main

    main(run_program)
