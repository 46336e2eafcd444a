"""A lane's own copy of every parameter of the model, for full fine-tuning."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from variants.lane_tensors import LaneTensors

MODEL_PREFIX = "model:"
"""Prefix of the owner's name of a module's parameters, also in checkpoints."""


class FullModelParameters:
    """Copies of a model's parameters that take their place while the lane is computed.

    The model's own parameters are never written. The copies are float32 (float64 for float64 parameters) and
    are cast to the model's dtype at every use.

    Attributes:
        tensors: Owner -> the lane's copies of the parameters of one module. The owner's name is
            `MODEL_PREFIX` and the module's path.
    """

    def __init__(self, model: nn.Module, excluded_module_ids: set[int]) -> None:
        """Find the parameters and the modules that use them.

        Args:
            model: The model.
            excluded_module_ids: `id` of the modules to leave out, with everything inside them.
        """
        excluded = {
            id(inner) for m in model.modules() if id(m) in excluded_module_ids for inner in m.modules()
        }
        self._slots: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
        self._names: dict[nn.Parameter, tuple[str, str]] = {}
        for path, module in model.named_modules():
            if id(module) in excluded:
                continue
            for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
                # Several modules may share a parameter (tied embeddings): the lane has one copy of it.
                self._slots.setdefault(parameter, []).append((module, key))
                self._names.setdefault(parameter, (f"{MODEL_PREFIX}{path}", key))
        self.tensors = {owner: LaneTensors() for owner, _ in self._names.values()}

    def init(self) -> dict[str, dict[str, torch.Tensor]]:
        """Return the model's parameters in the lane's dtype, as owner -> parameter -> tensor.

        A parameter that has this dtype already is not copied.
        """
        copies: dict[str, dict[str, torch.Tensor]] = {owner: {} for owner in self.tensors}
        for parameter, (owner, key) in self._names.items():
            copies[owner][key] = parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32))
        return copies

    @contextmanager
    def swap_in(self, lane: str) -> Iterator[None]:
        """Let the model compute with the lane's parameters; the backward pass has to run inside."""
        try:
            for parameter, (owner, key) in self._names.items():
                lane_parameter = self.tensors[owner].trainable[lane][key].to(parameter.dtype)
                for module, slot in self._slots[parameter]:
                    module._parameters[slot] = lane_parameter  # type: ignore[assignment]  # not a leaf
            yield
        finally:
            for parameter, slots in self._slots.items():
                for module, slot in slots:
                    module._parameters[slot] = parameter

    @torch.no_grad()
    def copy_to_model(self, lane: str) -> None:
        """Overwrite the model's parameters with the lane's."""
        for parameter, (owner, key) in self._names.items():
            parameter.copy_(self.tensors[owner].trainable[lane][key])
