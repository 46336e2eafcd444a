"""The output layer of a language model, and whether the model does anything after it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def find_frozen_output_layer(model: Any) -> torch.nn.Linear | None:
    """Return the linear layer that makes a language model's logits; None if lanes adapt or train it."""
    from torch.nn import Linear

    layer = model.get_output_embeddings()
    # The replacement of an adapted layer has another type, and the weight of a trained one needs a gradient.
    return layer if type(layer) is Linear and not layer.weight.requires_grad else None


def ends_with_output_layer(model: Any) -> bool:
    """Return whether a model's logits are its output layer's result for the hidden states of its base model.

    They are not where a model scales its logits (Cohere, Granite) or caps them (Gemma 2), or scales its
    hidden states first. This is tried with random hidden states, which `model.base_model` returns in place of
    its own. Half of them are large, because capping changes only large logits.

    Args:
        model: A transformers model without adapters on its output layer.
    """
    import torch
    from transformers.modeling_outputs import BaseModelOutputWithPast

    layer, body = find_frozen_output_layer(model), model.base_model
    if layer is None or body is model:
        return False
    weight = layer.weight
    hidden = torch.randn(2, 4, weight.shape[1], generator=torch.Generator().manual_seed(0))
    hidden = (hidden * torch.tensor([1.0, 1e3])[:, None, None]).to(weight)
    instance_forward = body.__dict__.get("forward")
    body.forward = lambda *args, **kwargs: BaseModelOutputWithPast(last_hidden_state=hidden)
    try:
        with torch.no_grad():
            ids = torch.zeros(2, 4, dtype=torch.int64, device=weight.device)
            logits, expected = model(input_ids=ids, use_cache=False).logits, layer(hidden)
    except Exception:  # the model's forward method needs more of its base model than hidden states
        return False
    finally:
        del body.forward
        if instance_forward is not None:
            body.forward = instance_forward
    tolerance = 1e-2 if weight.dtype in (torch.bfloat16, torch.float16) else 1e-4
    return logits.shape == expected.shape and torch.allclose(
        logits.to(expected.dtype), expected, rtol=tolerance, atol=tolerance
    )
