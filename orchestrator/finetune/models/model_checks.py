"""Checks that a model which transformers has made suits a task, and that its weights are those of its files.

transformers draws weights at random where a file lacks them or has others, and says so in a warning only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from orchestrator.util.errors import BadInput

if TYPE_CHECKING:
    from orchestrator.finetune.models.loading import Bench


def check_weights(model: Any, name: str, info: Mapping[str, Any], headed: bool) -> None:
    """Refuse a model of which transformers has drawn weights at random, or left some of its files' out.

    Args:
        model: The model as transformers has loaded it.
        name: Its name, for the error.
        info: transformers' loading info: "mismatched_keys", "unexpected_keys" and "missing_keys".
        headed: Whether the model has a head, whose weights in the files are not used.

    Raises:
        BadInput: There are such weights. Of a model with a head, `heads_of` judges the missing ones.
    """
    _check_sizes(model, name, info["mismatched_keys"], headed)
    _check_count(model, name, info["unexpected_keys"])
    lacking = [] if headed else sorted(info["missing_keys"])
    if lacking:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise BadInput(
            f"Model {name!r}: its files hold no weights for {lacking[0]}{more}: they are those of another "
            "model; put config.json and weights of one model there."
        )


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
            raise BadInput(
                f"Model {name!r}: {key} holds a number that is not finite as {tensor.dtype}; put the model's "
                "own weights there, or take another --dtype."
            )


def check_next_tokens(model: Any, name: str) -> None:
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
        raise sees_answer(model, name)


def _unmasked(model: Any) -> bool:
    """Return whether the configuration makes a decoder bidirectional (as LLM2Vec does): transformers then
    leaves the causal mask out, while the attention modules say is_causal."""
    return not getattr(model.config.get_text_config(), "is_causal", True)


def looks_ahead(bench: Bench) -> bool:
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


def sees_answer(model: Any, name: str) -> BadInput:
    return BadInput(
        f"Model {name!r} ({type(model).__name__}): its tokens attend to later ones, so it would see the "
        "answer that this task asks for; take a decoder-only model, or a task of classes."
    )


def is_causal(model: Any) -> bool:
    return not _unmasked(model) and any(getattr(module, "is_causal", False) for module in model.modules())


def check_reading(model: Any, name: str) -> None:
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
    if not encoder and not is_causal(model):
        raise BadInput(f"Model {name!r} ({kind}): neither an encoder nor a decoder known here.")
    if encoder and is_causal(model):
        raise BadInput(
            f"Model {name!r} ({kind}): its head reads the first token, which sees no other with is_decoder; "
            "set is_decoder to false in its config.json."
        )


def positions(model: Any) -> int | None:
    """Return how many tokens a model has learnt position embeddings for.

    None where it has no such embeddings, because its positions are rotary or relative.

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


def heads_of(model: Any, name: str, missing: set[str]) -> tuple[str, ...]:
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
