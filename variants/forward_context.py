"""Which lanes' rows a call of the model computes, and the dropout masks of these lanes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from variants.base import FrozenLayer, Params, Variant, VariantSettings, stable_seed
from variants.errors import UnassignedRowsError


@dataclass(eq=False)
class ForwardContext:
    """What a call of the model computes: K lanes' rows, lane-major. `lanes` is empty for the frozen base."""

    lanes: tuple[str, ...]
    dropout_steps: tuple[int, ...] | None = None
    micro_batch: int = 0
    rows_per_lane: int | None = None
    shard: tuple[int, int] | None = None
    """(first, of): these are the rows from `first` on of `of` that a lane has on all workers together."""
    attention_mask: Tensor | None = None
    """(K*R, L), False at padding."""
    head_weights: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    """For the frozen base: the weights of its heads."""
    called_layers: set[str] = field(default_factory=set)
    mask_draws: dict[str, int] = field(default_factory=dict)
    """Module -> how often its masks were drawn. A model may call a module twice; each call has its own."""
    recomputed_mask_draws: dict[str, int] | None = None
    """The same in the part of the model that is recomputed in backward (`Board.recomputing`)."""
    weight_reads: set[str] = field(default_factory=set)
    prepared_params: dict[str, tuple[list[int], Params]] = field(default_factory=dict)
    """Without gradients (generation, evaluation) the same parameters serve many calls: a layer's prepared
    ones."""
    auxiliary_losses: dict[str, Tensor] = field(default_factory=dict)
    """Layer -> (K,), each lane's term of the auxiliary loss."""

    def auxiliary_loss(self) -> Tensor | None:
        """(K,): the mean over layers, or None where the variant has no such loss."""
        return torch.stack(list(self.auxiliary_losses.values())).mean(0) if self.auxiliary_losses else None


class AdapterState:
    """What all adapted layers of a model share."""

    def __init__(self) -> None:
        self.settings: dict[str, VariantSettings] = {}
        self.seeds: dict[str, int] = {}
        self.dropout = 0.0
        self.current_context: ForwardContext | None = None
        self.last_context: ForwardContext | None = None
        self._scalings: dict[Any, Tensor] = {}

    def get_context(self, layer_name: str) -> ForwardContext:
        """Whose rows `layer` is computing; raises RowsWithoutLane."""
        if self.current_context is not None:
            return self.current_context
        # Gradient checkpointing calls the model again inside backward, when rows() may be closed already:
        # what is recomputed is the latest call, because a loop goes backward before it goes forward again.
        if self.last_context is not None and torch._C._current_graph_task_id() != -1:
            return self.last_context
        raise UnassignedRowsError(
            f"{layer_name} was called outside rows() and off(): no lane owns these rows"
        )

    def checkpoint_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Return contexts for a part of the model that starts now, and for its recomputation in backward.

        The recomputation draws the masks that were drawn the first time.
        """
        context = self.current_context or self.last_context
        return nullcontext(), nullcontext() if context is None else _count_recomputed_draws(
            context, dict(context.mask_draws)
        )

    def scaling(self, variant: Variant, lanes: tuple[str, ...], like: FrozenLayer) -> Tensor:
        """(K, 1, 1)"""
        key = (lanes, like.weight.device, like.dtype)
        if key not in self._scalings:
            factors = [variant.scaling(self.settings[lane]) for lane in lanes]
            made = torch.tensor(factors, dtype=like.dtype, device=like.weight.device)
            self._scalings[key] = made.view(-1, 1, 1)
        return self._scalings[key]

    def invalidate(self) -> None:
        """Lanes have come or gone."""
        self._scalings.clear()
        self.last_context = None


@contextmanager
def _count_recomputed_draws(context: ForwardContext, draws: dict[str, int]) -> Iterator[None]:
    """Count the masks that are drawn in backward from `drawn` on."""
    context.recomputed_mask_draws = draws
    try:
        yield
    finally:
        context.recomputed_mask_draws = None


def _next_call_key(name: str, context: ForwardContext) -> str:
    """Return the module's name and, if the model has called it before, how often. Raises RuntimeError."""
    if torch._C._current_graph_task_id() == -1:
        drawn = context.mask_draws
    elif context.recomputed_mask_draws is not None:
        drawn = context.recomputed_mask_draws
    elif context.mask_draws.get(name, 0) > 1:
        raise RuntimeError(
            f"{name} was called {context.mask_draws[name]} times, and it is not known which call is recomputed; use "
            "orchestrator.finetune.models.activation_checkpointing in place of another gradient checkpointing"
        )
    else:
        drawn = {}
    before = drawn.get(name, 0)
    drawn[name] = before + 1
    return f"{name} {before}" if before else name


def split_by_lane(x: Tensor, context: ForwardContext, layer_name: str) -> Tensor:
    """X (K*R, ..., features) as (K, N, features); raises RowsWithoutLane."""
    lane_count = len(context.lanes)
    size = lane_count * (context.rows_per_lane or 1)
    if (lane_count > 1 or context.rows_per_lane) and (x.dim() < 2 or x.shape[0] % size):
        raise UnassignedRowsError(
            f"{layer_name} was called with {x.shape[0]} rows, not a multiple of {lane_count} lanes x "
            f"{context.rows_per_lane or 1} rows: no lane owns the rest"
        )
    return x.reshape(lane_count, -1, x.shape[-1])


def draw_dropout_masks(
    x: Tensor, p: float, name: str, context: ForwardContext, seeds: Mapping[str, int]
) -> Tensor:
    """Draw the lanes' dropout masks for one module of the model.

    A mask depends on the lane's seed, its step, the module's name, the micro-batch, and how often the model
    has called the module before. A worker that has a part of a lane's rows draws the mask of all of them and
    keeps its own part.

    Args:
        x: The tensor to apply the masks to, (K, N, features).
        p: The probability of a zero.
        name: The module's path in the model.
        rows: Whose rows they are.
        seeds: Lane -> seed.

    Returns:
        (K, N, features): 0 or 1 / (1 - p).
    """
    assert context.dropout_steps is not None
    call_key = _next_call_key(name, context)
    like, local_slice = x[0], slice(None)
    if context.shard is not None and context.rows_per_lane is not None:
        first, total_rows = context.shard
        positions_per_row = x.shape[1] // context.rows_per_lane
        like, local_slice = (
            x.new_empty(total_rows * positions_per_row, x.shape[2]),
            slice(first * positions_per_row, (first + context.rows_per_lane) * positions_per_row),
        )
    found = []
    for lane, step in zip(context.lanes, context.dropout_steps, strict=True):
        generator = torch.Generator(x.device).manual_seed(
            stable_seed(seeds[lane], step, call_key, context.micro_batch)
        )
        mask = torch.empty_like(like).bernoulli_(1 - p, generator=generator).div_(1 - p)
        found.append(mask[local_slice])
    return torch.stack(found)
