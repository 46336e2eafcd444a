"""Storage of the lanes' tensors for one owner: a layer, a head, a layer group, or a module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from variants.base import Variant
from variants.frozen_layer import InitialTensors
from variants.hooks import StepHooks

MAX_COPIED_STACKS = 2
"""Largest number of copied stacks kept (for lanes that are not adjacent in the storage)."""


class LaneTensors:
    """Tensors of several lanes: each lane has its own, and computation gets them stacked.

    The first call of `stack` after a change of the set of lanes copies the tensors of each name into one
    tensor, and from then on the lanes' tensors are slices of it. An optimizer or hook that writes one lane's
    tensor thereby writes the stack. A stack of parameters is a leaf of the autograd graph, and the
    gradient of a stack is added to the `grad` of the lanes' parameters as soon as it is complete.

    Attributes:
        hook_only_buffers: Names of the frozen tensors that only hooks read.
        trainable: Lane -> name -> parameter. The parameter stays the same object while the lane exists, but
            its storage changes when lanes are added or removed.
        frozen: Lane -> name -> frozen tensor.
    """

    def __init__(self, variant: Variant | None = None) -> None:
        self.hook_only_buffers = (variant if isinstance(variant, StepHooks) else StepHooks).hook_only_buffers
        self.trainable: dict[str, dict[str, nn.Parameter]] = {}
        self.frozen: dict[str, dict[str, Tensor]] = {}
        self._storage: dict[str, Tensor] = {}
        self._view_stacks: dict[tuple[str, ...], dict[str, Tensor]] = {}
        self._copied_stacks: dict[tuple[tuple[str, ...], tuple[int, ...]], dict[str, Tensor]] = {}

    def add_lane(self, lane: str, initial: InitialTensors, device: torch.device) -> None:
        """Store copies of a new lane's tensors.

        The tensors are stored in the order of their names. safetensors returns them in this order when a
        checkpoint is read, and the last bits of the gradient norm, which is a sum, depend on the order.

        Args:
            lane: The new lane.
            initial: Its tensors, without the lane dimension.
            device: The device to store them on.
        """
        self.trainable[lane] = {
            name: nn.Parameter(tensor.detach().to(device, copy=True).contiguous())
            for name, tensor in sorted(initial.trainable.items())
        }
        self.frozen[lane] = {
            name: tensor.detach().to(device, copy=True).contiguous()
            for name, tensor in sorted(initial.frozen.items())
        }
        self._forget_stacks()

    def remove_lane(self, lane: str) -> None:
        """Delete a lane's tensors."""
        del self.trainable[lane], self.frozen[lane]
        self._forget_stacks()

    def lane_tensors(self, lane: str) -> dict[str, Tensor]:
        """Return a lane's trainable and frozen tensors, without the lane dimension."""
        return {**self.trainable[lane], **self.frozen[lane]}

    def stack(self, lanes: tuple[str, ...]) -> Mapping[str, Tensor]:
        """Return the tensors of K lanes as (K, ...), without those that only hooks read.

        Lanes that lie side by side, in the order in which they were added, get views of the common storage;
        other lanes get a copy, which is made again after a write of one of their tensors.
        """
        if (views := self._view_stacks.get(lanes)) is not None:
            return views
        with torch.inference_mode(False):  # the stacks of an evaluation are used in training too
            return self._make_stack(lanes)

    def _make_stack(self, lanes: tuple[str, ...]) -> Mapping[str, Tensor]:
        if not self._storage:
            self._store_side_by_side()
        everyone = tuple(self.trainable)
        first = everyone.index(lanes[0])
        if everyone[first : first + len(lanes)] == lanes:
            parts = {name: tensor[first : first + len(lanes)] for name, tensor in self._storage.items()}
            self._view_stacks[lanes] = self._with_leaves(parts, lanes)
            return self._view_stacks[lanes]
        key = lanes, tuple(self.versions(lanes))
        if key not in self._copied_stacks:
            if len(self._copied_stacks) >= MAX_COPIED_STACKS:
                self._copied_stacks.clear()
            positions = [everyone.index(lane) for lane in lanes]
            copies = {n: torch.stack([t[i] for i in positions]) for n, t in self._storage.items()}
            self._copied_stacks[key] = self._with_leaves(copies, lanes)
        return self._copied_stacks[key]

    def after_write(self, lane: str) -> None:
        """Mark a lane's parameters as written, and delete copied stacks. Call it after each optimizer step.

        The method increments autograd's version counters of the parameters and of the stacks that share their
        memory. AdamW's fused kernel increments neither. Cached values are computed again if a parameter has a
        new version. A backward pass through a graph from before the write raises autograd's error if the
        stack has a new version; otherwise it would compute wrong gradients.

        Args:
            lane: The lane whose parameters were written in place.
        """
        parameters = self.trainable[lane]
        stacks = [self._storage[name] for name in parameters if name in self._storage]
        torch.autograd.graph.increment_version([*parameters.values(), *stacks])
        self._copied_stacks.clear()

    def versions(self, lanes: tuple[str, ...]) -> list[int]:
        """Return numbers that change with every in-place write of one of the lanes' tensors.

        AdamW's fused kernel does not change them, so `after_write` does, after each optimizer step.
        """
        kinds = (kind[lane] for lane in lanes for kind in (self.trainable, self.frozen))
        return [tensor._version for tensors in kinds for tensor in tensors.values()]

    def _forget_stacks(self) -> None:
        """Let the next call of `stack` make the storage anew; until then the lanes keep their slices."""
        self._storage = {}
        self._view_stacks.clear()
        self._copied_stacks.clear()

    def _store_side_by_side(self) -> None:
        """Copy the tensors of all lanes into one tensor for each name, and make the lanes' slices of it."""
        kinds: tuple[Mapping[str, Mapping[str, Tensor]], ...] = (self.trainable, self.frozen)
        for lanes in (list(kind.values()) for kind in kinds):
            for name in lanes[0]:
                if name not in self.hook_only_buffers:
                    self._storage[name] = torch.stack([tensors[name].detach() for tensors in lanes])
        for index, lane in enumerate(self.trainable):
            for name, parameter in self.trainable[lane].items():
                parameter.data = self._storage[name][index]
            for name in self.frozen[lane].keys() & self._storage.keys():
                self.frozen[lane][name] = self._storage[name][index]

    def _with_leaves(self, stacks: Mapping[str, Tensor], lanes: tuple[str, ...]) -> dict[str, Tensor]:
        """Return the stacks; those of parameters require gradients and pass them on to the lanes."""
        found = {}
        for name, stacked in stacks.items():
            found[name] = stacked.detach()
            if name in self.trainable[lanes[0]]:
                parameters = [self.trainable[lane][name] for lane in lanes]
                found[name].requires_grad_()
                found[name].register_post_accumulate_grad_hook(partial(_pass_on_gradient, parameters))
        return found


def _pass_on_gradient(parameters: Sequence[nn.Parameter], stacked: Tensor) -> None:
    """Add the gradient of stacked parameters to the parameters' own, and delete it from the stack."""
    gradient, stacked.grad = stacked.grad, None
    assert gradient is not None
    slices = gradient.unbind()
    sums = [p.grad for p in parameters if p.grad is not None]
    if len(sums) == len(parameters):
        torch._foreach_add_(sums, slices)  # one kernel on a GPU
        return
    for parameter, part in zip(parameters, slices, strict=True):
        parameter.grad = part if parameter.grad is None else parameter.grad.add_(part)
