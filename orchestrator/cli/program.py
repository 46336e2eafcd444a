"""The program `lora-orchestrator`, which is also `python -m orchestrator`: its commands and its help.

The libraries that a command needs are imported after a status line, so that a terminal shows at once that the
program has begun.
"""

from __future__ import annotations

import atexit
import gc
import inspect
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import NoReturn

import orchestrator
from orchestrator.util import command
from orchestrator.util.command import PROGRAM, format_command, print_status
from orchestrator.util.errors import UsageError, suggest_nearest

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


def main(experiment: str = "") -> NoReturn:
    """Run the program with the command line of this process, and end the process.

    Args:
        experiment: Name of the command of a script in `experiments/`; empty if the first word names it.
    """
    atexit.register(gc.freeze)  # the search for garbage in the modules of Ray and torch would take 2 s
    command.main(lambda: _run_script(experiment) if experiment else run_program())


def _run_script(experiment: str) -> int:
    from orchestrator import experiments

    experiments.use_script(experiment, sys.argv[0])
    return run_command(experiment, sys.argv[1:], _program())


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
        if words[1:2] != ["model"] and not set(HELP_OPTIONS) & set(words):
            raise UsageError(f"{' '.join(words[:2])}: write `fetch model NAME`.")
        words = ["fetch-model", *words[2:]] if words[1:2] == ["model"] else ["fetch-model", "--help"]
    return run_command(words[0], words[1:], f"{_program()} {_typed_name(words[0])}")


def run_command(name: str, words: Sequence[str], program: str) -> int:
    """Run a command.

    Args:
        name: Name of the command.
        words: The words of the command line after the name.
        program: The words before the options, for `--help` and errors.

    Returns:
        The exit code.

    Raises:
        UsageError: There is no such command, or one of its options is wrong.
    """
    wants_help = bool(set(HELP_OPTIONS) & set(words))
    if not wants_help:
        print_status("Reading libraries, data, models and records ...")
    from orchestrator import experiments
    from orchestrator.cli.commands import COMMANDS
    from orchestrator.cli.parsing import parse
    from orchestrator.study.config import make_options

    if name in COMMANDS:
        description = (inspect.getdoc(COMMANDS[name]) or "").replace(f"{PROGRAM} {name}", program)
        typed = parse(COMMANDS[name], words, program, description)
        return int(make_options(COMMANDS[name], typed)[0].run())
    if name not in experiments.MODULES:
        choices = [_typed_name(each) for each in (*experiments.MODULES, *COMMANDS)]
        raise UsageError(f"{name!r} is no command of {_program()}. {suggest_nearest(name, choices)}")
    experiment = experiments.load(name)
    description = experiment.description.strip().replace(f"{PROGRAM} {name}", program)
    if wants_help:
        description += f"\n\n{_known_names()}"
    typed = parse(experiment.options_class, words, program, description)
    options, file = make_options(experiment.options_class, typed, name, experiments.options_of)
    from orchestrator.launch.run import run_study

    try:
        return run_study(experiment, options, "" if file else format_command(sys.argv)).exit_code
    except UsageError as error:
        raise (file.locate(error, typed) if file else error) from None


def _known_names() -> str:
    """Return the names of variants and tasks in two paragraphs, for `--help`."""
    from orchestrator.finetune.tasks import entry_points_by_name, names
    from variants import catalogue

    tasks = {*names(), *entry_points_by_name()}
    return f"Variants: {' '.join(catalogue.names())}\n\nTasks: {' '.join(sorted(tasks))}"


def _program() -> str:
    """Return the program as it was typed: `lora-orchestrator`, `python -m orchestrator` or a script."""
    return format_command(sys.argv[:1])


def _overview() -> str:
    """Return the text of `lora-orchestrator --help`."""
    from orchestrator import experiments
    from orchestrator.cli.commands import COMMANDS

    questions = {name: experiments.load(name).question for name in experiments.MODULES}
    texts = {_typed_name(name): inspect.getdoc(each) or "" for name, each in COMMANDS.items()}
    summaries = {name: text.partition("\n")[0] for name, text in texts.items()}
    lines = [_FIRST_STEPS.format(program=_program()), "Experiments, each a question:", *_table(questions)]
    lines += ["", "Commands:", *_table(summaries), "", f"{_program()} COMMAND --help explains one."]
    return "\n".join(lines)


def _typed_name(name: str) -> str:
    """Return the name of a command as one types it: `fetch model` for `fetch-model`."""
    return name.replace("fetch-", "fetch ")


def _table(texts: Mapping[str, str]) -> Iterator[str]:
    width = max(map(len, texts))
    for name, text in texts.items():
        yield textwrap.fill(
            text,
            min(100, shutil.get_terminal_size().columns),
            initial_indent=f"  {name:{width}}  ",
            subsequent_indent=" " * (width + 4),
        )
