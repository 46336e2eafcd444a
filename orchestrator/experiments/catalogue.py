"""The experiments by name. Every module of this package but this one is an experiment; there is no list.

The module's docstring is the text of `--help`, with its first line as the summary. The module defines
`OPTIONS`, the class of its options, and `run(options, request)` (`run(options)` if it trains nothing), which
returns the exit code. Nothing heavy is imported before `run` is called.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any

import orchestrator.experiments
from orchestrator.study.options import StudyOptions
from orchestrator.study.program_names import command_name


@dataclass(frozen=True)
class ExperimentCommand:
    """An experiment as a command."""

    script: str
    """Name of the module, and of the script in `experiments/` that runs it."""
    description: str
    """The text above the options in `--help`."""
    options_class: type[Any]
    """Class of the options: a subclass of `StudyOptions` if the experiment trains."""
    run: Callable[..., int]
    """Function of the options and, if it trains, of the `StudyRequest`; it returns the exit code."""

    @property
    def name(self) -> str:
        """Name of the command, such as `study`."""
        return command_name(self.script)

    @property
    def summary(self) -> str:
        """The question of the experiment."""
        return self.description.partition("\n")[0]

    @property
    def trains(self) -> bool:
        """True if the experiment is a study, which has records and a report."""
        return issubclass(self.options_class, StudyOptions)


@cache
def experiments() -> MappingProxyType[str, ExperimentCommand]:
    """Return all experiments by the name of their command."""
    found = {}
    for each in pkgutil.iter_modules(orchestrator.experiments.__path__):
        if each.name == __name__.rpartition(".")[2]:
            continue
        module = importlib.import_module(f"{orchestrator.experiments.__name__}.{each.name}")
        command = ExperimentCommand(each.name, inspect.getdoc(module) or "", module.OPTIONS, module.run)
        found[command.name] = command
    return MappingProxyType(found)
