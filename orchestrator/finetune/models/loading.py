"""Base models and their processors, loaded with transformers and checked.

If the files of a model lack weights, or have weights of another shape, transformers draws random ones and
only warns. The checks after loading refuse such models.

`root` is the store's folder `bases`, which holds the prepared models (`catalogue`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from orchestrator.finetune.failures import Fault, classify_error
from orchestrator.finetune.models import base_model as architecture
from orchestrator.finetune.models.base_model import BaseModel
from orchestrator.finetune.models.catalogue import (
    HAS_ADAPTER_MESSAGE,
    PACKAGED_MODELS,
    UNPREPARED,
    locate_pretrained,
    task_bases,
)
from orchestrator.finetune.sources import base_store
from orchestrator.finetune.tasks.base import Task
from orchestrator.study.configuration import ModelChoice
from orchestrator.util.errors import UsageError, format_error

if TYPE_CHECKING:
    import torch

MAX_LAYERS = 10_000
"""The most layers of a model. A damaged configuration may name a billion, and transformers makes each of them
before the model can be checked."""


def load_base_model(choice: ModelChoice, root: Path, device: str | torch.device, task: Task) -> BaseModel:
    """Load a base model: as a language model, or with a head for a task that needs one.

    The linear layers of a head are zero, so every class has the same logit before training. An image task
    gets only the image tower of CLIP, whose head reads the mean of the patches. Attention is transformers'
    default, which is PyTorch's scaled dot product where the architecture supports it. On a CPU, a row's
    result then does not depend on the other rows. `variants/batch_invariant.py` says how many rows are needed
    for this to hold exactly.

    Args:
        choice: The model and its dtype.
        root: The folder of prepared models.
        device: The device to load to.
        task: The task, which decides the head and the processor.

    Returns:
        The model in eval mode, without gradients.

    Raises:
        UsageError: The model is not there, has other content than `choice` names, cannot be loaded, or does
            not suit the task.
    """
    import torch

    processor = load_processor(choice, root, task)
    model, loading_info = _load_model(choice, root, task)
    check_weights(model, choice.name, loading_info, task.has_head)
    if model.config.model_type.startswith("deberta"):
        from orchestrator.finetune.models import changes

        changes.patch_deberta_attention(model)
    head_names: tuple[str, ...] = ()
    if task.has_head:
        head_names = find_head_names(model, choice.name, set(loading_info["missing_keys"]))
        if task.inputs == "text":
            architecture.check_head_pooling(model, choice.name)
            # The head of a causal model reads the last token before padding.
            model.config.get_text_config().pad_token_id = processor.pad_token_id
    else:
        architecture.check_causal(model, choice.name)
    device = torch.device(device)
    model = _move_to_device(model.eval().requires_grad_(False), choice, device)
    base_model = BaseModel(model, processor, device, head_names)
    if not task.has_head:
        if architecture.attends_to_future_tokens(base_model):
            raise architecture.not_causal_error(model, choice.name)
        _ = base_model.ends_with_output_layer  # determined now: adapters will hide the layers
    _initialize_heads(model, head_names)
    check_finite(model, choice.name)
    return base_model


def _load_model(choice: ModelChoice, root: Path, task: Task) -> tuple[Any, Mapping[str, Any]]:
    """Return the transformers model and transformers' loading info."""
    import torch

    source, revision = locate_pretrained(choice, root)
    auto_class, config_overrides = _auto_class(task)
    try:
        with base_store.suppress_transformers_logging():
            model, loading_info = auto_class.from_pretrained(
                source,
                revision=revision,
                dtype=getattr(torch, choice.compute_dtype),
                ignore_mismatched_sizes=True,  # of a head, which is replaced; check_weights refuses others
                output_loading_info=True,
                trust_remote_code=False,
                **config_overrides,
            )
    except Exception as error:  # transformers, safetensors and torch raise many types for damaged files
        if classify_error(error) is Fault.MEMORY:
            raise
        raise _loading_error(choice, source, revision, error) from error
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UsageError(f"Model {choice.name!r}: {HAS_ADAPTER_MESSAGE}.")
    return model, loading_info


def check_weights(model: Any, name: str, loading_info: Mapping[str, Any], has_head: bool) -> None:
    """Refuse a model some of whose weights are random, or whose files have weights that it does not use.

    Args:
        model: The loaded transformers model.
        name: The name that its user gave.
        loading_info: transformers' loading info: "mismatched_keys", "unexpected_keys" and "missing_keys".
        has_head: True if the model has a head. Weights of a head in the files are then not used, and
            `find_head_names` checks for missing weights.

    Raises:
        UsageError: There are such weights.
    """
    base = _base_modules(model)
    for key, file_shape, model_shape in sorted(loading_info["mismatched_keys"]):
        if not has_head or key.partition(".")[0] in base:
            sizes = f"of size {list(file_shape)}, and its config.json asks for {list(model_shape)}"
            raise _wrong_weights_error(name, f"{key} {sizes}")
    _check_block_count(model, name, loading_info["unexpected_keys"])
    lacking = [] if has_head else sorted(loading_info["missing_keys"])
    if lacking:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise _wrong_weights_error(name, f"no weights for {lacking[0]}{more}")


def _wrong_weights_error(name: str, found: str) -> UsageError:
    return UsageError(
        f"Model {name!r}: its files hold {found}; put config.json and weights of one model there."
    )


def _base_modules(model: Any) -> set[str]:
    """Return the names of the model's children that belong to the base model and not to a head.

    These are the children of the class `PreTrainedModel`. The attribute `base_model_prefix` names another
    child for CLIP's image tower.
    """
    from transformers import PreTrainedModel

    return {child for child, module in model.named_children() if isinstance(module, PreTrainedModel)}


def _check_block_count(model: Any, name: str, unexpected_keys: Iterable[str]) -> None:
    """Refuse files with more blocks than the configuration has: transformers would leave the others out."""
    from torch.nn import ModuleList

    for module_name, module in model.named_modules():
        if isinstance(module, ModuleList):
            for key in sorted(unexpected_keys):
                number = key.removeprefix(f"{module_name}.").partition(".")[0]
                if key.startswith(f"{module_name}.") and number.isdecimal() and int(number) >= len(module):
                    blocks = f"{len(module)} blocks in {module_name}"
                    raise _wrong_weights_error(name, f"{key}, and its config.json asks for {blocks}")


def check_finite(model: Any, name: str) -> None:
    """Refuse a model with a weight that is not finite: every lane on it would be recorded as diverged."""
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UsageError(
                f"Model {name!r}: {key} holds a number that is not finite as {tensor.dtype}; put the model's "
                "own weights there, or use another --dtype."
            )


def find_head_names(model: Any, name: str, missing_keys: set[str]) -> tuple[str, ...]:
    """Find the modules of a model that are its head.

    These are the modules beside the base model, and linear layers after its blocks that its checkpoint has no
    weights for (often the pooler of BERT).

    Args:
        model: A transformers model with a head, with or without weights.
        name: The name that its user gave.
        missing_keys: The keys of weights that the files lack.

    Returns:
        The names of the modules.

    Raises:
        UsageError: The model is an encoder-decoder, or its files lack weights of the base model.
    """
    from torch.nn import ModuleList

    if model.config.is_encoder_decoder:
        raise UsageError(f"Model {name!r} is an encoder with a decoder; a head needs one or the other.")
    base = _base_modules(model)
    beside_base = [(child, module) for child, module in model.named_children() if child not in base]
    head_children = [child for child, module in beside_base if next(module.parameters(), None) is not None]
    block_lists = [path for path, module in model.named_modules() if isinstance(module, ModuleList)]
    block_prefixes = tuple(f"{path}." for path in block_lists)
    uninitialized = {key.rpartition(".")[0] for key in missing_keys if key.partition(".")[0] in base}
    for module_name in sorted(uninitialized):
        module = model.get_submodule(module_name)
        all_missing = all(f"{module_name}.{key}" in missing_keys for key, _ in module.named_parameters())
        kind = type(module).__name__
        # A layer inside a block belongs to the base model: its weights are missing because the file is cut.
        if kind != "Linear" or not all_missing or module_name.startswith(block_prefixes):
            raise _wrong_weights_error(name, f"no weights for {module_name} ({kind})")
    return (*head_children, *sorted(uninitialized))


def _move_to_device(model: Any, choice: ModelChoice, device: torch.device) -> Any:
    """Move a model to its device, and with `nf4` quantize its blocks.

    Weights whose files have the chosen dtype are memory-mapped; they are copied to the device one by one,
    without a copy in the host's memory. Weights of another dtype are in the host's memory, where transformers
    has converted them. With `nf4` each layer is quantized on the device before the next one is moved.
    """
    if choice.dtype == "nf4":
        _quantize_blocks(model, choice.name, device)
    model = model.to(device)
    if device.type == "cpu":
        # Overwriting a mapped file would change the base model.
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()
    return model


def _quantize_blocks(model: Any, name: str, device: torch.device) -> None:
    from variants.nf4 import quantize_blocks

    if quantize_blocks(model, device) == 0:
        raise UsageError(
            f"Model {name!r}: --dtype nf4 quantizes nn.Linear layers, and {type(model).__name__} has none in "
            "its blocks; take --dtype bfloat16."
        )


def _initialize_heads(model: Any, head_names: Iterable[str]) -> None:
    """Set the linear layers of heads to zero, and heads to float32, in which lanes train them."""
    from torch.nn import Linear

    for name in head_names:
        for module in model.get_submodule(name).float().modules():
            if isinstance(module, Linear):
                for parameter in module.parameters(recurse=False):
                    parameter.zero_()


def load_processor(choice: ModelChoice, root: Path, task: Task) -> Any:
    """Load what makes a base model's inputs.

    Args:
        choice: The model.
        root: The folder of prepared models.
        task: The task, which decides the kind of inputs and whether answers are generated.

    Returns:
        An `ImageProcessor` for an image task, else a tokenizer with a padding token.

    Raises:
        UsageError: The files cannot be loaded, or the tokenizer has no words or lacks a special token.
    """
    from transformers import AutoTokenizer

    from orchestrator.finetune.tasks.image_processor import ImageProcessor

    source, revision = locate_pretrained(choice, root)
    try:
        with base_store.suppress_transformers_logging():
            if task.inputs == "image":
                return ImageProcessor.from_pretrained(source, revision)
            tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
    except Exception as error:  # the tokenizers of Hugging Face raise Exception itself
        raise _loading_error(choice, source, revision, error) from error
    if not set(tokenizer.get_vocab()) - {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}:
        # transformers makes such a tokenizer if it finds no vocabulary: all texts would look the same.
        raise UsageError(
            f"Model {choice.name!r}: its tokenizer has no words; put the tokenizer's files (tokenizer.json, "
            "or a vocabulary) beside the model."
        )
    if tokenizer.eos_token_id is None and not task.has_head:
        raise UsageError(
            f"Model {choice.name!r}: its tokenizer has no end token (eos_token), which answers need."
        )
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UsageError(f"Model {choice.name!r}: its tokenizer has neither a padding nor an end token.")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _loading_error(choice: ModelChoice, source: str, revision: str | None, error: Exception) -> UsageError:
    # transformers raises OSError also for a configuration that is not JSON.
    if revision is not None and isinstance(error, OSError) and "valid JSON" not in str(error):
        return base_store.unreachable_error(choice.name, error)
    remedy = "; remove a damaged file from the hub's cache: it is downloaded again" if revision else ""
    return UsageError(f"Model {choice.name!r} in {source} does not load: {format_error(error)}{remedy}")


def build_meta_model(choice: ModelChoice, root: Path, task: Task) -> tuple[Any, tuple[str, ...]]:
    """Build a base model without weights, on torch's meta device, to check options against.

    Args:
        choice: The model, which may be unprepared if a task pretrains it.
        root: The folder of prepared models.
        task: The task, which decides the head.

    Returns:
        The transformers model, and the names of its head modules that no checkpoint of a base model has.

    Raises:
        UsageError: The configuration cannot be read, or the model does not suit the task.
    """
    import torch

    auto_class, config_overrides = _auto_class(task)
    try:
        config = read_config(choice, root)
        layers = getattr(config.get_text_config(), "num_hidden_layers", None) or 0
        if layers > MAX_LAYERS:
            raise ValueError(f"num_hidden_layers is {layers}; must be {MAX_LAYERS} or less")
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError(
                "its weights are quantized (quantization_config); take its 16-bit weights with --dtype nf4"
            )
        for name, value in config_overrides.items():
            setattr(config, name, value)
        with base_store.suppress_transformers_logging(), torch.device("meta"):
            model = auto_class.from_config(config)
        if choice.dtype == "nf4":
            _quantize_blocks(model, choice.name, torch.device("meta"))
    except UsageError:
        raise
    except Exception as error:  # the configuration and model classes of transformers raise many types
        raise UsageError(
            f"Model {choice.name!r} does not suit task {task.name!r}: {format_error(error)}; correct its "
            "config.json, or use another --model."
        ) from error
    if not task.has_head:
        architecture.check_causal(model, choice.name)
        return model, ()
    head_names = find_head_names(model, choice.name, set())
    if task.inputs == "text":
        architecture.check_head_pooling(model, choice.name)
    return model, head_names


def has_config(choice: ModelChoice) -> bool:
    """Return whether `read_config` knows a model's configuration, and with it the shapes of its layers."""
    return choice.content != UNPREPARED or choice.name in task_bases()


def input_kind(choice: ModelChoice, root: Path) -> Literal["text", "image", ""]:
    """Return the kind of a model's inputs, or an empty text if it is unknown, as before a download."""
    if choice.name in PACKAGED_MODELS:
        return "text"
    from transformers.models.auto import modeling_auto as auto

    if not has_config(choice):
        return ""
    try:
        kind = type(read_config(choice, root))
    except Exception:  # `build_meta_model` reports what is wrong with the configuration
        return ""
    if kind in auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        return "image"
    texts = auto.MODEL_FOR_CAUSAL_LM_MAPPING, auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    return "text" if any(kind in each for each in texts) else ""


def read_config(choice: ModelChoice, root: Path) -> Any:
    """Return the transformers configuration of a model, which must be prepared or pretrained by a task."""
    from transformers import AutoConfig

    if choice.content == UNPREPARED and (task := task_bases().get(choice.name)) is not None:
        return task.base_config()
    source, revision = locate_pretrained(choice, root)
    return AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)


def hidden_size(choice: ModelChoice, root: Path) -> int:
    """Return the width of a prepared model: the hidden size of its text model."""
    return int(read_config(choice, root).get_text_config().hidden_size)


def _auto_class(task: Task) -> tuple[Any, dict[str, Any]]:
    """Return the transformers class for a task, and the values to set in the model's configuration."""
    import transformers

    if not task.has_head:
        return transformers.AutoModelForCausalLM, {}
    is_image = task.inputs == "image"
    kind = "AutoModelForImageClassification" if is_image else "AutoModelForSequenceClassification"
    return getattr(transformers, kind), {"num_labels": task.num_labels}
