"""A task's head: linear layers that the task brings along, of which every lane has its own."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from variants.base import parameter_generator
from variants.forward_context import AdapterState, split_by_lane
from variants.lane_tensors import LaneTensors

INIT_STD = 0.02
"""Of a head's first weights: what transformers initialises new layers with, for BERT and most others."""


class LaneHead(nn.Module):
    """y = W x + b in float32 (float64 over a float64 model), W (out, in) and b (out,) learnt by each lane
    from N(0, 0.02) and 0. Stands where the linear layer `base` stood, whose weights only the frozen model
    uses.
    """

    def __init__(self, name: str, base_layer: nn.Linear, adapter_state: AdapterState) -> None:
        super().__init__()
        self.name, self.base_layer, self.adapter_state = name, base_layer, adapter_state
        self.own_tensors = LaneTensors()

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    def init(self, generator: torch.Generator) -> dict[str, Tensor]:
        """A lane's first weights, drawn on the CPU as a variant's are."""
        weight = self.base_layer.weight
        draw = torch.empty(weight.shape, dtype=torch.float32)
        draw.normal_(0, INIT_STD, generator=parameter_generator(generator, "weight"))
        tensors = {"weight": draw.to(weight.device, _lane_dtype(weight.dtype))}
        if self.base_layer.bias is not None:
            tensors["bias"] = torch.zeros_like(self.base_layer.bias, dtype=_lane_dtype(weight.dtype))
        return tensors

    def forward(self, x: Tensor) -> Tensor:
        context = self.adapter_state.get_context(self.name)
        context.called_layers.add(self.name)
        if not context.lanes and self.name not in context.head_weights:
            return self.base_layer(x.to(self.base_layer.weight.dtype))
        x = x.to(_lane_dtype(self.base_layer.weight.dtype))
        if context.lanes:
            flat, params = split_by_lane(x, context, self.name), self.own_tensors.stack(context.lanes)
        else:
            flat = x.reshape(1, -1, x.shape[-1])
            params = {name: tensor.unsqueeze(0) for name, tensor in context.head_weights[self.name].items()}
        return _batched_linear(flat, params).view(*x.shape[:-1], -1)


def _lane_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _batched_linear(x: Tensor, params: Mapping[str, Tensor]) -> Tensor:
    weight, bias = params["weight"], params.get("bias")
    out = weight.shape[1]
    if out == 1:  # a single column is summed in another order for one lane than for several
        weight = nn.functional.pad(weight, (0, 0, 0, 1))
    y = torch.bmm(x, weight.transpose(1, 2))[..., :out]
    return y if bias is None else y + bias.unsqueeze(1)
