"""The frozen model's own dropout, with separate masks for each lane."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from variants.rows import Board, by_lane, masks


class TableDropout(nn.Dropout):
    """Mark dropout of a table that all rows of a batch share, with input (T, features).

    DeBERTa's embeddings of T relative positions are such a table.
    """


class LaneDropout(nn.Module):
    """Apply dropout in training, with separate masks for each lane.

    It replaces an `nn.Dropout` of the model; every attention module gets one more, for the attention
    probabilities. When no lane is trained it returns its input.
    """

    def __init__(self, name: str, p: float, board: Board, table: bool = False) -> None:
        """
        Args:
            name: The module's path in the model. The masks depend on it.
            p: The probability that a number is zeroed.
            board: Knows which lanes' rows are computed.
            table: Whether it replaces a `TableDropout`.
        """
        super().__init__()
        self.name, self.p, self.board, self.table = name, p, board, table

    @property
    def active(self) -> bool:
        """Whether the rows being computed belong to lanes in training."""
        rows = self.board.rows(self.name)
        return bool(rows.lanes) and rows.steps is not None

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
        rows = self.board.rows(self.name)
        if self.table:
            lanes = x.expand(len(rows.lanes), -1, -1)
            lanes = lanes * masks(lanes, p, self.name, replace(rows, part=None), self.board.seeds)
            return lanes.repeat_interleave(rows.rows or 1, dim=0)
        flat = by_lane(x, rows, self.name)
        return (flat * masks(flat, p, self.name, rows, self.board.seeds)).view(x.shape)
