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

from orchestrator.util.errors import BadInput

RECOMPUTES = "recomputes_blocks"
"""An attribute of a model whose blocks are."""


def recompute_blocks(model: Any) -> None:
    """From now on, for good. The blocks are those that transformers itself can recompute. Raises BadInput for
    a model without."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not blocks:
        raise BadInput(
            f"--gradient-checkpointing: {type(model).__name__} has no blocks that transformers can compute "
            "again; leave the option out."
        )
    for block in blocks:
        block.forward = _recomputed(block)
    setattr(model, RECOMPUTES, True)


def _recomputed(block: Any) -> Any:
    """Return `block.forward` with its dropout masks and without what it keeps for backward."""
    forward = block.forward

    def contexts() -> Any:
        board = next((module.board for module in block.modules() if hasattr(module, "board")), None)
        return (nullcontext(), nullcontext()) if board is None else board.recomputing()

    @wraps(forward)
    def again(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():  # evaluation, generation
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    return again
