"""Tasks by name: one file in this folder a task. A path to a Python file with a task works as well."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from functools import lru_cache
from pathlib import Path
from types import ModuleType

from orchestrator.finetune import own_task, user_code
from orchestrator.finetune.tasks.base import Task
from orchestrator.study.errors import BadInput, nearest

_NOT_TASKS = {"__init__", "base", "catalogue"}


def names() -> tuple[str, ...]:
    """The tasks that come with the project. Reads file names only."""
    return tuple(sorted({p.stem for p in Path(__file__).parent.glob("*.py")} - _NOT_TASKS))


def get(name: str) -> Task:
    """The task called `name`, or the one in the file `name` (it ends in .py; every worker needs to reach it
    under that path, which is then the task's name). Raises BadInput for a name or file that is none."""
    if name.endswith(".py"):
        # The full path: Ray's workers have working folders of their own.
        return _in_file(Path(os.path.realpath(name)))
    return _in_project(name)


@lru_cache
def _in_file(path: Path) -> Task:
    module = _load_file(path)
    with user_code.told(str(path), "cannot make its task"):
        task = _only_task(module)
        task.name = str(path)
        own_task.check(task)
    return task


@lru_cache
def _in_project(name: str) -> Task:
    if name not in names():
        raise BadInput(
            f"Unknown task {name!r}. {nearest(name, names())} A path to a .py file with a task works too."
        )
    return _only_task(importlib.import_module(f"{__package__}.{name}"))


def _load_file(path: Path) -> ModuleType:
    if not os.path.isfile(path):  # Path.is_file raises OSError for a name that is too long
        raise BadInput(f"Task file {str(path)!r} does not exist. {nearest(path.stem, names())}")
    spec = importlib.util.spec_from_file_location(f"orchestrator_user_task_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up while it is made
    with user_code.told(str(path), "does not import"):
        spec.loader.exec_module(module)
    return module


def _only_task(module: ModuleType) -> Task:
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Task) and value.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise BadInput(
            f"A task file holds exactly one subclass of Task, {module.__file__!r} has {len(found)}."
        )
    return found[0]()
