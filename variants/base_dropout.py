"""Dropout of the frozen model's own, with masks that belong to a lane."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from variants.rows import Board, by_lane, masks


class TableDropout(nn.Dropout):
    """Dropout of a table that all rows of a batch share (DeBERTa's relative positions): (T, features)."""


class LaneDropout(nn.Module):
    """Zero what the model drops out in training, each lane by masks of its own.

    Stands where one of the model's `nn.Dropout` stood; another one, in each attention module, is for the
    probabilities of attention. Passes its input through where no lane is trained.
    """

    def __init__(self, name: str, p: float, board: Board, table: bool = False) -> None:
        """
        Args:
            name: Its place in the model; masks follow from it.
            p: The probability that a number is zeroed.
            board: Says whose rows are computed.
            table: It stands for a `TableDropout`.
        """
        super().__init__()
        self.name, self.p, self.board, self.table = name, p, board, table

    @property
    def active(self) -> bool:
        """Whether rows of lanes in training are computed."""
        rows = self.board.rows(self.name)
        return bool(rows.lanes) and rows.steps is not None

    def forward(self, x: Tensor, p: float | None = None) -> Tensor:
        """Drop out.

        Args:
            x: (K*R, ...), the rows of K lanes, lane-major; a table (T, features).
            p: In place of its own probability.

        Returns:
            `x` with zeros, the rest divided by 1 - p; of a table (K*R, T, features), with one mask a lane.
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
