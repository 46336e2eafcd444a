"""Single layers of the PEFT library's tuners, called with the tensors of a lane instead of their own.

PEFT is imported when the first layer is made, because the other variants do not need it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from variants.errors import UnsupportedError

ADAPTER = "default"
"""Name of the only adapter in each of PEFT's layers."""
SHAPE_BUFFERS = ("boft_P", "rows", "cols")
"""Names of buffers that follow from the layer's shape and the config. A lane does not store them: BOFT's has
in x in values."""
DRAWS_ON_DEVICE = ("C3A",)
"""Tuners that draw initial values on the device of the weight. Their layers are made on the CPU, so that a
lane has the same values on every device."""
NO_META_LAYERS = ("SHIRA",)
"""Tuners whose layers cannot be made on the device "meta", although their shapes follow from the weight's."""
SHAPES_FROM_VALUES = ("ADAMSS",)
"""Tuners whose tensors have shapes that follow from the values of the weight."""


def build_layer(config: Any, weight: Tensor, bias: Tensor | None, seed: int) -> nn.Module:
    """Return PEFT's layer around a frozen weight. Its random values follow from the seed alone.

    Args:
        config: PEFT's config.
        weight: (out, in), in the dtype that the trainable tensors get. With a weight on the device "meta"
            only the names and shapes of the layer's tensors are right.
        bias: (out,).
        seed: The seed.

    Raises:
        UnsupportedError: The tuner refuses the shape of the layer or a value of the config.
    """
    from peft import inject_adapter_in_model

    config, device = copy.copy(config), weight.device
    config.target_modules = {"layer"}
    if config.peft_type.value in NO_META_LAYERS and weight.is_meta:
        weight = torch.zeros_like(weight, device="cpu")
        bias = None if bias is None else torch.zeros_like(bias, device="cpu")
    if config.peft_type.value in DRAWS_ON_DEVICE and not weight.is_meta:
        weight = weight.cpu()
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.to(weight), requires_grad=False)
    holder = nn.ModuleDict({"layer": linear})
    with torch.random.fork_rng([weight.device] if weight.is_cuda else []), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(config, holder, ADAPTER, low_cpu_mem_usage=weight.is_meta)
        except (ValueError, TypeError, NotImplementedError) as error:
            raise UnsupportedError(" ".join(str(error).split())) from error
    return holder["layer"].eval().to(device)


def split_tensors(layer: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the trainable and the frozen tensors of one of PEFT's layers, without weight and bias.

    Their names are the paths in the layer with "/" for ".". Frozen tensors include those that PEFT keeps in
    plain dicts, such as the positions of SHiRA's values.
    """
    trainable: dict[str, Tensor] = {}
    frozen: dict[str, Tensor] = {}
    for path, tensor in (*layer.named_parameters(), *layer.named_buffers()):
        if path.startswith("base_layer.") or path.rpartition(".")[2] in SHAPE_BUFFERS:
            continue
        (trainable if tensor.requires_grad else frozen)[path.replace(".", "/")] = tensor.detach()
    frozen |= {name: table[ADAPTER] for name, table in _tables(layer)}
    return trainable, frozen


def _tables(layer: nn.Module) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name and the value of each attribute that is a dict from adapter names to tensors."""
    for name, value in vars(layer).items():
        if isinstance(value, dict) and isinstance(value.get(ADAPTER), Tensor):
            yield name, value


class LayerTemplate:
    """One of PEFT's layers without values, which computes with the tensors that a call passes.

    Attributes:
        alpha_scale: The factor in front of the update for alpha = 1; None for a tuner without alpha.
    """

    def __init__(self, layer: Any, alpha: float, uses_alpha: bool) -> None:
        """Take over a layer; its tensors are deleted, except SHAPE_BUFFERS.

        Args:
            layer: The result of `build_layer`, whose attributes differ between tuners.
            alpha: The alpha in the layer's config.
            uses_alpha: True if the config has an alpha.
        """
        self.layer = layer
        self.alpha_scale = layer.scaling[ADAPTER] / alpha if uses_alpha else None
        self._last_alpha: tuple[Tensor, float] | None = None
        self._tables = dict(_tables(layer))
        self._gradient_hooks = [
            _GradientHook(layer, path, hook)
            for path, parameter in layer.named_parameters()
            for hook in (parameter._backward_hooks or {}).values()
        ]
        for module in layer.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
            for name, buffer in module._buffers.items():
                if buffer is not None and name not in SHAPE_BUFFERS:
                    module._buffers[name] = buffer.to("meta")

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tensors: Mapping[str, Tensor],
        alpha: Tensor | float,
    ) -> Tensor:
        """Return the layer's output, (..., out).

        Args:
            x: (..., in).
            weight: The frozen weight, (out, in).
            bias: (out,).
            tensors: Values for the names of `split_tensors`.
            alpha: A number, or a tensor with one value. A tuner without alpha ignores it.
        """
        values = {"base_layer.weight": weight}
        if bias is not None:
            values["base_layer.bias"] = bias
        for name, tensor in tensors.items():
            if name in self._tables:
                self._tables[name][ADAPTER] = tensor
            else:
                values[name.replace("/", ".")] = tensor
        if self.alpha_scale is not None:
            self.layer.scaling[ADAPTER] = self._read_number(alpha) * self.alpha_scale
        if "dtype" in vars(self.layer):  # AdaMSS casts x to it
            self.layer.dtype = weight.dtype
        for hook in self._gradient_hooks:
            hook.register(values)
        return torch.func.functional_call(self.layer, values, (x,), tie_weights=False)

    def _read_number(self, alpha: Tensor | float) -> float:
        """Return alpha as a number. A tensor is read once, because the host waits for a GPU when it reads."""
        if not isinstance(alpha, Tensor):
            return alpha
        if self._last_alpha is None or self._last_alpha[0] is not alpha:
            self._last_alpha = alpha, alpha.item()
        return self._last_alpha[1]


class _GradientHook(nn.Module):
    """A hook that PEFT registers on a parameter of a layer, for the tensor that takes the parameter's place.

    The hook reads other tensors of the layer, so it runs with those of the call.
    """

    def __init__(self, layer: nn.Module, path: str, hook: Callable[[Tensor], Tensor | None]) -> None:
        super().__init__()
        self.layer, self.path, self.hook = layer, path, hook

    def register(self, values: Mapping[str, Tensor]) -> None:
        """Register the hook on the tensor that a call passes for the parameter."""
        if values[self.path].requires_grad:
            own = {f"layer.{path}": tensor.detach() for path, tensor in values.items()}
            values[self.path].register_hook(
                lambda gradient: torch.func.functional_call(self, own, (gradient,), tie_weights=False)
            )

    def forward(self, gradient: Tensor) -> Tensor | None:
        """Return the gradient that the hook computes; None to leave it as it is."""
        return self.hook(gradient)
