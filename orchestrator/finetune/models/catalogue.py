"""Base models by name: where they are, what they contain, and how they are prepared.

A name is one of
- `<task>-base`: the small base model that a task pretrains itself (`letters-base`);
- `smollm2-135m`, `minilm-l6`: real models from Python packages (`smollm2`, `minilm`);
- the path of a folder with a transformers model and its tokenizer or image processor;
- `organisation/model` or `organisation/model@revision` of the Hugging Face hub (`sources.hub_models`).

A configuration names a model's content as well: a hash of its files, or a hub commit. `root` is the store's
folder `bases` (`sources.base_store`).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from orchestrator.finetune.models import minilm, smollm2, weight_files
from orchestrator.finetune.sources import base_store, hub_models
from orchestrator.finetune.tasks import catalogue as task_catalogue
from orchestrator.finetune.tasks.base import Task
from orchestrator.study.configuration import ModelChoice
from orchestrator.util.errors import UsageError, suggest_nearest

UNPREPARED = "not prepared yet"
"""The content that a plan names for a base model that is not prepared. No record has it."""

PACKAGED_MODELS = {smollm2.NAME: smollm2, minilm.NAME: minilm}
"""Models in Python packages, as modules with NAME, RECIPE and `build(folder, progress)`."""


def built_in_names() -> tuple[str, ...]:
    """Return the names of the base models that come with the project."""
    return (*task_bases(), *PACKAGED_MODELS)


def task_bases() -> dict[str, Task]:
    """Return the tasks that pretrain a base model, by the name of that model."""
    tasks = [task_catalogue.get(name) for name in task_catalogue.names()]
    return {f"{task.name}-base": task for task in tasks if task.pretrain_recipe()}


def find_content(name: str, root: Path) -> str | None:
    """Find the content of a base model without preparing it.

    Args:
        name: The model's name.
        root: The folder of prepared models.

    Returns:
        The SHA-256 of its files or its hub commit; None if the model must be prepared first.

    Raises:
        UsageError: There is no such model, its weight files cannot be loaded, or a package is missing without
            which it cannot be prepared.
    """
    if (task := task_bases().get(name)) is not None:
        return base_store.find_base(root, name, task.pretrain_recipe())
    if name in PACKAGED_MODELS:
        content = base_store.find_base(root, name, PACKAGED_MODELS[name].RECIPE)
        if content is None and name == smollm2.NAME:
            smollm2.check_requirements()  # it could not be prepared: a plan must say so as well
        return content
    if os.path.isdir(name):  # Path.is_dir raises OSError for a name that is too long
        weight_files.check_weight_files(Path(name), name)  # before all files are read for the hash
        return base_store.content_hash(Path(name))
    if hub_models.is_hub_name(name):
        commit = hub_models.pinned_commit(name, root)
        if commit is not None and (cached := hub_models.cached_snapshot(name, commit)) is not None:
            weight_files.check_weight_files(cached, name, complete=False)
        return commit
    raise UsageError(
        f"Unknown model {name!r}: no such folder, nor a name known here. "
        f"{suggest_nearest(name, built_in_names())} A hub model is written organisation/model."
    )


def prepare_base_model(name: str, root: Path, progress: Callable[[str], None] = print) -> str:
    """Find a base model or make it: pretrain, download, or pin it to a hub commit.

    Two processes may prepare the same model at once; one of them makes it.

    Args:
        name: The model's name.
        root: The folder of prepared models.
        progress: Called with one line before each step that takes long.

    Returns:
        The content of the model, as `find_content` does.

    Raises:
        UsageError: The model cannot be prepared.
    """
    content = find_content(name, root)
    if (task := task_bases().get(name)) is not None:
        return content or prepare_task_base_model(task, root, progress)
    if (package := PACKAGED_MODELS.get(name)) is not None:
        make = partial(package.build, progress=progress)
        return content or base_store.get_or_create_base(root, name, package.RECIPE, make)
    if content is None:
        hub_models.pin(name, root, progress)
        content = find_content(name, root)
        assert content is not None, f"{name} has just been pinned"
    elif Path(name).is_dir():
        # A worker has another working directory: it finds the model by content, whatever its path was.
        pointer = {"folder": str(Path(name).resolve())}
        base_store.base_entries(root).write_entry(f"folder-{content[:12]}", pointer, "folder", replace=True)
    return content


def prepare_task_base_model(task: Task, root: Path, progress: Callable[[str], None]) -> str:
    """Pretrain the base model `<task name>-base` of a task, unless it exists.

    Args:
        task: The task.
        root: The folder of prepared models.
        progress: Called with one line before each step that takes long.

    Returns:
        The SHA-256 of the model's files.
    """

    def make(folder: Path) -> None:
        with base_store.suppress_transformers_logging():
            task.pretrain(folder, progress)

    return base_store.get_or_create_base(root, f"{task.name}-base", task.pretrain_recipe(), make)


def locate_pretrained(choice: ModelChoice, root: Path) -> tuple[str, str | None]:
    """Return what `from_pretrained` of transformers takes to load a model.

    Args:
        choice: The model.
        root: The folder of prepared models.

    Returns:
        A folder whose content has been verified and None, or a hub repository and a commit.

    Raises:
        UsageError: The model is not there, or has other content than `choice` names.
    """
    is_built_in = choice.name in built_in_names()
    if is_built_in:
        folder = base_store.base_folder(root, choice.name, choice.content)
    else:
        entry = base_store.base_entries(root).read_entry(f"folder-{choice.content[:12]}", "folder")
        folder = Path(entry or choice.name)
        if not folder.is_dir() and Path(choice.name).is_dir():
            folder = Path(choice.name)  # it was moved since a study named it
        if not folder.is_dir() and entry is None and hub_models.is_hub_name(choice.name):
            return hub_models.repo_id(choice.name), choice.content
    if not folder.is_dir():
        raise UsageError(f"Model {choice.name!r} is not in {folder}: prepare it there first.")
    if (actual_content := base_store.content_hash(folder)) != choice.content:
        other = (
            "remove that folder: the model is made again" if is_built_in else "start a study of the new ones"
        )
        raise UsageError(
            f"Model {choice.name!r}: {folder} holds content {actual_content[:12]}, the configuration names "
            f"{choice.content[:12]}. Put the old files back, or {other}."
        )
    return str(folder), None
