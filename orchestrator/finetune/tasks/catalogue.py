"""Tasks by name: each file in a folder beside this module is a task, and a user's Python file can be one."""

from __future__ import annotations

import importlib
import json
import os
import sys
from functools import lru_cache
from pathlib import Path
from types import ModuleType

from orchestrator.finetune.sources import own_files
from orchestrator.finetune.tasks import task_file, user_task
from orchestrator.finetune.tasks.base import Task
from orchestrator.finetune.tasks.data_task import DataTask
from orchestrator.study.configuration import TaskChoice
from orchestrator.util import user_code
from orchestrator.util.errors import UsageError, suggest_nearest
from variants.variant_names import FILE_SUFFIX


def names() -> tuple[str, ...]:
    """Return the names of the built-in tasks; no task is imported."""
    return tuple(sorted(_module_names()))


@lru_cache(maxsize=1)
def _module_names() -> dict[str, str]:
    """Return the module name of each task."""
    files = Path(__file__).parent.glob("*/*.py")
    return {p.stem: f"{__package__}.{p.parent.name}.{p.stem}" for p in files if p.stem != "__init__"}


def load(name: str) -> Task:
    """Return the task that a user has named; a file is read even if another one of its name was before.

    Args:
        name: The name of a built-in task, or the path of a Python file with a task. The name of the task is
            then the name of the file.

    Raises:
        UsageError: There is no such task, or the file contains no valid one.
    """
    if not name.endswith(FILE_SUFFIX):
        return get(name)
    path = os.path.realpath(name)
    code = _read_code(path)
    known = _own_tasks.get(os.path.basename(path))
    if known is not None and (known.source, known.code) == (path, code):
        return known
    return register(_load_file(path, code))


def get(name: str) -> Task:
    """Return a task by its name: a built-in one, or a user's that this process has loaded.

    Args:
        name: The name of the task. The path of a Python file that has not been loaded is read.

    Raises:
        UsageError: There is no such task, or the file contains no valid one.
    """
    if name in _own_tasks:
        return _own_tasks[name]
    return load(name) if name.endswith(FILE_SUFFIX) else _load_builtin_task(name)


def register(task: Task) -> Task:
    """Make a task of the user available to `get` under its name, in place of another one of that name."""
    _own_tasks[task.name] = task
    return task


def find(choice: TaskChoice, folder: Path) -> Task:
    """Return the task of a configuration; a user's file need not exist on this machine.

    Args:
        choice: The task of a configuration.
        folder: The store's folder of prepared data.

    Raises:
        UsageError: There is no such task, or the store has no entry of its content.
    """
    known = _own_tasks.get(choice.name)
    if not choice.content or (known is not None and known.content == choice.content):
        return get(choice.name)
    if (spec := own_files.read_entry(folder, "data", choice.content, "spec")) is not None:
        task: Task = DataTask.from_json(json.loads(spec))
        task.name = choice.name
        return register(task)
    path = own_files.require_entry(folder, "task", choice.name, choice.content, "path")
    code = own_files.require_entry(folder, "task", choice.name, choice.content, "source")
    task = _load_file(path, code)
    if task.content != choice.content:
        raise UsageError(f"The entry of task {choice.name!r} in {folder} holds other code; remove it.")
    task.name = choice.name
    return register(task)


def write_entry(task: Task, folder: Path) -> None:
    """Write a user's task to the store, where `find` reads it on any machine.

    Args:
        task: The task; nothing is written for a built-in one.
        folder: The store's folder of prepared data.
    """
    if task.content:
        kind: own_files.Kind = "data" if isinstance(task, DataTask) else "task"
        own_files.write_entry(folder, kind, task.content, task.entry())


_own_tasks: dict[str, Task] = {}
"""Tasks of the user that this process has loaded, by name."""


def _read_code(path: str) -> str:
    if not os.path.isfile(path):  # Path.is_file raises OSError if a name is too long
        raise UsageError(f"Task file {path!r} does not exist. {suggest_nearest(Path(path).stem, names())}")
    try:
        return Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"Task file {path!r} cannot be read ({error})") from None


def _load_file(path: str, code: str) -> Task:
    with user_code.report_user_errors(path, "does not import"):
        content = task_file.hash_code(code, path)
        module = ModuleType(f"orchestrator_user_task_{content}")
        module.__file__ = path
        sys.modules[module.__name__] = module  # dataclasses look up the module of a class
        exec(compile(code, path, "exec"), vars(module))
    with user_code.report_user_errors(path, "cannot make its task"):
        task = _instantiate_task(module)
        task.name, task.source, task.code, task.content = os.path.basename(path), path, code, content
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
