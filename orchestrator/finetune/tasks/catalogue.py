"""Tasks by name, and users' tasks and variants in the store.

A name is that of an entry of `tasks.toml`, of an entry point of a package, or of a user's file.

The name of an entry of the store contains a hash of the user's file, which is part of the configuration. A
worker on another machine therefore finds the code of a task or a variant, or the description of a user's
data, without the file. A study writes the entries before it trains:

    <store>/data/task-3f9c0a1b2c3d4e5f.json       <store>/data/variant-77aa10c9b2e4d5f6.json
"""

from __future__ import annotations

import json
import os
import sys
import tokenize
import tomllib
from collections.abc import Mapping
from functools import lru_cache, partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal

from orchestrator.finetune.tasks import entry_points_by_name as entry_points_by_name
from orchestrator.finetune.tasks import names as names
from orchestrator.finetune.tasks import read_tasks, user_task
from orchestrator.finetune.tasks.base import Task
from orchestrator.finetune.tasks.data_task import DataTask
from orchestrator.study.configuration import TaskChoice, VariantChoice
from orchestrator.util.atomic_files import KeyedFolder
from orchestrator.util.errors import UsageError, report_user_errors, suggest_nearest
from variants import catalogue as variants
from variants.catalogue import check_own_imports, execute, find_class, hash_code, hash_source
from variants.errors import UnsupportedError
from variants.variant_settings import FILE_SUFFIX

if TYPE_CHECKING:
    from variants.api import Variant

Kind = Literal["task", "variant"]
"""What an entry of the store describes: the code of a task or a user's data, or the code of a variant."""

UNHASHED_ATTRIBUTES = {"title", "defaults", "default_model"}
"""Attributes of a task that do not change what a configuration computes."""
hash_task_code = partial(hash_code, unhashed=UNHASHED_ATTRIBUTES)
"""Return the hash of the code in a task file (see `variants.catalogue.hash_code`)."""

ENTRY_SUFFIX = ".toml"
"""End of the path of a file with a task as an entry."""
_BYTES_AS_TEXT = "latin-1"
"""An encoding that turns any bytes into text and back: a file may have any encoding and line ends."""


def load(name: str) -> Task:
    """Return the task that a user has named. A file is read anew each time.

    Args:
        name: The name of a built-in task or of an entry point, or the path of a file with a task: a Python
            file with a class, or a TOML file with an entry. The task of a file is called like the file.

    Raises:
        UsageError: There is no such task, or the file contains no valid one.
    """
    if not name.endswith((FILE_SUFFIX, ENTRY_SUFFIX)):
        return get(name)
    # Read again, although the code may be known: the task has cached its data, which may have changed.
    path = os.path.realpath(name)
    code = _read_code(path)
    if path.endswith(FILE_SUFFIX):
        with report_user_errors(path, "does not import"):
            check_own_imports(code, path)
    return register(_load_file(path, code))


def get(name: str) -> Task:
    """Return a task by its name: a built-in one, an entry point's, or a user's that this process has loaded.

    Args:
        name: The name of the task. The path of a file that has not been loaded is read.

    Raises:
        UsageError: There is no such task, or the file contains no valid one.
    """
    if name in _own_tasks:
        return _own_tasks[name]
    if name.endswith((FILE_SUFFIX, ENTRY_SUFFIX)):
        return load(name)
    if name in entry_points_by_name() and name not in names():
        return register(_load_entry_point(name))
    return _load_builtin_task(name)


def register(task: Task) -> Task:
    """Register a user's task for `get` under its name, in place of an earlier one, and return it."""
    _own_tasks[task.name] = task
    return task


def find(choice: TaskChoice, folder: Path) -> Task:
    """Return the task of a configuration.

    A user's file need not exist on this machine: it is made of its entry in the store. A package with the
    task must be installed.

    Args:
        choice: The task of a configuration.
        folder: The store's folder of prepared data.

    Raises:
        UsageError: There is no such task, the store has no entry of its content, or the installed package has
            another version of it.
    """
    known = _own_tasks.get(choice.name)
    if not choice.content or (known is not None and known.content == choice.content):
        return get(choice.name)
    if choice.name in entry_points_by_name():
        installed = get(choice.name)
        if installed.content != choice.content:
            raise UsageError(
                f"Task {choice.name!r} ({installed.source}) has other code here than where the study "
                "was started; install one version of its package on all machines."
            )
        return installed
    entry = _read_entry(folder, "task", choice.name, choice.content)
    if "spec" in entry:
        task: Task = DataTask.from_json(json.loads(entry["spec"]))
    else:
        path, code = entry["path"], entry["source"]
        if _hash_file(code, path) != choice.content:  # before anything is executed
            raise UsageError(f"The entry of task {choice.name!r} in {folder} holds other code; remove it.")
        task = _load_file(path, code)
    task.name = choice.name
    return register(task)


def write_entry(task: Task, folder: Path) -> None:
    """Write a user's task to the store, where `find` reads it on any machine.

    Args:
        task: The task; nothing is written for a built-in one and for one of an installed package.
        folder: The store's folder of prepared data.
    """
    if task.content and task.name not in entry_points_by_name():
        _write_entry(folder, "task", task.content, task.entry())


def find_variant(choice: VariantChoice, folder: Path) -> Variant:
    """Return the variant of a configuration. The user's file of a variant need not be on this machine.

    Args:
        choice: The variant of a configuration.
        folder: The store's folder of prepared data.

    Raises:
        UsageError: The store has no entry of the variant's content.
        ValueError: There is no such variant, or it cannot be imported.
    """
    if not choice.name.endswith(FILE_SUFFIX) or variants.loaded_revision(choice.name) == choice.revision:
        return variants.get(choice.name)
    entry = _read_entry(folder, "variant", choice.name, choice.revision)
    source = entry["source"].encode(_BYTES_AS_TEXT)
    if hash_source(source) != choice.revision:  # before anything is executed
        raise UsageError(f"The entry of variant {choice.name!r} in {folder} holds other code; remove it.")
    return variants.load(str(Path(entry["path"]).with_name(choice.name)), source)


def write_variant(choice: VariantChoice, folder: Path) -> None:
    """Write the variant of a configuration to the store, where `find_variant` reads it on any machine.

    Args:
        choice: The variant. Only a user's variant that this process has loaded is written.
        folder: The store's folder of prepared data.
    """
    if choice.name.endswith(FILE_SUFFIX):
        variant = variants.get(choice.name)
        data = {"path": variant.source_path, "source": variant.source_code.decode(_BYTES_AS_TEXT)}
        _write_entry(folder, "variant", choice.revision, data)


def _write_entry(folder: Path, kind: Kind, content: str, data: Mapping[str, str]) -> None:
    """Write an entry, in place of one for a file with other comments: their content hash is equal."""
    entries, key = _entries(folder, kind), f"{kind}-{content}"
    if entries.read_fields(key) != data:
        entries.write_entry(key, data, "path", replace=True)


def _read_entry(folder: Path, kind: Kind, name: str, content: str) -> dict[str, str]:
    entry = _entries(folder, kind).read_fields(f"{kind}-{content}")
    if entry is None:
        raise UsageError(
            f"The {kind} {name!r} with content {content} is not in {folder}: run the study's command on a "
            "machine that has the file."
        )
    return entry


def _entries(folder: Path, kind: Kind) -> KeyedFolder:
    return KeyedFolder(folder, f"a {kind}'s file", "remove it: the study's command writes it again")


_own_tasks: dict[str, Task] = {}
"""Tasks of the user that this process has loaded, by name."""


def _read_code(path: str) -> str:
    if not os.path.isfile(path):  # Path.is_file raises OSError if a name is too long
        raise UsageError(f"Task file {path!r} does not exist. {suggest_nearest(Path(path).stem, names())}")
    try:
        with tokenize.open(path) as file:  # in the encoding that the file declares
            return file.read()
    except (OSError, UnicodeDecodeError, SyntaxError) as error:
        raise UsageError(f"Task file {path!r} cannot be read ({error})") from None


def _load_file(path: str, code: str) -> Task:
    with report_user_errors(path, "does not import"):
        content = _hash_file(code, path)
    if path.endswith(ENTRY_SUFFIX):
        task = user_task.make_task(os.path.basename(path), _parse_entry(code, path))
    else:
        with report_user_errors(path, "does not import"):
            module = execute(path, code, content)
        with report_user_errors(path, "cannot make its task"):
            task = _instantiate_task(module)
    with report_user_errors(path, "cannot make its task"):
        task.name, task.source, task.code, task.content = os.path.basename(path), path, code, content
        user_task.check(task)
    return task


def _hash_file(code: str, path: str) -> str:
    if path.endswith(ENTRY_SUFFIX):
        return user_task.hash_entry(os.path.basename(path), _parse_entry(code, path))
    return hash_task_code(code, path)


def _parse_entry(code: str, path: str) -> Mapping[str, object]:
    try:
        entry = tomllib.loads(code)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"Task file {path!r} is no TOML: {error}.") from None
    if "class" in entry:
        raise UsageError(f"Task file {path!r}: class is for tasks of this project; a class is a .py file.")
    return entry


def _load_entry_point(name: str) -> Task:
    entry = entry_points_by_name()[name]
    with report_user_errors(entry.value, "cannot be loaded"):
        loaded = entry.load()
        if not (isinstance(loaded, type) and issubclass(loaded, Task)):
            raise UsageError(f"Task {name!r} ({entry.value}) is no subclass of Task.")
        task = loaded()
        path = str(sys.modules[loaded.__module__].__file__)
        content = hash_task_code(_read_code(path), path)
        task.name, task.source, task.content = name, path, content
        user_task.check(task)
    return task


@lru_cache
def _load_builtin_task(name: str) -> Task:
    if name not in names():
        known = (*names(), *entry_points_by_name())
        raise UsageError(
            f"Unknown task {name!r}. {suggest_nearest(name, known)} A path to a .py or .toml file "
            "with a task works, too."
        )
    return user_task.make_task(name, read_tasks()[name])


def _instantiate_task(module: ModuleType) -> Task:
    try:
        return find_class(module, Task)()
    except UnsupportedError as error:
        raise UsageError(f"Task file {error}.") from None
