"""The dropout that a base model has of its own (RoBERTa, BERT, DeBERTa and GPT-2: 0.1), on in training.

transformers' own switch, training mode, draws masks from the process's random state: lanes would depend on
their company. `variants.base_dropout` replaces the model's dropout modules; the dropout of attention's
probabilities is inside PyTorch's fused kernel, and is computed here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from variants.contract import Unsupported

KINDS = ("bert", "deberta", "deberta-v2", "distilbert", "electra", "gpt2", "roberta")
"""Values of `config.model_type` whose dropout is known to be all in modules and in attention's function."""
_OWN_ATTENTION = ("deberta", "deberta-v2")  # with a dropout module in it
ATTENTION = "lane_dropout"
"""Our attention function, as transformers knows it."""


def check(model: Any, name: str) -> None:
    """Refuse a model whose dropout could not be given to lanes, or that has none.

    Args:
        model: A transformers model, with or without weights.
        name: Its name, for the error.

    Raises:
        Unsupported: `--base-dropout on` makes no sense for it.
    """
    kind = model.config.model_type
    drops = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    if kind not in KINDS or not drops:
        what = (
            "has no dropout of its own"
            if kind in KINDS
            else f"is a {kind!r}, whose dropout is not known here"
        )
        raise Unsupported(f"--base-dropout on: model {name!r} {what}; take --base-dropout off")


def turn_on(model: Any) -> None:
    """Let the attention modules of `model` drop out by lanes' masks.

    Their adapters (`variants.attach.attach` with `base_dropout`) have to be there.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    if model.config.model_type not in _OWN_ATTENTION:
        model.config._attn_implementation = ATTENTION


def turn_off(model: Any) -> None:
    """Give the attention modules back what `turn_on` took from them."""
    if model.config._attn_implementation == ATTENTION:
        model.config._attn_implementation = "sdpa"


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Compute attention, with lanes' masks on its probabilities while lanes train.

    Args:
        module: The attention module, with a `LaneDropout` named `lane_dropout`.
        query, key, value: (rows, heads, length, size of a head).
        attention_mask: Broadcasts to (rows, heads, length, length): True where a token is seen, or numbers to
            add; None: all tokens are seen, or those before, if `is_causal`.
        dropout: Probability that a probability is zeroed.
        scaling: Of the products; by default 1 / sqrt(size of a head).
        is_causal: By default the module's.

    Returns:
        (rows, length, heads, size of a head), and None in place of the probabilities.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if dropout == 0 or not module.lane_dropout.active:  # type: ignore[union-attr]
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, 0.0, scaling, is_causal, **more
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
