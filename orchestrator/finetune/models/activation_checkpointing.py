"""Gradient checkpointing: what a block of the model computes on its way is not kept but computed again in
backward. About a third more time, and memory for one block instead of all; the same numbers, as dropout masks
follow from the lane's seed and step.

transformers' own switch is not used: it works in training mode only, which would turn on the dropout of the
frozen base, and it makes the embeddings' output require gradients that nobody needs.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import wraps
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from orchestrator.util.errors import UsageError

CHECKPOINTING_ATTRIBUTE = "has_activation_checkpointing"
"""An attribute of a model whose blocks are."""


def enable_activation_checkpointing(model: Any) -> None:
    """From now on, for good. The blocks are those that transformers itself can recompute. Raises BadInput for
    a model without."""
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
    """Return `block.forward` with its dropout masks and without what it keeps for backward."""
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
