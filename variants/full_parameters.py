"""Parameters that a lane trains in full, without a variant's rule: a task's head, or the whole model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from variants.forward_context import AdapterState, split_by_lane
from variants.frozen_layer import seeded_generator
from variants.lane_tensors import LaneTensors

INIT_STD = 0.02
"""Standard deviation of a head's initial weights, the default of transformers for BERT and most others."""

MODEL_PREFIX = "model:"
"""Prefix of the owner's name of a module's parameters, also in checkpoints."""


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
        """Map (K*R, ..., in) to (K*R, ..., out) for the rows of the current context."""
        context = self.adapter_state.get_context(self.name)
        if not context.lanes and self.name not in context.head_weights:
            return self.base_layer(x.to(self.base_layer.weight.dtype))
        x = x.to(self.dtype)
        if context.lanes:
            flat, params = split_by_lane(x, context, self.name), self.own_tensors.stack(context.lanes)
        else:
            flat = x.reshape(1, -1, x.shape[-1])
            params = {name: tensor.unsqueeze(0) for name, tensor in context.head_weights[self.name].items()}
        weight, bias = params["weight"], params.get("bias")
        out = weight.shape[1]
        if out == 1:  # PyTorch sums a single column in another order for one lane than for several
            weight = nn.functional.pad(weight, (0, 0, 0, 1))
        y = torch.bmm(flat, weight.transpose(1, 2))[..., :out]
        return (y if bias is None else y + bias.unsqueeze(1)).view(*x.shape[:-1], -1)


class FullModelParameters:
    """Copies of a model's parameters that take their place while the lane is computed.

    The model's own parameters are never written. The copies are float32 (float64 for float64 parameters) and
    are cast to the model's dtype at every use.

    Attributes:
        tensors: Owner -> the lane's copies of the parameters of one module. The owner's name is
            `MODEL_PREFIX` and the module's path.
    """

    def __init__(self, model: nn.Module, excluded: Iterable[nn.Module]) -> None:
        """Find the parameters, and the modules that use them, outside of the excluded modules."""
        left_out = {id(inner) for module in excluded for inner in module.modules()}
        # Several modules may share a parameter (tied embeddings): the lane has one copy of it, for the first.
        self._uses: dict[nn.Parameter, list[tuple[str, str, nn.Module]]] = {}
        for path, module in model.named_modules():
            own = module.named_parameters(recurse=False, remove_duplicate=False)
            for key, parameter in () if id(module) in left_out else own:
                self._uses.setdefault(parameter, []).append((f"{MODEL_PREFIX}{path}", key, module))
        self.tensors = {uses[0][0]: LaneTensors() for uses in self._uses.values()}

    def init(self) -> dict[str, dict[str, Tensor]]:
        """Return the model's parameters in the lane's dtype, as owner -> parameter -> tensor.

        A parameter that has this dtype already is not copied.
        """
        copies: dict[str, dict[str, Tensor]] = {owner: {} for owner in self.tensors}
        for parameter, [(owner, key, _), *_] in self._uses.items():
            copies[owner][key] = parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32))
        return copies

    @contextmanager
    def swap_in(self, lane: str) -> Iterator[None]:
        """Let the model compute with the lane's parameters; the backward pass has to run inside."""
        try:
            for parameter, uses in self._uses.items():
                lane_parameter = self._of_lane(lane, parameter).to(parameter.dtype)
                for _, key, module in uses:
                    module._parameters[key] = lane_parameter  # type: ignore[assignment]  # not a leaf
            yield
        finally:
            for parameter, uses in self._uses.items():
                for _, key, module in uses:
                    module._parameters[key] = parameter

    @torch.no_grad()
    def copy_to_model(self, lane: str) -> None:
        """Overwrite the model's parameters with the lane's."""
        for parameter in self._uses:
            parameter.copy_(self._of_lane(lane, parameter))

    def _of_lane(self, lane: str, parameter: nn.Parameter) -> nn.Parameter:
        owner, key, _ = self._uses[parameter][0]
        return self.tensors[owner].trainable[lane][key]
