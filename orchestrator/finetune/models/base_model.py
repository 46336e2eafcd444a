"""A frozen base model that carries the adapters of lanes, and what its architecture does.

The checks here refuse models that transformers would train without an error, on the wrong task.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from orchestrator.util.errors import UsageError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class BaseModel:
    """A base model in eval mode and without gradients, in the dtype of its `ModelChoice`."""

    model: Any
    """The transformers model."""
    processor: Any
    """Makes the model's inputs: a tokenizer with a padding token, or an `ImageProcessor`. A tokenizer for
    answers has an end token as well."""
    device: torch.device
    """The device of the model."""
    head_names: tuple[str, ...] = ()
    """The modules of the task's head. Here their linear layers are zero; every lane has its own copy."""
    kernels: str = "torch"
    """The code of norms, rotary embeddings and activations: "torch", or "liger" and its version."""
    memory_fraction: float = 1.0
    """The part of the GPU's memory that the trainer may use when trainers share a GPU: 0.5 is half of it."""

    @property
    def tokenizer(self) -> Any:
        """The processor of a model that reads text."""
        return self.processor

    @cached_property
    def is_causal(self) -> bool:
        """Whether a token attends only to the tokens before it."""
        return is_causal(self.model)

    @cached_property
    def has_token_types(self) -> bool:
        """Whether token types 0 and 1 have embeddings (RoBERTa has only 0, DeBERTa-v3 neither)."""
        return (getattr(self.model.config, "type_vocab_size", None) or 0) > 1

    @cached_property
    def has_sliding_window(self) -> bool:
        """Whether a token attends only to its neighbors in some layers."""
        return any("sliding" in kind for kind in getattr(self.model.config, "layer_types", None) or ())

    @cached_property
    def has_convolution(self) -> bool:
        """Whether the model is a DeBERTa-v2 with a convolution (xlarge), which also reads padding."""
        config = self.model.config
        return config.model_type == "deberta-v2" and getattr(config, "conv_kernel_size", 0) > 0

    @cached_property
    def ends_with_output_layer(self) -> bool:
        """Whether a language model's logits are `output_layer(base_model(ids))`, and nothing else is applied.

        They are not if the model scales them (Cohere, Granite), caps them (Gemma 2), or scales its hidden
        states first. The test replaces both parts: the base model returns random hidden states, which the
        output layer must get, and the layer returns random logits, which the model must return. Half of the
        logits are large, because capping changes small ones little.
        """
        import torch
        from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

        layer, body = find_frozen_output_layer(self.model), self.model.base_model
        if layer is None or body is self.model:
            return False
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(2, 4, layer.in_features, generator=generator).to(layer.weight.dtype)
        scale = torch.tensor([1.0, 1e3])[:, None, None]
        logits = torch.randn(2, 4, 8, generator=generator).mul(scale).to(layer.weight.dtype)
        states = BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden.clone())
        ids = torch.zeros(2, 4, dtype=torch.int64, device=layer.weight.device)
        try:
            with (
                torch.no_grad(),
                patch.object(body, "forward", return_value=states),
                patch.object(layer, "forward", return_value=logits.clone()) as call,
            ):
                found = self.model(input_ids=ids, use_cache=False).logits
            is_input = torch.equal(call.call_args.args[0], hidden)
            return is_input and torch.equal(found.to(logits.dtype), logits)
        except Exception:  # the model's forward method needs more of its base model than hidden states
            return False


def is_causal(model: Any) -> bool:
    """Return whether a transformers model has an attention module that is causal."""
    return not is_bidirectional(model) and any(
        getattr(module, "is_causal", False) for module in model.modules()
    )


def is_bidirectional(model: Any) -> bool:
    """Return whether the configuration makes a decoder bidirectional, as LLM2Vec does.

    transformers then leaves the causal mask out, although the attention modules still say `is_causal`.
    """
    return not getattr(model.config.get_text_config(), "is_causal", True)


def check_causal(model: Any, name: str) -> None:
    """Refuse a language model whose configuration lets a token attend to later ones.

    Such a model would read the answer that it has to predict. `attends_to_future_tokens` finds models whose
    configuration does not show it.

    Raises:
        UsageError: The model is an encoder (for instance a BERT without is_decoder), an XLNet, or a decoder
            with is_causal false.
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


def find_frozen_output_layer(model: Any) -> torch.nn.Linear | None:
    """Return the linear layer that makes a language model's logits; None if lanes adapt or train it."""
    from torch.nn import Linear

    layer = model.get_output_embeddings()
    # The replacement of an adapted layer has another type, and the weight of a trained one needs a gradient.
    return layer if type(layer) is Linear and not layer.weight.requires_grad else None


@contextmanager
def without_packing_check() -> Iterator[None]:
    """Tell transformers that no row holds several sequences.

    Without an attention mask, transformers searches the position ids for packed sequences, and the host waits
    for the device in every forward pass. A mask would avoid the search, but only some models accept one. A
    version of transformers without the searching function is left unchanged.
    """
    from transformers import masking_utils

    name = "find_packed_sequence_indices"
    has_search = hasattr(masking_utils, name)
    with patch.object(masking_utils, name, lambda position_ids: None) if has_search else nullcontext():
        yield
