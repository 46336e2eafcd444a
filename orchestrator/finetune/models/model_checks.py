"""Checks that a model which transformers has made suits a task, and that its weights are those of its files.

transformers draws weights at random where a file lacks them or has others, and says so in a warning only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from orchestrator.finetune.models.base_model import BaseModel, is_bidirectional, is_causal
from orchestrator.util.errors import UsageError


def check_weights(model: Any, name: str, loading_info: Mapping[str, Any], has_head: bool) -> None:
    """Refuse a model of which transformers has drawn weights at random, or left some of its files' out.

    Args:
        model: The model as transformers has loaded it.
        name: Its name, for the error.
        info: transformers' loading info: "mismatched_keys", "unexpected_keys" and "missing_keys".
        headed: Whether the model has a head, whose weights in the files are not used.

    Raises:
        BadInput: There are such weights. Of a model with a head, `heads_of` judges the missing ones.
    """
    _check_shapes(model, name, loading_info["mismatched_keys"], has_head)
    _check_block_count(model, name, loading_info["unexpected_keys"])
    lacking = [] if has_head else sorted(loading_info["missing_keys"])
    if lacking:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise UsageError(
            f"Model {name!r}: its files hold no weights for {lacking[0]}{more}: they are those of another "
            "model; put config.json and weights of one model there."
        )


def _base_modules(model: Any) -> set[str]:
    """Return the names of the model's children that are the base, not the head of a task.

    By their class: CLIP's image tower is not called what `base_model_prefix` says.
    """
    from transformers import PreTrainedModel

    return {child for child, module in model.named_children() if isinstance(module, PreTrainedModel)}


def _check_shapes(
    model: Any, name: str, mismatched_keys: Iterable[tuple[str, Any, Any]], has_head: bool
) -> None:
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
    for key, file_shape, model_shape in sorted(mismatched_keys):
        if not has_head or key.partition(".")[0] in base:
            raise UsageError(
                f"Model {name!r}: its files hold {key} of size {list(file_shape)}, and its config.json asks for "
                f"{list(model_shape)}; put config.json and weights of one model there."
            )


def _check_block_count(model: Any, name: str, unexpected_keys: Iterable[str]) -> None:
    """Refuse weights of more blocks than the configuration has: the model would be another than the files'.

    Args:
        model: The model as transformers has loaded it.
        name: Its name, for the error.
        unused: The keys of the weights that have no place in it.

    Raises:
        BadInput: One of them is a block's.
    """
    from torch.nn import ModuleList

    for module_name, module in model.named_modules():
        if isinstance(module, ModuleList):
            for key in sorted(unexpected_keys):
                number = key.removeprefix(f"{module_name}.").partition(".")[0]
                if key.startswith(f"{module_name}.") and number.isdecimal() and int(number) >= len(module):
                    raise UsageError(
                        f"Model {name!r}: its files hold {key}, and its config.json asks for {len(module)} "
                        f"blocks in {module_name}; put config.json and weights of one model there."
                    )


def check_finite(model: Any, name: str) -> None:
    """Refuse a model with a weight that is no finite number: every lane on it would be recorded as diverged.

    Args:
        model: A transformers model with its weights, on the device where checking them is cheapest.
        name: Its name, for the error.

    Raises:
        BadInput: There is such a weight.
    """
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UsageError(
                f"Model {name!r}: {key} holds a number that is not finite as {tensor.dtype}; put the model's "
                "own weights there, or take another --dtype."
            )


def check_causal(model: Any, name: str) -> None:
    """Refuse a model whose tokens attend to later ones: it would see the answer that it has to predict.

    Args:
        model: A transformers model with a language-modelling head, with or without weights.
        name: Its name, for the error.

    Raises:
        BadInput: The model is an encoder (a BERT without is_decoder), an XLNet, or a decoder whose
            configuration says is_causal false. Others that look ahead are found by `_looks_ahead`.
    """
    from transformers import MODEL_FOR_MASKED_LM_MAPPING

    causal_flags = [module.is_causal for module in model.modules() if hasattr(module, "is_causal")]
    config = model.config
    # Some architectures have no such attribute: of these, masked language models attend both ways.
    is_encoder = type(config) in MODEL_FOR_MASKED_LM_MAPPING or config.model_type == "xlnet"
    if is_bidirectional(model) or not (
        any(causal_flags) if causal_flags else getattr(config, "is_decoder", False) or not is_encoder
    ):
        raise not_causal_error(model, name)


def _is_bidirectional(model: Any) -> bool:
    """Return whether the configuration makes a decoder bidirectional (as LLM2Vec does): transformers then
    leaves the causal mask out, while the attention modules say is_causal."""
    return not getattr(model.config.get_text_config(), "is_causal", True)


def attends_to_future_tokens(base_model: BaseModel) -> bool:
    """Return whether another last token changes what a language model with its weights says before it.

    Two rows of eight tokens are computed. Their earlier logits are equal to the bit in causal models that
    were tried; up to 1% of the last token's own change is taken for rounding.
    """
    import torch

    count = base_model.model.config.get_text_config().vocab_size
    first = torch.arange(
        1, 1 + min(8, max_learned_positions(base_model.model) or 8), device=base_model.device
    )
    second = torch.cat([first[:-1], first[-1:] + 1])
    with torch.no_grad():
        logits = base_model.model(input_ids=torch.stack([first, second]) % count, use_cache=False).logits
    changes = (logits[0] - logits[1]).abs().amax(dim=1).tolist()
    return max(changes[:-1], default=0.0) > 0.01 * changes[-1]


def not_causal_error(model: Any, name: str) -> UsageError:
    return UsageError(
        f"Model {name!r} ({type(model).__name__}): its tokens attend to later ones, so it would see the "
        "answer that this task asks for; take a decoder-only model, or a task of classes."
    )


def check_head_pooling(model: Any, name: str) -> None:
    """Refuse a model whose head would not see the whole text.

    Args:
        model: A transformers model with a head for texts, with or without weights.
        name: Its name, for the error.

    Raises:
        BadInput: Nobody knows whether the model is an encoder, whose head reads the first token or all, or a
            decoder, whose head reads the last one; or it is an encoder that is set to see as a decoder does.
    """
    from transformers import MODEL_FOR_MASKED_LM_MAPPING

    is_encoder, kind = type(model.config) in MODEL_FOR_MASKED_LM_MAPPING, type(model).__name__
    if not is_encoder and not is_causal(model):
        raise UsageError(f"Model {name!r} ({kind}): neither an encoder nor a decoder known here.")
    if is_encoder and is_causal(model):
        raise UsageError(
            f"Model {name!r} ({kind}): its head reads the first token, which sees no other with is_decoder; "
            "set is_decoder to false in its config.json."
        )


def max_learned_positions(model: Any) -> int | None:
    """Return how many tokens a model has learnt position embeddings for.

    None where it has no such embeddings, because its positions are rotary or relative.

    Args:
        model: A transformers model, with or without weights.
    """
    from torch.nn import Embedding

    for name, module in model.named_modules():
        if isinstance(module, Embedding) and name.rpartition(".")[2] in _POSITION_EMBEDDING_NAMES:
            # OPT's and BART's tables have an offset; RoBERTa begins after its padding index.
            unused = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - getattr(module, "offset", unused)
    return None


_POSITION_EMBEDDING_NAMES = ("position_embeddings", "wpe", "embed_positions", "positions_embed")


def find_head_names(model: Any, name: str, missing_keys: set[str]) -> tuple[str, ...]:
    """The modules with parameters that are not the base's: what stands beside it, and what its checkpoint has
    no weights for (BERT's pooler, often)."""
    if model.config.is_encoder_decoder:
        raise UsageError(f"Model {name!r} is an encoder with a decoder; heads are for one or the other.")
    base = _base_modules(model)
    head_children = [
        child
        for child, module in model.named_children()
        if child not in base and next(module.parameters(), None) is not None
    ]
    from torch.nn import ModuleList

    block_prefixes = [
        f"{place}." for place, module in model.named_modules() if isinstance(module, ModuleList)
    ]
    uninitialized = {key.rpartition(".")[0] for key in missing_keys if key.partition(".")[0] in base}
    for module_name in sorted(uninitialized):
        module = model.get_submodule(module_name)
        all_missing = all(f"{module_name}.{key}" in missing_keys for key, _ in module.named_parameters())
        # Only a layer after the blocks can be a head: one of a block is the base's, and its file is cut.
        if (
            type(module).__name__ != "Linear"
            or not all_missing
            or module_name.startswith(tuple(block_prefixes))
        ):
            kind = type(module).__name__
            raise UsageError(
                f"Model {name!r}: its files hold no weights for {module_name} ({kind}): they are another model's; "
                "put config.json and weights of one model there."
            )
    return (*head_children, *sorted(uninitialized))
