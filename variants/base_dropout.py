"""The frozen model's own dropout, with separate masks for each lane."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from variants.forward_context import AdapterState, draw_dropout_masks, split_by_lane


class TableDropout(nn.Dropout):
    """Dropout whose input is a table (T, features) that all rows of a batch share.

    The class only marks such modules for `LaneDropout`. DeBERTa's embeddings of T relative positions are an
    example.
    """


class LaneDropout(nn.Module):
    """Dropout of the model with separate masks for each lane.

    It replaces an `nn.Dropout` of the model. Every attention module of transformers also gets one as
    `lane_dropout`, for the attention probabilities. The input is returned unchanged unless lanes are in
    training.
    """

    def __init__(self, name: str, p: float, adapter_state: AdapterState, is_table: bool = False) -> None:
        """Create the module.

        Args:
            name: The module's path in the model, which determines the masks.
            p: The probability of a zero.
            adapter_state: The state that all adapted layers share.
            is_table: True if the module replaces a `TableDropout`.
        """
        super().__init__()
        self.name, self.p, self.adapter_state, self.is_table = name, p, adapter_state, is_table

    @property
    def active(self) -> bool:
        """Whether the rows of the current context belong to lanes in training."""
        context = self.adapter_state.get_context(self.name)
        return bool(context.lanes) and context.dropout_steps is not None

    def forward(self, x: Tensor, p: float | None = None) -> Tensor:
        """Apply dropout if lanes are in training.

        Args:
            x: The rows of K lanes, (K*R, ...), one lane after the other; or a table, (T, features).
            p: A probability to use in place of the module's own.

        Returns:
            `x` with some values zeroed and the others divided by 1 - p. A table in training becomes
            (K*R, T, features), with one mask per lane.
        """
        p = self.p if p is None else p
        if p == 0 or not self.active:
            return x
        context = self.adapter_state.get_context(self.name)
        if self.is_table:
            lane_tables = x.expand(len(context.lanes), -1, -1)
            unsharded = replace(context, shard=None)
            masks = draw_dropout_masks(lane_tables, p, self.name, unsharded, self.adapter_state.seeds)
            return (lane_tables * masks).repeat_interleave(context.rows_per_lane or 1, dim=0)
        flat = split_by_lane(x, context, self.name)
        masks = draw_dropout_masks(flat, p, self.name, context, self.adapter_state.seeds)
        return (flat * masks).view(x.shape)
