"""The frozen model's own dropout, with separate masks for each lane."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from variants.forward_context import AdapterState, draw_dropout_masks, split_by_lane


class TableDropout(nn.Dropout):
    """Mark dropout of a table that all rows of a batch share, with input (T, features).

    DeBERTa's embeddings of T relative positions are such a table.
    """


class LaneDropout(nn.Module):
    """Apply dropout in training, with separate masks for each lane.

    It replaces an `nn.Dropout` of the model; every attention module gets one more, for the attention
    probabilities. When no lane is trained it returns its input.
    """

    def __init__(self, name: str, p: float, adapter_state: AdapterState, is_table: bool = False) -> None:
        """Args:
        name: The module's path in the model. The masks depend on it.
        p: The probability that a number is zeroed.
        board: Knows which lanes' rows are computed.
        table: Whether it replaces a `TableDropout`.
        """
        super().__init__()
        self.name, self.p, self.adapter_state, self.is_table = name, p, adapter_state, is_table

    @property
    def active(self) -> bool:
        """Whether the rows being computed belong to lanes in training."""
        context = self.adapter_state.get_context(self.name)
        return bool(context.lanes) and context.dropout_steps is not None

    def forward(self, x: Tensor, p: float | None = None) -> Tensor:
        """Zero numbers of `x` while lanes are trained.

        Args:
            x: The rows of K lanes, lane-major, (K*R, ...); or a table, (T, features).
            p: Replaces the module's own probability.

        Returns:
            `x` with zeros, the rest divided by 1 - p. For a table (K*R, T, features), with one mask per lane.
        """
        p = self.p if p is None else p
        if p == 0 or not self.active:
            return x
        context = self.adapter_state.get_context(self.name)
        if self.is_table:
            lane_tables = x.expand(len(context.lanes), -1, -1)
            lane_tables = lane_tables * draw_dropout_masks(
                lane_tables, p, self.name, replace(context, shard=None), self.adapter_state.seeds
            )
            return lane_tables.repeat_interleave(context.rows_per_lane or 1, dim=0)
        flat = split_by_lane(x, context, self.name)
        return (flat * draw_dropout_masks(flat, p, self.name, context, self.adapter_state.seeds)).view(
            x.shape
        )
