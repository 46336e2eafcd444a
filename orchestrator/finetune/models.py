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
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.finetune import bases, hub, minilm, smollm2, weights
from orchestrator.finetune.tasks import catalogue
from orchestrator.finetune.tasks.base import Task
from orchestrator.study.configuration import ModelChoice
from orchestrator.study.errors import BadInput, nearest, reason

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
        return _is_causal(self.model)

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
        return bases.made(root, name, task.pretrain_recipe())
    if name in PACKAGES:
        return bases.made(root, name, PACKAGES[name].RECIPE)
    if os.path.isdir(name):  # Path.is_dir raises OSError for a name that is too long
        weights.check(Path(name), name)  # before all of it is read, to be hashed
        return bases.content_of(Path(name))
    if hub.is_hub_name(name):
        commit = hub.pinned(name, root)
        if commit is not None and (cached := hub.snapshot(name, commit)) is not None:
            weights.check(cached, name, complete=False)
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
        return content or bases.make_once(root, name, package.RECIPE, build)
    if content is not None and Path(name).is_dir():
        # A worker has another working folder: it finds the model by content, whatever the path was called.
        where = {"folder": str(Path(name).resolve())}
        bases.write_pointer(root, f"folder-{content[:12]}", where, "folder", replace=True)
        return content
    if content is None:
        hub.pin(name, root, progress)
        content = resolve(name, root)
        assert content is not None, f"{name} has just been pinned"
    return content


def prepare_task_base(task: Task, root: Path, progress: Progress) -> str:
    """The base that a task pretrains itself, as `<task name>-base`."""

    def make(folder: Path) -> None:
        with bases.quiet():
            task.pretrain(folder, progress)

    return bases.make_once(root, f"{task.name}-base", task.pretrain_recipe(), make)


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
        with bases.quiet():
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
        raise BadInput(f"Model {choice.name!r}: {weights.WITH_ADAPTER}.")
    _check_sizes(model, choice.name, info["mismatched_keys"], headed)
    _check_count(model, choice.name, info["unexpected_keys"])
    lacking = [] if headed else sorted(info["missing_keys"])
    if lacking:  # transformers initialises them at random, with a warning that quiet() hides
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise BadInput(
            f"Model {choice.name!r}: its files hold no weights for {lacking[0]}{more}: they are those of "
            "another model; put config.json and weights of one model there."
        )
    if model.config.model_type.startswith("deberta"):
        from orchestrator.finetune import deberta

        deberta.positions_of_rows(model)
    if not headed:
        _check_next_tokens(model, choice.name)
    images = task is not None and task.inputs == "image"
    heads = _heads(model, choice.name, set(info["missing_keys"])) if headed else ()
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    bench = Bench(model.eval().requires_grad_(False).to(place), processor, place, heads)
    if place.type == "cpu":  # safetensors has mapped the files: one that is overwritten would change the base
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()
    if not headed and _looks_ahead(bench):
        raise _sees_answer(model, choice.name)
    if heads:
        if not images:
            _check_reading(model, choice.name)
            # A causal model pools before it.
            model.config.get_text_config().pad_token_id = processor.pad_token_id
        with torch.no_grad():
            for name in heads:
                # Lanes learn it in float32, and what stands between its linear layers has to follow.
                for module in model.get_submodule(name).float().modules():
                    if isinstance(module, torch.nn.Linear):
                        for parameter in module.parameters(recurse=False):
                            parameter.zero_()
    _check_finite(model, choice.name)
    return bench


def processor_of(choice: ModelChoice, root: Path, task: Task | None = None) -> Any:
    """What makes the base's inputs, ready for the task. Raises BadInput as `load` does."""
    from transformers import AutoTokenizer

    from orchestrator.finetune.images import ImageProcessor

    source, revision = where(choice, root)
    try:
        with bases.quiet():
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
        return hub.unreachable(choice.name, error)
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
        with bases.quiet(), torch.device("meta"):
            model = kind.from_config(config)
    except BadInput:
        raise
    except Exception as error:  # transformers' classes of configurations and models raise many kinds
        raise BadInput(
            f"Model {choice.name!r} does not suit task {task.name!r}: {reason(error)}; correct its "
            "config.json, or take another --model."
        ) from error
    if not task.has_head:
        _check_next_tokens(model, choice.name)
        return model, ()
    heads = _heads(model, choice.name, set())
    if task.inputs == "text":
        _check_reading(model, choice.name)
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


def _base_modules(model: Any) -> set[str]:
    """Return the names of the model's children that are the base, not the head of a task.

    By their class: CLIP's image tower is not called what `base_model_prefix` says.
    """
    from transformers import PreTrainedModel

    return {child for child, module in model.named_children() if isinstance(module, PreTrainedModel)}


def _check_sizes(model: Any, name: str, mismatched: Iterable[tuple[str, Any, Any]], headed: bool) -> None:
    """Refuse weights of other sizes than the configuration's: transformers has drawn others at random.

    Args:
        model: The model as transformers has loaded it.
        name: Its name, for the error.
        mismatched: Of each such weight its key, its size in the files, and its size in the model.
        headed: Whether the model has a head, whose weights in the files are not used.

    Raises:
        BadInput: There is such a weight, and it is not the head's.
    """
    base = _base_modules(model)
    for key, there, here in sorted(mismatched):
        if not headed or key.partition(".")[0] in base:
            raise BadInput(
                f"Model {name!r}: its files hold {key} of size {list(there)}, and its config.json asks for "
                f"{list(here)}; put config.json and weights of one model there."
            )


def _check_count(model: Any, name: str, unused: Iterable[str]) -> None:
    """Refuse weights of more blocks than the configuration has: the model would be another than the files'.

    Args:
        model: The model as transformers has loaded it.
        name: Its name, for the error.
        unused: The keys of the weights that have no place in it.

    Raises:
        BadInput: One of them is a block's.
    """
    from torch.nn import ModuleList

    for place, module in model.named_modules():
        if isinstance(module, ModuleList):
            for key in sorted(unused):
                number = key.removeprefix(f"{place}.").partition(".")[0]
                if key.startswith(f"{place}.") and number.isdecimal() and int(number) >= len(module):
                    raise BadInput(
                        f"Model {name!r}: its files hold {key}, and its config.json asks for {len(module)} "
                        f"blocks in {place}; put config.json and weights of one model there."
                    )


def _check_finite(model: Any, name: str) -> None:
    """Refuse a model with a weight that is no finite number: every lane on it would be recorded as diverged.

    Args:
        model: A transformers model with its weights, on the device where checking them is cheapest.
        name: Its name, for the error.

    Raises:
        BadInput: There is such a weight.
    """
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise BadInput(
                f"Model {name!r}: {key} holds a number that is not finite as {tensor.dtype}; put the model's "
                "own weights there, or take another --dtype."
            )


def _check_next_tokens(model: Any, name: str) -> None:
    """Refuse a model whose tokens attend to later ones: it would see the answer that it has to predict.

    Args:
        model: A transformers model with a language-modelling head, with or without weights.
        name: Its name, for the error.

    Raises:
        BadInput: The model is an encoder (a BERT without is_decoder), an XLNet, or a decoder whose
            configuration says is_causal false. Others that look ahead are found by `_looks_ahead`.
    """
    from transformers import MODEL_FOR_MASKED_LM_MAPPING

    said = [module.is_causal for module in model.modules() if hasattr(module, "is_causal")]
    config = model.config
    # Some architectures have no such attribute: of these, masked language models attend both ways.
    encoder = type(config) in MODEL_FOR_MASKED_LM_MAPPING or config.model_type == "xlnet"
    if _unmasked(model) or not (any(said) if said else getattr(config, "is_decoder", False) or not encoder):
        raise _sees_answer(model, name)


def _unmasked(model: Any) -> bool:
    """Return whether the configuration makes a decoder bidirectional (as LLM2Vec does): transformers then
    leaves the causal mask out, while the attention modules say is_causal."""
    return not getattr(model.config.get_text_config(), "is_causal", True)


def _looks_ahead(bench: Bench) -> bool:
    """Return whether another last token changes what a language model with its weights says before it.

    Two rows of eight tokens are computed. Their earlier logits are equal to the bit in causal models that
    were tried; up to 1% of the last token's own change is taken for rounding.
    """
    import torch

    count = bench.model.config.get_text_config().vocab_size
    first = torch.arange(1, 1 + min(8, positions(bench.model) or 8), device=bench.device)
    second = torch.cat([first[:-1], first[-1:] + 1])
    with torch.no_grad():
        logits = bench.model(input_ids=torch.stack([first, second]) % count, use_cache=False).logits
    changes = (logits[0] - logits[1]).abs().amax(dim=1).tolist()
    return max(changes[:-1], default=0.0) > 0.01 * changes[-1]


def _sees_answer(model: Any, name: str) -> BadInput:
    return BadInput(
        f"Model {name!r} ({type(model).__name__}): its tokens attend to later ones, so it would see the "
        "answer that this task asks for; take a decoder-only model, or a task of classes."
    )


def _is_causal(model: Any) -> bool:
    return not _unmasked(model) and any(getattr(module, "is_causal", False) for module in model.modules())


def _check_reading(model: Any, name: str) -> None:
    """Refuse a model whose head would not see the whole text.

    Args:
        model: A transformers model with a head for texts, with or without weights.
        name: Its name, for the error.

    Raises:
        BadInput: Nobody knows whether the model is an encoder, whose head reads the first token or all, or a
            decoder, whose head reads the last one; or it is an encoder that is set to see as a decoder does.
    """
    from transformers import MODEL_FOR_MASKED_LM_MAPPING

    encoder, kind = type(model.config) in MODEL_FOR_MASKED_LM_MAPPING, type(model).__name__
    if not encoder and not _is_causal(model):
        raise BadInput(f"Model {name!r} ({kind}): neither an encoder nor a decoder known here.")
    if encoder and _is_causal(model):
        raise BadInput(
            f"Model {name!r} ({kind}): its head reads the first token, which sees no other with is_decoder; "
            "set is_decoder to false in its config.json."
        )


def positions(model: Any) -> int | None:
    """Return how many tokens a model has learnt positions for; None where it has none (rotary ones).

    Args:
        model: A transformers model, with or without weights.
    """
    from torch.nn import Embedding

    for name, module in model.named_modules():
        if isinstance(module, Embedding) and name.rpartition(".")[2] in _TABLES_OF_POSITIONS:
            # OPT's and BART's tables have an offset; RoBERTa begins after its padding index.
            unused = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - getattr(module, "offset", unused)
    return None


_TABLES_OF_POSITIONS = ("position_embeddings", "wpe", "embed_positions", "positions_embed")


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


def _heads(model: Any, name: str, missing: set[str]) -> tuple[str, ...]:
    """The modules with parameters that are not the base's: what stands beside it, and what its checkpoint has
    no weights for (BERT's pooler, often)."""
    if model.config.is_encoder_decoder:
        raise BadInput(f"Model {name!r} is an encoder with a decoder; heads are for one or the other.")
    base = _base_modules(model)
    beside = [
        child
        for child, module in model.named_children()
        if child not in base and next(module.parameters(), None) is not None
    ]
    from torch.nn import ModuleList

    lists = [f"{place}." for place, module in model.named_modules() if isinstance(module, ModuleList)]
    lacking = {key.rpartition(".")[0] for key in missing if key.partition(".")[0] in base}
    for place in sorted(lacking):
        module = model.get_submodule(place)
        whole = all(f"{place}.{key}" in missing for key, _ in module.named_parameters())
        # Only a layer after the blocks can be a head: one of a block is the base's, and its file is cut.
        if type(module).__name__ != "Linear" or not whole or place.startswith(tuple(lists)):
            kind = type(module).__name__
            raise BadInput(
                f"Model {name!r}: its files hold no weights for {place} ({kind}): they are another model's; "
                "put config.json and weights of one model there."
            )
    return (*beside, *sorted(lacking))


def where(choice: ModelChoice, root: Path) -> tuple[str, str | None]:
    """What from_pretrained is given: a folder whose content was checked, or a hub repository and a commit.
    Raises BadInput when the model is not there, or is another."""
    if choice.name in names():
        folder = bases.folder_of(root, choice.name, choice.content)
    elif (kept := bases.read_pointer(root, f"folder-{choice.content[:12]}", "folder")) is not None:
        folder = Path(kept)
    elif Path(choice.name).is_dir():
        folder = Path(choice.name)
    elif hub.is_hub_name(choice.name):
        return hub.repository_of(choice.name), choice.content
    else:
        folder = Path(choice.name)
    if not folder.is_dir():
        raise BadInput(f"Model {choice.name!r} is not in {folder}: prepare it there first.")
    if (here := bases.content_of(folder)) != choice.content:
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
