"""Every parameter of a model as one lane's own: what full fine-tuning trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from variants.lane_tensors import LaneTensors

MODEL_PREFIX = "model:"


class FullModelParameters:
    """Takes the place of the frozen parameters while the lane is computed; they are never written. The lane's
    copies are float32 (float64 over float64) and cast to the model's dtype at every use.
    """

    def __init__(self, model: nn.Module, excluded_module_ids: set[int]) -> None:
        """`heads`: ids of modules to leave out, with all that is in them."""
        self.tensors: dict[str, LaneTensors] = {}
        self._slots: dict[str, list[tuple[nn.Module, str]]] = {}
        self._base_parameters: dict[str, nn.Parameter] = {}
        left_out = {
            id(inner) for m in model.modules() if id(m) in excluded_module_ids for inner in m.modules()
        }
        first: dict[int, str] = {}
        for path, module in model.named_modules():
            if id(module) in left_out:
                continue
            for key, parameter in module._parameters.items():
                if parameter is None:
                    continue
                # A parameter may hang in several places (tied embeddings): it is learnt once.
                name = first.setdefault(id(parameter), f"{MODEL_PREFIX}{path}.{key}")
                self._slots.setdefault(name, []).append((module, key))
                self._base_parameters[name] = parameter
        for name in self._base_parameters:
            self.tensors.setdefault(name.rpartition(".")[0], LaneTensors())

    def init(self) -> dict[str, dict[str, torch.Tensor]]:
        """Place -> parameter -> copy, to be put into `tensors`."""
        copies: dict[str, dict[str, torch.Tensor]] = {owner: {} for owner in self.tensors}
        for name, parameter in self._base_parameters.items():
            place, _, key = name.rpartition(".")
            copies[place][key] = parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32))
        return copies

    @contextmanager
    def swap_in(self, lane: str) -> Iterator[None]:
        """During it the model computes with the lane's parameters. Backward has to run inside."""
        try:
            for name, frozen in self._base_parameters.items():
                owner, _, key = name.rpartition(".")
                lane_parameter = self.tensors[owner].trainable[lane][key].to(frozen.dtype)
                for module, slot in self._slots[name]:
                    module._parameters[slot] = lane_parameter  # type: ignore[assignment]
            yield
        finally:
            for name, frozen in self._base_parameters.items():
                for module, slot in self._slots[name]:
                    module._parameters[slot] = frozen

    @torch.no_grad()
    def copy_to_model(self, lane: str) -> None:
        """Makes the lane's parameters the model's."""
        for name, frozen in self._base_parameters.items():
            owner, _, key = name.rpartition(".")
            frozen.copy_(self.tensors[owner].trainable[lane][key])
