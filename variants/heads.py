"""A task's head: linear layers that are new in the model and that every lane trains for itself."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from variants.forward_context import AdapterState, split_by_lane
from variants.lane_tensors import LaneTensors
from variants.seeds import seeded_generator

INIT_STD = 0.02
"""Standard deviation of a head's initial weights, the default of transformers for BERT and most others."""


class LaneHead(nn.Module):
    """Replacement of a linear layer that computes y = W x + b with each lane's own W (out, in) and b (out,).

    W is drawn from N(0, 0.02^2), and b starts at 0. Both are float32, or float64 over a float64 model. Only
    the frozen base model uses the weights of the replaced layer.

    Attributes:
        name: The dotted path of the layer in the model.
        base_layer: The replaced layer.
        adapter_state: The state that all adapted layers share.
        own_tensors: The lanes' weights and biases.
        dtype: The dtype of the lanes' weights and biases.
    """

    def __init__(self, name: str, base_layer: nn.Linear, adapter_state: AdapterState) -> None:
        super().__init__()
        self.name, self.base_layer, self.adapter_state = name, base_layer, adapter_state
        self.own_tensors = LaneTensors()
        self.dtype = torch.promote_types(base_layer.weight.dtype, torch.float32)

    @property
    def weight(self) -> Tensor:
        """The weight of the replaced layer, for models that read its dtype or device."""
        return self.base_layer.weight

    def init(self, seed: int) -> dict[str, Tensor]:
        """Return a lane's initial weight, drawn on the CPU, and a bias of zeros if the layer has one."""
        weight = self.base_layer.weight
        draw = torch.empty(weight.shape, dtype=torch.float32)
        draw.normal_(0, INIT_STD, generator=seeded_generator(seed, "weight"))
        tensors = {"weight": draw.to(weight.device, self.dtype)}
        if self.base_layer.bias is not None:
            tensors["bias"] = torch.zeros_like(self.base_layer.bias, dtype=self.dtype)
        return tensors

    def forward(self, x: Tensor) -> Tensor:
        """Compute the head for the rows of the current context.

        Args:
            x: (K*R, ..., in).

        Returns:
            (K*R, ..., out).
        """
        context = self.adapter_state.get_context(self.name)
        context.called_layers.add(self.name)
        if not context.lanes and self.name not in context.head_weights:
            return self.base_layer(x.to(self.base_layer.weight.dtype))
        x = x.to(self.dtype)
        if context.lanes:
            flat, params = split_by_lane(x, context, self.name), self.own_tensors.stack(context.lanes)
        else:
            flat = x.reshape(1, -1, x.shape[-1])
            params = {name: tensor.unsqueeze(0) for name, tensor in context.head_weights[self.name].items()}
        return _batched_linear(flat, params).view(*x.shape[:-1], -1)


def _batched_linear(x: Tensor, params: Mapping[str, Tensor]) -> Tensor:
    weight, bias = params["weight"], params.get("bias")
    out = weight.shape[1]
    if out == 1:  # PyTorch sums a single column in another order for one lane than for several
        weight = nn.functional.pad(weight, (0, 0, 0, 1))
    y = torch.bmm(x, weight.transpose(1, 2))[..., :out]
    return y if bias is None else y + bias.unsqueeze(1)
