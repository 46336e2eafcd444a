"""A task's head: linear layers that the task brings along, of which every lane has its own."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from variants.base import stream
from variants.lane_tensors import LaneTensors
from variants.rows import Board, by_lane

DEVIATION = 0.02
"""Of a head's first weights: what transformers initialises new layers with, for BERT and most others."""


class LaneHead(nn.Module):
    """y = W x + b in float32 (float64 over a float64 model), W (out, in) and b (out,) learnt by each lane
    from N(0, 0.02) and 0. Stands where the linear layer `base` stood, whose weights only the frozen model
    uses."""

    def __init__(self, name: str, base: nn.Linear, board: Board) -> None:
        super().__init__()
        self.name, self.base, self.board = name, base, board
        self.own = LaneTensors()

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def start(self, generator: torch.Generator) -> dict[str, Tensor]:
        """A lane's first weights, drawn on the CPU as a variant's are."""
        weight = self.base.weight
        draw = torch.empty(weight.shape, dtype=torch.float32)
        draw.normal_(0, DEVIATION, generator=stream(generator, "weight"))
        made = {"weight": draw.to(weight.device, _wide(weight.dtype))}
        if self.base.bias is not None:
            made["bias"] = torch.zeros_like(self.base.bias, dtype=_wide(weight.dtype))
        return made

    def forward(self, x: Tensor) -> Tensor:
        rows = self.board.rows(self.name)
        rows.called.add(self.name)
        if not rows.lanes and self.name not in rows.heads:
            return self.base(x.to(self.base.weight.dtype))
        x = x.to(_wide(self.base.weight.dtype))
        if rows.lanes:
            flat, params = by_lane(x, rows, self.name), self.own.stack(rows.lanes)
        else:
            flat = x.reshape(1, -1, x.shape[-1])
            params = {name: tensor.unsqueeze(0) for name, tensor in rows.heads[self.name].items()}
        return _apply(flat, params).view(*x.shape[:-1], -1)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _apply(x: Tensor, params: Mapping[str, Tensor]) -> Tensor:
    weight, bias = params["weight"], params.get("bias")
    out = weight.shape[1]
    if out == 1:  # a single column is summed in another order for one lane than for several
        weight = nn.functional.pad(weight, (0, 0, 0, 1))
    y = torch.bmm(x, weight.transpose(1, 2))[..., :out]
    return y if bias is None else y + bias.unsqueeze(1)
