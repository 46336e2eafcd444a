"""The output layer of a language model, and whether the model does anything after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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

    The logits differ from that result if a model scales them (Cohere, Granite), caps them (Gemma 2), or
    scales its hidden states first. The test replaces both parts: `model.base_model` returns random hidden
    states, which the output layer must get, and the layer returns random logits, which the model must return.
    Half of the logits are large, because capping changes small ones little.

    Args:
        model: A transformers model without adapters on its output layer, on any device.
    """
    import torch
    from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

    layer, body = find_frozen_output_layer(model), model.base_model
    if layer is None or body is model:
        return False
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 4, layer.in_features, generator=generator).to(layer.weight.dtype)
    scale = torch.tensor([1.0, 1e3])[:, None, None]
    logits = torch.randn(2, 4, 8, generator=generator).mul(scale).to(layer.weight.dtype)
    states = BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden.clone())
    received: list[torch.Tensor] = []

    def return_logits(layer_input: torch.Tensor) -> torch.Tensor:
        received.append(layer_input)
        return logits.clone()

    try:
        with (
            _replaced_forward(body, lambda *_, **__: states),
            _replaced_forward(layer, return_logits),
            torch.no_grad(),
        ):
            ids = torch.zeros(2, 4, dtype=torch.int64, device=layer.weight.device)
            found = model(input_ids=ids, use_cache=False).logits
        return torch.equal(received[0], hidden) and torch.equal(found.to(logits.dtype), logits)
    except Exception:  # the model's forward method needs more of its base model than hidden states
        return False


@contextmanager
def _replaced_forward(module: torch.nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module compute with another forward method."""
    own = module.__dict__.get("forward")  # set where another part of the program has replaced it
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own
