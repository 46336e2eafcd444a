"""The experiments by name. Every module of this package but this one is an experiment; there is no list.

The docstring of such a module is the text of `--help`, and its first line is the summary. The module defines

- `OPTIONS`, the class of its options;
- `run(options, request)`, or `run(options)` if the experiment trains nothing: it runs the experiment, or
  prints the plan with `--plan`, and returns the exit code. `request` is the `StudyRequest` of the command
  line or of Python. It raises UsageError if an option does not fit, and StudyError if something outside the
  study fails.

Nothing heavy is imported before `run` is called.
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

_NAMES = {"lr_sensitivity": "study", "tuned_comparison": "tuned", "hyperparameter_sensitivity": "sensitivity"}
"""Module -> name of the command, where they differ."""


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
    """The function `run` of the module."""

    @property
    def name(self) -> str:
        """Name of the command, such as `study`."""
        return _NAMES.get(self.script, self.script)

    @property
    def summary(self) -> str:
        """The first line of the description, which is the question of the experiment."""
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
