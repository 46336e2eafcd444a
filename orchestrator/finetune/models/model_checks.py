"""Checks that a loaded model suits its task and has the weights of its files.

If a file lacks weights, or has weights of another shape, transformers draws random ones and only warns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from orchestrator.finetune.models.base_model import BaseModel, is_bidirectional, is_causal
from orchestrator.util.errors import UsageError


def check_weights(model: Any, name: str, loading_info: Mapping[str, Any], has_head: bool) -> None:
    """Refuse a model with random weights, or without some weights of its files.

    Args:
        model: The loaded transformers model.
        name: The model's name, for the error.
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
    remedy = "put config.json and weights of one model there"
    return UsageError(f"Model {name!r}: its files hold {found}; {remedy}.")


def _base_modules(model: Any) -> set[str]:
    """Return the names of the model's children that belong to the base model and not to a head.

    They are found by their class, because CLIP's image tower has another name than `base_model_prefix`.
    """
    from transformers import PreTrainedModel

    return {child for child, module in model.named_children() if isinstance(module, PreTrainedModel)}


def _check_block_count(model: Any, name: str, unexpected_keys: Iterable[str]) -> None:
    """Refuse weights of more blocks than the configuration has, which transformers leaves out.

    Args:
        model: The loaded transformers model.
        name: The model's name, for the error.
        unexpected_keys: The keys of weights that are in the files but not in the model.

    Raises:
        UsageError: One of the weights belongs to a block.
    """
    from torch.nn import ModuleList

    for module_name, module in model.named_modules():
        if isinstance(module, ModuleList):
            for key in sorted(unexpected_keys):
                number = key.removeprefix(f"{module_name}.").partition(".")[0]
                if key.startswith(f"{module_name}.") and number.isdecimal() and int(number) >= len(module):
                    blocks = f"{len(module)} blocks in {module_name}"
                    raise _wrong_weights_error(name, f"{key}, and its config.json asks for {blocks}")


def check_finite(model: Any, name: str) -> None:
    """Refuse a model with a weight that is not finite: every lane on it would be recorded as diverged.

    Args:
        model: A transformers model with weights.
        name: The model's name, for the error.

    Raises:
        UsageError: There is such a weight.
    """
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UsageError(
                f"Model {name!r}: {key} holds a number that is not finite as {tensor.dtype}; put the model's "
                "own weights there, or use another --dtype."
            )


def check_causal(model: Any, name: str) -> None:
    """Refuse a model whose configuration makes tokens attend to later ones, which are the answer to predict.

    Args:
        model: A transformers model with a language-modelling head, with or without weights.
        name: The model's name, for the error.

    Raises:
        UsageError: The model is an encoder (for instance a BERT without is_decoder), an XLNet, or a decoder
            with is_causal false. `attends_to_future_tokens` finds the other models.
    """
    from transformers import MODEL_FOR_MASKED_LM_MAPPING

    causal_flags = [module.is_causal for module in model.modules() if hasattr(module, "is_causal")]
    config = model.config
    # Of architectures without the attribute is_causal, masked language models are bidirectional.
    is_encoder = type(config) in MODEL_FOR_MASKED_LM_MAPPING or config.model_type == "xlnet"
    if is_bidirectional(model) or not (
        any(causal_flags) if causal_flags else getattr(config, "is_decoder", False) or not is_encoder
    ):
        raise not_causal_error(model, name)


def attends_to_future_tokens(base_model: BaseModel) -> bool:
    """Return whether the last token changes a language model's logits at earlier positions.

    The function compares the logits of two rows of up to eight tokens that differ in the last token. In the
    causal models that were tried, the logits at earlier positions are equal to the bit. A difference of up to
    1% of the difference at the last position counts as rounding.
    """
    import torch

    count = base_model.model.config.get_text_config().vocab_size
    length = min(8, max_learned_positions(base_model.model) or 8)
    first = torch.arange(1, 1 + length, device=base_model.device)
    second = torch.cat([first[:-1], first[-1:] + 1])
    with torch.no_grad():
        logits = base_model.model(input_ids=torch.stack([first, second]) % count, use_cache=False).logits
    changes = (logits[0] - logits[1]).abs().amax(dim=1).tolist()
    return max(changes[:-1], default=0.0) > 0.01 * changes[-1]


def not_causal_error(model: Any, name: str) -> UsageError:
    """Return the error for a model that is not causal but must generate or predict an answer."""
    return UsageError(
        f"Model {name!r} ({type(model).__name__}): its tokens attend to later ones, so it would see the "
        "answer that it has to give; use a decoder-only model, or a classification task."
    )


def check_head_pooling(model: Any, name: str) -> None:
    """Refuse a model whose head might not read the whole text.

    The head of an encoder reads the first token or all tokens, that of a decoder the last one.

    Args:
        model: A transformers model with a head for texts, with or without weights.
        name: The model's name, for the error.

    Raises:
        UsageError: It is unknown whether the model is an encoder or a decoder, or it is an encoder whose
            configuration makes it causal.
    """
    from transformers import MODEL_FOR_MASKED_LM_MAPPING

    is_encoder, kind = type(model.config) in MODEL_FOR_MASKED_LM_MAPPING, type(model).__name__
    if not is_encoder and not is_causal(model):
        raise UsageError(f"Model {name!r} ({kind}): neither an encoder nor a decoder known here.")
    if is_encoder and is_causal(model):
        raise UsageError(
            f"Model {name!r} ({kind}): its head reads the first token, which attends to no other one; "
            "set is_decoder to false in its config.json."
        )


def max_learned_positions(model: Any) -> int | None:
    """Return the number of learned position embeddings of a model, with or without weights.

    The result is None for a model whose positions are rotary or relative, since it has no such embeddings.
    """
    from torch.nn import Embedding

    for name, module in model.named_modules():
        if isinstance(module, Embedding) and name.rpartition(".")[2] in _POSITION_EMBEDDING_NAMES:
            # The tables of OPT and BART begin at an offset, that of RoBERTa after the padding index.
            unused = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - getattr(module, "offset", unused)
    return None


_POSITION_EMBEDDING_NAMES = ("position_embeddings", "wpe", "embed_positions", "positions_embed")


def find_head_names(model: Any, name: str, missing_keys: set[str]) -> tuple[str, ...]:
    """Find the modules of a model that are its head.

    These are the modules beside the base model, and linear layers after its blocks that its checkpoint has no
    weights for (often the pooler of BERT).

    Args:
        model: A transformers model with a head, with or without weights.
        name: The model's name, for the error.
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
