"""Base models: by name, found or made once, known by content.

A name is one of
- `<task>-base`: the small base that a task pretrains itself (`letters-base`);
- `smollm2-135m`, `minilm-l6`: real models from Python packages (`smollm2.py`, `minilm.py`);
- a folder with a transformers model and its tokenizer, or image processor;
- `organisation/model` or `organisation/model@revision` of the Hugging Face hub (`hub.py`).

`root` is the store's folder `bases` (`bases.py`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.finetune.models import minilm, model_checks, smollm2, weight_files
from orchestrator.finetune.sources import base_store, hub_models
from orchestrator.finetune.tasks import catalogue
from orchestrator.finetune.tasks.base import Task
from orchestrator.study.configuration import ModelChoice
from orchestrator.util.errors import BadInput, nearest, reason

if TYPE_CHECKING:
    import torch

Progress = Callable[[str], None]

UNPREPARED = "not prepared yet"
"""The content, in a plan, of a base that is not made yet. No record has it."""

MOST_LAYERS = 10_000
"""Each is made, without its weights, before it can be looked at: a torn configuration may name a billion."""

PACKAGES = {smollm2.NAME: smollm2, minilm.NAME: minilm}
"""Models that travel in Python packages: modules with NAME, RECIPE and `build(folder, progress)`."""


@dataclass(frozen=True)
class Bench:
    """A frozen base ready to carry adapters: eval mode, no gradients, the dtype of the choice. `processor`
    makes the model's inputs: a tokenizer, or an `images.ImageProcessor`. A tokenizer always has a padding
    token, and an end token for answers in words; the padding side is the loop's business. `heads`: the
    modules that are the task's own, of which every lane has its own; here they are zero. `share`: how much of
    its GPU's memory is for it, beside others: 0.5 is half."""

    model: Any
    processor: Any
    device: torch.device
    heads: tuple[str, ...] = ()
    share: float = 1.0

    @property
    def tokenizer(self) -> Any:
        """The processor of a model that reads text."""
        return self.processor

    @cached_property
    def causal(self) -> bool:
        """Whether a token sees those before it only, as the attention modules of transformers say."""
        return model_checks.is_causal(self.model)

    @cached_property
    def typed(self) -> bool:
        """Whether it has embeddings for the token types 0 and 1 (RoBERTa knows 0 only, DeBERTa-v3 none)."""
        return (getattr(self.model.config, "type_vocab_size", None) or 0) > 1

    @cached_property
    def windowed(self) -> bool:
        """Whether a token sees its neighbours only, in some layers."""
        return any("sliding" in kind for kind in getattr(self.model.config, "layer_types", None) or ())

    @cached_property
    def convolves(self) -> bool:
        """Whether it is a DeBERTa-v2 with a convolution (the xlarge ones), which sees padding as well."""
        config = self.model.config
        return config.model_type == "deberta-v2" and getattr(config, "conv_kernel_size", 0) > 0


def names() -> tuple[str, ...]:
    """The bases that come with the project; folders and hub names work besides."""
    return (*_task_bases(), *PACKAGES)


def resolve(name: str, root: Path) -> str | None:
    """The content (SHA-256, or a hub commit) of a base, None when it has yet to be prepared. Reads only.
    Raises BadInput for a name that is none."""
    if (task := _task_bases().get(name)) is not None:
        return base_store.made(root, name, task.pretrain_recipe())
    if name in PACKAGES:
        return base_store.made(root, name, PACKAGES[name].RECIPE)
    if os.path.isdir(name):  # Path.is_dir raises OSError for a name that is too long
        weight_files.check(Path(name), name)  # before all of it is read, to be hashed
        return base_store.content_of(Path(name))
    if hub_models.is_hub_name(name):
        commit = hub_models.pinned(name, root)
        if commit is not None and (cached := hub_models.snapshot(name, commit)) is not None:
            weight_files.check(cached, name, complete=False)
        return commit
    raise BadInput(
        f"Unknown model {name!r}: no such folder, nor a name known here. {nearest(name, names())} "
        "A hub model is written organisation/model."
    )


def prepare(name: str, root: Path, progress: Progress = print) -> str:
    """Makes or finds the base once and returns its content; at once when that was done before. Two processes
    may do it together. Raises BadInput when the model cannot be had."""
    content = resolve(name, root)
    if (task := _task_bases().get(name)) is not None:
        return content or prepare_task_base(task, root, progress)
    if (package := PACKAGES.get(name)) is not None:
        build = lambda folder: package.build(folder, progress)  # noqa: E731
        return content or base_store.make_once(root, name, package.RECIPE, build)
    if content is not None and Path(name).is_dir():
        # A worker has another working folder: it finds the model by content, whatever the path was called.
        where = {"folder": str(Path(name).resolve())}
        base_store.write_pointer(root, f"folder-{content[:12]}", where, "folder", replace=True)
        return content
    if content is None:
        hub_models.pin(name, root, progress)
        content = resolve(name, root)
        assert content is not None, f"{name} has just been pinned"
    return content


def prepare_task_base(task: Task, root: Path, progress: Progress) -> str:
    """The base that a task pretrains itself, as `<task name>-base`."""

    def make(folder: Path) -> None:
        with base_store.quiet():
            task.pretrain(folder, progress)

    return base_store.make_once(root, f"{task.name}-base", task.pretrain_recipe(), make)


def load(
    choice: ModelChoice,
    root: Path,
    device: str | torch.device | None = None,
    task: Task | None = None,
) -> Bench:
    """The base on `device` (by default a CUDA device where there is one, else the CPU), as a language model,
    or with a head for a `task` that has one. The head is zeros: untrained, it gives every class the same. Of
    CLIP a task of images gets the image tower alone, whose head reads the mean of the patches.

    Attention is transformers' own choice: PyTorch's scaled dot product where the architecture has it. On a
    CPU a row's result then does not depend on the other rows (to the bit, from 8 rows on). Raises BadInput
    when the base is not there, is not the one that `choice` names, or does not suit the task."""
    import torch

    source, revision = where(choice, root)
    processor = processor_of(choice, root, task)
    headed = task is not None and task.has_head
    kind, own = _kind(task)
    try:
        with base_store.quiet():
            model, info = kind.from_pretrained(
                source,
                revision=revision,
                dtype=getattr(torch, choice.dtype),
                ignore_mismatched_sizes=True,  # of a head, which is replaced; others are refused below
                output_loading_info=True,
                trust_remote_code=False,
                **own,
            )
    except (OSError, ValueError, ImportError) as error:
        raise _unloaded(choice, source, revision, error) from error
    if getattr(model, "_hf_peft_config_loaded", False):
        raise BadInput(f"Model {choice.name!r}: {weight_files.WITH_ADAPTER}.")
    model_checks.check_weights(model, choice.name, info, headed)
    if model.config.model_type.startswith("deberta"):
        from orchestrator.finetune.models import deberta

        deberta.positions_of_rows(model)
    if not headed:
        model_checks.check_next_tokens(model, choice.name)
    images = task is not None and task.inputs == "image"
    heads = model_checks.heads_of(model, choice.name, set(info["missing_keys"])) if headed else ()
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    bench = Bench(model.eval().requires_grad_(False).to(place), processor, place, heads)
    if place.type == "cpu":  # safetensors has mapped the files: one that is overwritten would change the base
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()
    if not headed and model_checks.looks_ahead(bench):
        raise model_checks.sees_answer(model, choice.name)
    if heads:
        if not images:
            model_checks.check_reading(model, choice.name)
            # A causal model pools before it.
            model.config.get_text_config().pad_token_id = processor.pad_token_id
        with torch.no_grad():
            for name in heads:
                # Lanes learn it in float32, and what stands between its linear layers has to follow.
                for module in model.get_submodule(name).float().modules():
                    if isinstance(module, torch.nn.Linear):
                        for parameter in module.parameters(recurse=False):
                            parameter.zero_()
    model_checks.check_finite(model, choice.name)
    return bench


def processor_of(choice: ModelChoice, root: Path, task: Task | None = None) -> Any:
    """What makes the base's inputs, ready for the task. Raises BadInput as `load` does."""
    from transformers import AutoTokenizer

    from orchestrator.finetune.tasks.image_processor import ImageProcessor

    source, revision = where(choice, root)
    try:
        with base_store.quiet():
            if task is not None and task.inputs == "image":
                return ImageProcessor.of(source, revision)
            tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
    except Exception as error:  # of many kinds: the tokenizers of Hugging Face raise Exception itself
        raise _unloaded(choice, source, revision, error) from error
    if not set(tokenizer.get_vocab()) - {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}:
        # transformers makes one without words where it finds no vocabulary: every text would be the same.
        raise BadInput(
            f"Model {choice.name!r}: its tokenizer has no words; put the tokenizer's files (tokenizer.json, "
            "or a vocabulary) beside the model."
        )
    if tokenizer.eos_token_id is None and not (task is not None and task.has_head):
        raise BadInput(
            f"Model {choice.name!r}: its tokenizer has no end token (eos_token), which answers need."
        )
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise BadInput(f"Model {choice.name!r}: its tokenizer has neither a padding nor an end token.")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _unloaded(choice: ModelChoice, source: str, revision: str | None, error: Exception) -> BadInput:
    # transformers makes an OSError also of a configuration that is no JSON.
    if revision is not None and isinstance(error, OSError) and "valid JSON" not in str(error):
        return hub_models.unreachable(choice.name, error)
    remedy = (
        "" if revision is None else "; remove a damaged file from the hub's cache: it is downloaded again"
    )
    return BadInput(f"Model {choice.name!r} in {source} does not load: {reason(error)}{remedy}")


def skeleton(choice: ModelChoice, root: Path, task: Task) -> tuple[Any, tuple[str, ...]]:
    """The base's modules with shapes but no weights (torch's meta device), to check options against, and the
    names of its heads (those that no checkpoint of a base has)."""
    import torch

    kind, own = _kind(task)
    try:
        config = _config(choice, root, own)
        layers = getattr(config.get_text_config(), "num_hidden_layers", None) or 0
        if layers > MOST_LAYERS:
            raise ValueError(f"num_hidden_layers is {layers}; must be {MOST_LAYERS} or less")
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError("its weights are quantised (quantization_config), and lanes need plain floats")
        for name, value in own.items():
            setattr(config, name, value)
        with base_store.quiet(), torch.device("meta"):
            model = kind.from_config(config)
    except BadInput:
        raise
    except Exception as error:  # transformers' classes of configurations and models raise many kinds
        raise BadInput(
            f"Model {choice.name!r} does not suit task {task.name!r}: {reason(error)}; correct its "
            "config.json, or take another --model."
        ) from error
    if not task.has_head:
        model_checks.check_next_tokens(model, choice.name)
        return model, ()
    heads = model_checks.heads_of(model, choice.name, set())
    if task.inputs == "text":
        model_checks.check_reading(model, choice.name)
    return model, heads


def embeddings(choice: ModelChoice, root: Path) -> int | None:
    """Return how many tokens a model has embeddings for; None where its configuration does not say.

    Args:
        choice: the model; its configuration can be read.
        root: the folder of prepared bases.
    """
    found: int | None = getattr(_config(choice, root, {}).get_text_config(), "vocab_size", None)
    return found


def _config(choice: ModelChoice, root: Path, own: Mapping[str, Any]) -> Any:
    """Return transformers' configuration of a model, with `own` values in place of its files'."""
    from transformers import AutoConfig

    if (config := unmade(choice)) is not None:
        return config
    source, revision = where(choice, root)
    return AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False, **own)


def unmade(choice: ModelChoice) -> Any:
    """Return transformers' configuration of a task's own base that is not made yet, None for other models."""
    task = _task_bases().get(choice.name)
    return task.base_config() if task is not None and choice.content == UNPREPARED else None


def _kind(task: Task | None) -> tuple[Any, dict[str, Any]]:
    """transformers' class for the task, and what its configuration needs besides."""
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForImageClassification,
        AutoModelForSequenceClassification,
    )

    if task is None or not task.has_head:
        return AutoModelForCausalLM, {}
    shown = {"text": AutoModelForSequenceClassification, "image": AutoModelForImageClassification}
    return shown[task.inputs], {"num_labels": task.outputs}


def where(choice: ModelChoice, root: Path) -> tuple[str, str | None]:
    """What from_pretrained is given: a folder whose content was checked, or a hub repository and a commit.
    Raises BadInput when the model is not there, or is another."""
    if choice.name in names():
        folder = base_store.folder_of(root, choice.name, choice.content)
    elif (kept := base_store.read_pointer(root, f"folder-{choice.content[:12]}", "folder")) is not None:
        folder = Path(kept)
    elif Path(choice.name).is_dir():
        folder = Path(choice.name)
    elif hub_models.is_hub_name(choice.name):
        return hub_models.repository_of(choice.name), choice.content
    else:
        folder = Path(choice.name)
    if not folder.is_dir():
        raise BadInput(f"Model {choice.name!r} is not in {folder}: prepare it there first.")
    if (here := base_store.content_of(folder)) != choice.content:
        ours = choice.name in names()
        other = "remove that folder: the base is made again" if ours else "start a study of the new ones"
        raise BadInput(
            f"Model {choice.name!r}: {folder} holds content {here[:12]}, the configuration names "
            f"{choice.content[:12]}. Put the old files back, or {other}."
        )
    return str(folder), None


def _task_bases() -> dict[str, Task]:
    tasks = [catalogue.get(name) for name in catalogue.names()]
    return {f"{task.name}-base": task for task in tasks if task.pretrain_recipe()}
