"""The rows that a call of the model computes: their lanes, their dropout masks, the model's own dropout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from variants.api import Params, VariantSettings, stable_seed
from variants.errors import UnassignedRowsError


@dataclass(eq=False)
class ForwardContext:
    """The rows that a call of the model computes: R rows for each of K lanes, one lane after the other."""

    lanes: tuple[str, ...]
    """K lanes; empty for the frozen base model."""
    dropout_steps: Sequence[int] | None = None
    """The optimizer step of each lane, which determines its dropout masks. None in evaluation, which has
    neither dropout nor auxiliary losses."""
    micro_batch: int = 0
    """The number of the micro-batch within the step."""
    rows_per_lane: int | None = None
    """R; if None, layers check only that their number of rows is a multiple of K."""
    shard: tuple[int, int] | None = None
    """(first, total): these rows are those from `first` on of the `total` rows that a lane has on all workers
    together. None if this worker has all of them."""
    attention_mask: Tensor | None = None
    """(K*R, L), False at padding."""
    head_weights: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    """For the frozen base model: head -> parameter -> value, in place of the model's own head."""
    called_layers: set[str] = field(default_factory=set)
    """Adapted layers that the model has called."""
    weight_reads: set[str] = field(default_factory=set)
    """Adapted layers whose weight the model has read."""
    mask_draws: dict[str, int] = field(default_factory=dict)
    """Module -> number of times that its masks were drawn. A model may call a module twice, and each call has
    its own masks."""
    is_recomputation: bool = False
    """True where gradient checkpointing calls a part of the model again, in the backward pass."""
    prepared_params: dict[str, tuple[list[int], Params]] = field(default_factory=dict)
    """Layer -> (versions of the parameters, result of `Variant.prepare`). It is used without gradients, where
    the same parameters serve many calls."""
    auxiliary_losses: dict[str, Tensor] = field(default_factory=dict)
    """Layer -> auxiliary loss of each lane, (K,)."""
    row_multiple: int = field(init=False)
    """The number of rows of every layer's input is a multiple of this; 0 without lanes."""

    def __post_init__(self) -> None:
        self.row_multiple = len(self.lanes) * (self.rows_per_lane or 1)

    def auxiliary_loss(self) -> Tensor | None:
        """Return the mean auxiliary loss over layers, (K,), or None if no layer has computed one."""
        return torch.stack(list(self.auxiliary_losses.values())).mean(0) if self.auxiliary_losses else None


class AdapterState:
    """State that all adapted layers of a model share.

    Attributes:
        settings: Lane -> settings.
        seeds: Lane -> seed.
        current_context: The context of the calls being made; None outside any context.
        generation: A number that changes with the set of lanes.
    """

    def __init__(self) -> None:
        self.settings: dict[str, VariantSettings] = {}
        self.seeds: dict[str, int] = {}
        self.current_context: ForwardContext | None = None
        self.generation = 0

    def get_context(self, layer_name: str) -> ForwardContext:
        """Return the context of the rows that a layer is computing.

        Raises:
            UnassignedRowsError: The layer was called outside any context.
        """
        if self.current_context is None:
            raise UnassignedRowsError(
                f"{layer_name} was called outside activate_lanes() and disable_adapters(): "
                "its rows belong to no lane"
            )
        return self.current_context

    @contextmanager
    def activate(self, context: ForwardContext) -> Iterator[None]:
        """Let calls of the model compute the rows of a context."""
        before, self.current_context = self.current_context, context
        try:
            yield
        finally:
            self.current_context = before

    def checkpoint_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Return the two context managers that `context_fn` of `torch.utils.checkpoint` has to return.

        The first is for the computation of a part of the model, which starts right after this call. The
        second is for the recomputation in the backward pass, when `activate_lanes` may have ended. It draws
        the same masks, because it counts the draws from where they stand now.
        """
        context = self.current_context
        if context is None:
            return nullcontext(), nullcontext()
        again = replace(context, mask_draws=dict(context.mask_draws), is_recomputation=True)
        return nullcontext(), self.activate(again)


def check_rows(x: Tensor, context: ForwardContext, layer_name: str) -> None:
    """Check that every row of a layer's input (K*R, ..., features) belongs to a lane.

    Raises:
        UnassignedRowsError: The number of rows is not a multiple of the number of lanes, or of K * R.
    """
    if (x.dim() < 2 and context.row_multiple > 1) or x.shape[0] % context.row_multiple:
        raise UnassignedRowsError(
            f"{layer_name} was called with {x.shape[0]} rows, not a multiple of {len(context.lanes)} lanes x "
            f"{context.rows_per_lane or 1} rows: the other rows belong to no lane"
        )


def split_by_lane(x: Tensor, context: ForwardContext, layer_name: str) -> Tensor:
    """Return rows (K*R, ..., features) as (K, N, features); see `check_rows`."""
    check_rows(x, context, layer_name)
    return x.reshape(len(context.lanes), -1, x.shape[-1])


def draw_dropout_masks(
    x: Tensor, p: float, name: str, context: ForwardContext, seeds: Mapping[str, int]
) -> Tensor:
    """Draw the lanes' dropout masks for one module of the model.

    A mask depends on the lane's seed, its step, the module's name, the micro-batch, and the number of earlier
    calls of the module in this context. A worker that has a part of a lane's rows draws the mask of all rows
    and keeps its own part.

    Args:
        x: The tensor to apply the masks to, (K, N, features).
        p: The probability of a zero.
        name: The module's path in the model.
        context: The context of the call.
        seeds: Lane -> seed.

    Returns:
        (K, N, features), each value 0 or 1 / (1 - p).

    Raises:
        RuntimeError: Another gradient checkpointing than `AdapterState.checkpoint_contexts` recomputes the
            call, so that it is unknown which masks it drew.
    """
    assert context.dropout_steps is not None
    if not context.is_recomputation and torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            f"{name} is called again in the backward pass, and the masks of its first call are unknown: "
            "use orchestrator.finetune.models.changes and no other gradient checkpointing"
        )
    earlier_calls = context.mask_draws.get(name, 0)
    context.mask_draws[name] = earlier_calls + 1
    call_key = f"{name} {earlier_calls}" if earlier_calls else name
    like, first, count = x[0], 0, x.shape[1]
    if context.shard is not None and context.rows_per_lane is not None:
        positions_per_row = count // context.rows_per_lane
        first, total = (rows * positions_per_row for rows in context.shard)
        like = x.new_empty(total, x.shape[2])
    masks = []
    for lane, step in zip(context.lanes, context.dropout_steps, strict=True):
        seed = stable_seed(seeds[lane], step, call_key, context.micro_batch)
        generator = torch.Generator(x.device).manual_seed(seed)
        mask = torch.empty_like(like).bernoulli_(1 - p, generator=generator).div_(1 - p)
        masks.append(mask[first : first + count])
    return torch.stack(masks)


class TableDropout(nn.Dropout):
    """Dropout whose input is a table (T, features) that all rows of a batch share.

    The class only marks such modules for `LaneDropout`. DeBERTa's embeddings of T relative positions are an
    example.
    """


class LaneDropout(nn.Module):
    """Dropout of the model with separate masks for each lane.

    It replaces an `nn.Dropout` of the model, or a `TableDropout` if `is_table`. Every attention module of
    transformers also gets one as `lane_dropout`, for the attention probabilities. The input is returned
    unchanged unless lanes are in training. The masks depend on the module's path in the model, `name`.
    """

    def __init__(self, name: str, p: float, adapter_state: AdapterState, is_table: bool = False) -> None:
        super().__init__()
        self.name, self.p, self.adapter_state, self.is_table = name, p, adapter_state, is_table

    @property
    def active(self) -> bool:
        """Whether the rows of the current context belong to lanes in training."""
        context = self.adapter_state.get_context(self.name)
        return bool(context.lanes) and context.dropout_steps is not None

    def forward(self, x: Tensor, p: float | None = None) -> Tensor:
        """Zero some values, and divide the others by 1 - p, if lanes are in training.

        Args:
            x: The rows of K lanes, (K*R, ...), one lane after the other; or a table, (T, features), which in
                training becomes (K*R, T, features), with one mask per lane.
            p: A probability to use in place of the module's own.
        """
        p = self.p if p is None else p
        if p == 0 or not self.active:
            return x
        context, seeds = self.adapter_state.get_context(self.name), self.adapter_state.seeds
        if self.is_table:
            tables = x.expand(len(context.lanes), -1, -1)
            masks = draw_dropout_masks(tables, p, self.name, replace(context, shard=None), seeds)
            return (tables * masks).repeat_interleave(context.rows_per_lane or 1, dim=0)
        flat = split_by_lane(x, context, self.name)
        return (flat * draw_dropout_masks(flat, p, self.name, context, seeds)).view(x.shape)
