"""Dropout of attention probabilities in a base model, with separate masks for each lane.

Some base models have dropout of their own: RoBERTa, BERT, DeBERTa and GPT-2 have a rate of 0.1. In training
mode transformers draws its masks from the global random state, so a lane's numbers would depend on the other
lanes of its group. `variants.base_dropout` therefore replaces the dropout modules of the model. PyTorch's
fused attention draws masks by itself, so attention with dropout is computed here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from variants.api import UnsupportedError

SUPPORTED_MODEL_TYPES = ("bert", "deberta", "deberta-v2", "distilbert", "electra", "gpt2", "roberta")
"""Values of `config.model_type` of models that have dropout only in `nn.Dropout` modules and in attention."""
_WITHOUT_ATTENTION_INTERFACE = ("deberta", "deberta-v2")
"""Model types whose attention applies an `nn.Dropout` module and does not call an attention function."""
ATTENTION_IMPLEMENTATION = "lane_dropout"
"""The name under which `_lane_dropout_attention` is registered with transformers."""
_ORIGINAL_ATTENTION = "original_attention"
"""The attribute that keeps the name of a model's original attention function."""


def check_dropout_supported(model: Any, name: str) -> None:
    """Refuse a model without dropout of its own, or of an unsupported type.

    Args:
        model: A transformers model, with or without weights.
        name: The model's name, for the error.

    Raises:
        UnsupportedError: The model cannot be trained with --base-dropout on.
    """
    model_type = model.config.model_type
    has_dropout = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    if model_type not in SUPPORTED_MODEL_TYPES or not has_dropout:
        what = (
            "has no dropout of its own"
            if model_type in SUPPORTED_MODEL_TYPES
            else f"has type {model_type!r}; must be one of {', '.join(SUPPORTED_MODEL_TYPES)}"
        )
        raise UnsupportedError(f"--base-dropout on: model {name!r} {what}. Use --base-dropout off.")


def enable_lane_dropout(model: Any) -> None:
    """Make the attention of a model apply the lanes' dropout masks to its probabilities.

    `variants.attach.attach` must have been called with `base_dropout`, which gives every attention module a
    `LaneDropout`.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION_IMPLEMENTATION, _lane_dropout_attention)
    AttentionMaskInterface.register(ATTENTION_IMPLEMENTATION, sdpa_mask)
    if model.config.model_type not in _WITHOUT_ATTENTION_INTERFACE:
        setattr(model, _ORIGINAL_ATTENTION, model.config._attn_implementation)
        model.config._attn_implementation = ATTENTION_IMPLEMENTATION


def disable_lane_dropout(model: Any) -> None:
    """Give a model back its original attention function."""
    if model.config._attn_implementation == ATTENTION_IMPLEMENTATION:
        model.config._attn_implementation = getattr(model, _ORIGINAL_ATTENTION)


def _lane_dropout_attention(  # noqa: PLR0913 (the signature is transformers')
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention, with the lanes' dropout masks on its probabilities while lanes are trained.

    The signature is that of transformers' attention functions.

    Args:
        module: The attention module, with a `LaneDropout` in its attribute `lane_dropout`.
        query: (rows, heads, length, head size).
        key: (rows, heads, length, head size).
        value: (rows, heads, length, head size).
        attention_mask: Broadcasts to (rows, heads, length, length). Boolean masks are True where a token is
            attended to, others are added to the scores. None: every token is attended to, or with `is_causal`
            every earlier one.
        dropout: The dropout rate.
        scaling: The factor of the scores; by default 1 / sqrt(head size).
        is_causal: True for causal attention; by default the module's value.
        **kwargs: Passed on to transformers' attention.

    Returns:
        The output, (rows, length, heads, head size), and None in place of the probabilities.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if dropout == 0 or not module.lane_dropout.active:  # type: ignore[union-attr]
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, 0.0, scaling, is_causal, **kwargs
        )
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    causal = module.is_causal if is_causal is None else is_causal
    if attention_mask is None and causal:
        attention_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
        else:
            scores = scores + attention_mask
    wide = torch.promote_types(scores.dtype, torch.float32)
    probabilities = scores.softmax(-1, dtype=wide).to(query.dtype)
    out = module.lane_dropout(probabilities, dropout) @ value  # type: ignore[operator]
    return out.transpose(1, 2).contiguous(), None
