"""Tasks by name: each file in a folder beside this module is a task, and a user's Python file can be one."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from functools import lru_cache
from pathlib import Path
from types import ModuleType

from orchestrator.finetune.tasks import user_task
from orchestrator.finetune.tasks.base import Task
from orchestrator.util import user_code
from orchestrator.util.errors import UsageError, suggest_nearest


def names() -> tuple[str, ...]:
    """Return the names of the built-in tasks; no task is imported."""
    return tuple(sorted(_module_names()))


@lru_cache(maxsize=1)
def _module_names() -> dict[str, str]:
    """Return the module name of each task."""
    files = Path(__file__).parent.glob("*/*.py")
    return {p.stem: f"{__package__}.{p.parent.name}.{p.stem}" for p in files if p.stem != "__init__"}


def get(name: str) -> Task:
    """Return a task.

    Args:
        name: The name of a built-in task, or the path of a Python file with a task. The path becomes the name
            of the task, and every worker has to reach the file by it.

    Raises:
        UsageError: There is no such task, or the file contains no valid one.
    """
    if name.endswith(".py"):
        # The full path, since Ray's workers have working folders of their own.
        return _load_user_task(Path(os.path.realpath(name)))
    return _load_builtin_task(name)


@lru_cache
def _load_user_task(path: Path) -> Task:
    module = _import_file(path)
    with user_code.report_user_errors(str(path), "cannot make its task"):
        task = _instantiate_task(module)
        task.name = str(path)
        user_task.check(task)
    return task


@lru_cache
def _load_builtin_task(name: str) -> Task:
    if name not in names():
        raise UsageError(
            f"Unknown task {name!r}. {suggest_nearest(name, names())} A path to a .py file with a task "
            "works, too."
        )
    return _instantiate_task(importlib.import_module(_module_names()[name]))


def _import_file(path: Path) -> ModuleType:
    if not os.path.isfile(path):  # Path.is_file raises OSError if a name is too long
        raise UsageError(f"Task file {str(path)!r} does not exist. {suggest_nearest(path.stem, names())}")
    spec = importlib.util.spec_from_file_location(f"orchestrator_user_task_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up the module of a class
    with user_code.report_user_errors(str(path), "does not import"):
        spec.loader.exec_module(module)
    return module


def _instantiate_task(module: ModuleType) -> Task:
    classes = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Task) and value.__module__ == module.__name__
    ]
    if len(classes) != 1:
        raise UsageError(
            f"A task file must contain exactly one subclass of Task, {module.__file__!r} has {len(classes)}."
        )
    return classes[0]()
