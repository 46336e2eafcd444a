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
from orchestrator.util.errors import UsageError, format_error, suggest_nearest

if TYPE_CHECKING:
    import torch

ProgressCallback = Callable[[str], None]

UNPREPARED = "not prepared yet"
"""The content, in a plan, of a base that is not made yet. No record has it."""

MAX_LAYERS = 10_000
"""Each is made, without its weights, before it can be looked at: a torn configuration may name a billion."""

PACKAGED_MODELS = {smollm2.NAME: smollm2, minilm.NAME: minilm}
"""Models that travel in Python packages: modules with NAME, RECIPE and `build(folder, progress)`."""


@dataclass(frozen=True)
class BaseModel:
    """A frozen base ready to carry adapters: eval mode, no gradients, the dtype of the choice. `processor`
    makes the model's inputs: a tokenizer, or an `images.ImageProcessor`. A tokenizer always has a padding
    token, and an end token for answers in words; the padding side is the loop's business. `heads`: the
    modules that are the task's own, of which every lane has its own; here they are zero. `share`: how much of
    its GPU's memory is for it, beside others: 0.5 is half."""

    model: Any
    processor: Any
    device: torch.device
    head_names: tuple[str, ...] = ()
    memory_fraction: float = 1.0

    @property
    def tokenizer(self) -> Any:
        """The processor of a model that reads text."""
        return self.processor

    @cached_property
    def is_causal(self) -> bool:
        """Whether a token sees those before it only, as the attention modules of transformers say."""
        return model_checks.is_causal(self.model)

    @cached_property
    def has_token_types(self) -> bool:
        """Whether it has embeddings for the token types 0 and 1 (RoBERTa knows 0 only, DeBERTa-v3 none)."""
        return (getattr(self.model.config, "type_vocab_size", None) or 0) > 1

    @cached_property
    def has_sliding_window(self) -> bool:
        """Whether a token sees its neighbours only, in some layers."""
        return any("sliding" in kind for kind in getattr(self.model.config, "layer_types", None) or ())

    @cached_property
    def has_convolution(self) -> bool:
        """Whether it is a DeBERTa-v2 with a convolution (the xlarge ones), which sees padding as well."""
        config = self.model.config
        return config.model_type == "deberta-v2" and getattr(config, "conv_kernel_size", 0) > 0


def built_in_names() -> tuple[str, ...]:
    """The bases that come with the project; folders and hub names work besides."""
    return (*_task_bases(), *PACKAGED_MODELS)


def find_content(name: str, root: Path) -> str | None:
    """The content (SHA-256, or a hub commit) of a base, None when it has yet to be prepared. Reads only.
    Raises BadInput for a name that is none."""
    if (task := _task_bases().get(name)) is not None:
        return base_store.find_base(root, name, task.pretrain_recipe())
    if name in PACKAGED_MODELS:
        return base_store.find_base(root, name, PACKAGED_MODELS[name].RECIPE)
    if os.path.isdir(name):  # Path.is_dir raises OSError for a name that is too long
        weight_files.check_weight_files(Path(name), name)  # before all of it is read, to be hashed
        return base_store.content_hash(Path(name))
    if hub_models.is_hub_name(name):
        commit = hub_models.pinned_commit(name, root)
        if commit is not None and (cached := hub_models.cached_snapshot(name, commit)) is not None:
            weight_files.check_weight_files(cached, name, complete=False)
        return commit
    raise UsageError(
        f"Unknown model {name!r}: no such folder, nor a name known here. {suggest_nearest(name, built_in_names())} "
        "A hub model is written organisation/model."
    )


def prepare_base_model(name: str, root: Path, progress: ProgressCallback = print) -> str:
    """Makes or finds the base once and returns its content; at once when that was done before. Two processes
    may do it together. Raises BadInput when the model cannot be had."""
    content = find_content(name, root)
    if (task := _task_bases().get(name)) is not None:
        return content or prepare_task_base_model(task, root, progress)
    if (package := PACKAGED_MODELS.get(name)) is not None:
        build = lambda folder: package.build(folder, progress)  # noqa: E731
        return content or base_store.get_or_create_base(root, name, package.RECIPE, build)
    if content is not None and Path(name).is_dir():
        # A worker has another working folder: it finds the model by content, whatever the path was called.
        pointer = {"folder": str(Path(name).resolve())}
        base_store.base_entries(root).write_entry(f"folder-{content[:12]}", pointer, "folder", replace=True)
        return content
    if content is None:
        hub_models.pin(name, root, progress)
        content = find_content(name, root)
        assert content is not None, f"{name} has just been pinned"
    return content


def prepare_task_base_model(task: Task, root: Path, progress: ProgressCallback) -> str:
    """The base that a task pretrains itself, as `<task name>-base`."""

    def make(folder: Path) -> None:
        with base_store.suppress_transformers_logging():
            task.pretrain(folder, progress)

    return base_store.get_or_create_base(root, f"{task.name}-base", task.pretrain_recipe(), make)


def load_base_model(
    choice: ModelChoice,
    root: Path,
    device: str | torch.device | None = None,
    task: Task | None = None,
) -> BaseModel:
    """The base on `device` (by default a CUDA device where there is one, else the CPU), as a language model,
    or with a head for a `task` that has one. The head is zeros: untrained, it gives every class the same. Of
    CLIP a task of images gets the image tower alone, whose head reads the mean of the patches.

    Attention is transformers' own choice: PyTorch's scaled dot product where the architecture has it. On a
    CPU a row's result then does not depend on the other rows (to the bit, from 8 rows on). Raises BadInput
    when the base is not there, is not the one that `choice` names, or does not suit the task."""
    import torch

    source, revision = locate_pretrained(choice, root)
    processor = load_processor(choice, root, task)
    has_head = task is not None and task.has_head
    auto_class, config_overrides = _auto_class(task)
    try:
        with base_store.suppress_transformers_logging():
            model, loading_info = auto_class.from_pretrained(
                source,
                revision=revision,
                dtype=getattr(torch, choice.dtype),
                ignore_mismatched_sizes=True,  # of a head, which is replaced; others are refused below
                output_loading_info=True,
                trust_remote_code=False,
                **config_overrides,
            )
    except (OSError, ValueError, ImportError) as error:
        raise _loading_error(choice, source, revision, error) from error
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UsageError(f"Model {choice.name!r}: {weight_files.HAS_ADAPTER_MESSAGE}.")
    model_checks.check_weights(model, choice.name, loading_info, has_head)
    if model.config.model_type.startswith("deberta"):
        from orchestrator.finetune.models import deberta

        deberta.patch_deberta_attention(model)
    if not has_head:
        model_checks.check_causal(model, choice.name)
    images = task is not None and task.inputs == "image"
    head_names = (
        model_checks.find_head_names(model, choice.name, set(loading_info["missing_keys"]))
        if has_head
        else ()
    )
    target_device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    base_model = BaseModel(
        model.eval().requires_grad_(False).to(target_device), processor, target_device, head_names
    )
    if (
        target_device.type == "cpu"
    ):  # safetensors has mapped the files: one that is overwritten would change the base
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()
    if not has_head and model_checks.attends_to_future_tokens(base_model):
        raise model_checks.not_causal_error(model, choice.name)
    if head_names:
        if not images:
            model_checks.check_head_pooling(model, choice.name)
            # A causal model pools before it.
            model.config.get_text_config().pad_token_id = processor.pad_token_id
        with torch.no_grad():
            for name in head_names:
                # Lanes learn it in float32, and what stands between its linear layers has to follow.
                for module in model.get_submodule(name).float().modules():
                    if isinstance(module, torch.nn.Linear):
                        for parameter in module.parameters(recurse=False):
                            parameter.zero_()
    model_checks.check_finite(model, choice.name)
    return base_model


def load_processor(choice: ModelChoice, root: Path, task: Task | None = None) -> Any:
    """What makes the base's inputs, ready for the task. Raises BadInput as `load` does."""
    from transformers import AutoTokenizer

    from orchestrator.finetune.tasks.image_processor import ImageProcessor

    source, revision = locate_pretrained(choice, root)
    try:
        with base_store.suppress_transformers_logging():
            if task is not None and task.inputs == "image":
                return ImageProcessor.from_pretrained(source, revision)
            tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
    except Exception as error:  # of many kinds: the tokenizers of Hugging Face raise Exception itself
        raise _loading_error(choice, source, revision, error) from error
    if not set(tokenizer.get_vocab()) - {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}:
        # transformers makes one without words where it finds no vocabulary: every text would be the same.
        raise UsageError(
            f"Model {choice.name!r}: its tokenizer has no words; put the tokenizer's files (tokenizer.json, "
            "or a vocabulary) beside the model."
        )
    if tokenizer.eos_token_id is None and not (task is not None and task.has_head):
        raise UsageError(
            f"Model {choice.name!r}: its tokenizer has no end token (eos_token), which answers need."
        )
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UsageError(f"Model {choice.name!r}: its tokenizer has neither a padding nor an end token.")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _loading_error(choice: ModelChoice, source: str, revision: str | None, error: Exception) -> UsageError:
    # transformers makes an OSError also of a configuration that is no JSON.
    if revision is not None and isinstance(error, OSError) and "valid JSON" not in str(error):
        return hub_models.unreachable_error(choice.name, error)
    remedy = (
        "" if revision is None else "; remove a damaged file from the hub's cache: it is downloaded again"
    )
    return UsageError(f"Model {choice.name!r} in {source} does not load: {format_error(error)}{remedy}")


def build_meta_model(choice: ModelChoice, root: Path, task: Task) -> tuple[Any, tuple[str, ...]]:
    """The base's modules with shapes but no weights (torch's meta device), to check options against, and the
    names of its heads (those that no checkpoint of a base has)."""
    import torch

    auto_class, config_overrides = _auto_class(task)
    try:
        config = _read_config(choice, root, config_overrides)
        layers = getattr(config.get_text_config(), "num_hidden_layers", None) or 0
        if layers > MAX_LAYERS:
            raise ValueError(f"num_hidden_layers is {layers}; must be {MAX_LAYERS} or less")
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError("its weights are quantised (quantization_config), and lanes need plain floats")
        for name, value in config_overrides.items():
            setattr(config, name, value)
        with base_store.suppress_transformers_logging(), torch.device("meta"):
            model = auto_class.from_config(config)
    except UsageError:
        raise
    except Exception as error:  # transformers' classes of configurations and models raise many kinds
        raise UsageError(
            f"Model {choice.name!r} does not suit task {task.name!r}: {format_error(error)}; correct its "
            "config.json, or take another --model."
        ) from error
    if not task.has_head:
        model_checks.check_causal(model, choice.name)
        return model, ()
    head_names = model_checks.find_head_names(model, choice.name, set())
    if task.inputs == "text":
        model_checks.check_head_pooling(model, choice.name)
    return model, head_names


def read_vocab_size(choice: ModelChoice, root: Path) -> int | None:
    """Return how many tokens a model has embeddings for; None where its configuration does not say.

    Args:
        choice: the model; its configuration can be read.
        root: the folder of prepared bases.
    """
    found: int | None = getattr(_read_config(choice, root, {}).get_text_config(), "vocab_size", None)
    return found


def _read_config(choice: ModelChoice, root: Path, config_overrides: Mapping[str, Any]) -> Any:
    """Return transformers' configuration of a model, with `own` values in place of its files'."""
    from transformers import AutoConfig

    if (config := unprepared_config(choice)) is not None:
        return config
    source, revision = locate_pretrained(choice, root)
    return AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False, **config_overrides)


def unprepared_config(choice: ModelChoice) -> Any:
    """Return transformers' configuration of a task's own base that is not made yet, None for other models."""
    task = _task_bases().get(choice.name)
    return task.base_config() if task is not None and choice.content == UNPREPARED else None


def _auto_class(task: Task | None) -> tuple[Any, dict[str, Any]]:
    """transformers' class for the task, and what its configuration needs besides."""
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForImageClassification,
        AutoModelForSequenceClassification,
    )

    if task is None or not task.has_head:
        return AutoModelForCausalLM, {}
    auto_classes = {"text": AutoModelForSequenceClassification, "image": AutoModelForImageClassification}
    return auto_classes[task.inputs], {"num_labels": task.num_labels}


def locate_pretrained(choice: ModelChoice, root: Path) -> tuple[str, str | None]:
    """What from_pretrained is given: a folder whose content was checked, or a hub repository and a commit.
    Raises BadInput when the model is not there, or is another."""
    if choice.name in built_in_names():
        folder = base_store.base_folder(root, choice.name, choice.content)
    elif (
        kept := base_store.base_entries(root).read_entry(f"folder-{choice.content[:12]}", "folder")
    ) is not None:
        folder = Path(kept)
    elif Path(choice.name).is_dir():
        folder = Path(choice.name)
    elif hub_models.is_hub_name(choice.name):
        return hub_models.repo_id(choice.name), choice.content
    else:
        folder = Path(choice.name)
    if not folder.is_dir():
        raise UsageError(f"Model {choice.name!r} is not in {folder}: prepare it there first.")
    if (actual_content := base_store.content_hash(folder)) != choice.content:
        is_built_in = choice.name in built_in_names()
        other = (
            "remove that folder: the base is made again" if is_built_in else "start a study of the new ones"
        )
        raise UsageError(
            f"Model {choice.name!r}: {folder} holds content {actual_content[:12]}, the configuration names "
            f"{choice.content[:12]}. Put the old files back, or {other}."
        )
    return str(folder), None


def _task_bases() -> dict[str, Task]:
    tasks = [catalogue.get(name) for name in catalogue.names()]
    return {f"{task.name}-base": task for task in tasks if task.pretrain_recipe()}
