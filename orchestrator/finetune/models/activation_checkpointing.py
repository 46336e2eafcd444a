"""Activation checkpointing: blocks of the model are computed again in the backward pass.

Training takes about a third longer and needs the activations of one block instead of all. Numbers stay the
same, since dropout masks depend on the lane's seed and step.

transformers' own gradient checkpointing is not used: it needs training mode, which would turn on the dropout
of the frozen base model, and it makes the output of the embeddings require gradients.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import wraps
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from orchestrator.util.errors import UsageError

CHECKPOINTING_ATTRIBUTE = "has_activation_checkpointing"
"""An attribute that is set on a model with activation checkpointing."""


def enable_activation_checkpointing(model: Any) -> None:
    """Make the blocks of a transformers model compute their activations again in the backward pass.

    Blocks are the modules that transformers itself can checkpoint. The change cannot be undone.

    Raises:
        UsageError: The model has no such blocks.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not blocks:
        raise UsageError(
            f"--gradient-checkpointing: {type(model).__name__} has no blocks that transformers can compute "
            "again; leave the option out."
        )
    for block in blocks:
        block.forward = _checkpoint_forward(block)
    setattr(model, CHECKPOINTING_ATTRIBUTE, True)


def _checkpoint_forward(block: Any) -> Any:
    """Return a forward method that keeps no activations and draws equal dropout masks each time."""
    forward = block.forward

    def context_fn() -> Any:
        state = next((m.adapter_state for m in block.modules() if hasattr(m, "adapter_state")), None)
        return (nullcontext(), nullcontext()) if state is None else state.checkpoint_contexts()

    @wraps(forward)
    def checkpointed_forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():  # evaluation, generation
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, context_fn=context_fn, **kwargs)

    return checkpointed_forward
