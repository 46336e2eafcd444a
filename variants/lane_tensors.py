"""Storage of the lanes' tensors for one owner: a layer, a head, a layer group, or a module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

MAX_CACHED_STACKS = 2
"""Number of stacks of frozen tensors to keep: one for the lanes in training, one for those in evaluation."""


def stack_by_name(lanes: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors of K lanes as (K, ...) by name; views if there is one lane."""
    if len(lanes) == 1:
        return {name: tensor.unsqueeze(0) for name, tensor in lanes[0].items()}
    return {name: torch.stack([each[name] for each in lanes]) for name in lanes[0]}


class LaneTensors:
    """Tensors of several lanes, stored per lane and stacked for computation.

    They are stored separately because lanes are added and removed, and each lane has its own optimizer.

    Attributes:
        mutable_buffers: Names of the frozen tensors that hooks write, so that lanes must not share them.
        hook_only_buffers: Names of the frozen tensors that only hooks read.
        trainable: Lane -> name -> parameter.
        frozen: Lane -> name -> frozen tensor.
        gradient_constants: Lane -> (versions of its tensors, the result of `Variant.gradient_constants` for
            these versions, without the lane dimension).
    """

    def __init__(
        self, mutable_buffers: frozenset[str] = frozenset(), hook_only_buffers: frozenset[str] = frozenset()
    ) -> None:
        self.mutable_buffers, self.hook_only_buffers = mutable_buffers, hook_only_buffers
        self.trainable: dict[str, dict[str, nn.Parameter]] = {}
        self.frozen: dict[str, dict[str, Tensor]] = {}
        self.gradient_constants: dict[str, tuple[list[int], dict[str, Tensor]]] = {}
        self._cached_stacks: dict[tuple[str, ...], tuple[list[int], dict[str, Tensor]]] = {}

    def add_lane(
        self, lane: str, trainable: Mapping[str, Tensor], frozen: Mapping[str, Tensor], device: torch.device
    ) -> None:
        """Store copies of the tensors that training changes; other lanes may share the rest.

        The tensors are stored in the order of their names. safetensors returns them in this order when a
        checkpoint is read, and the last bits of the gradient norm, which is a sum, depend on the order.

        Args:
            lane: The new lane.
            trainable: The initial parameters, without the lane dimension.
            frozen: The frozen tensors, without the lane dimension.
            device: The device to store them on.
        """
        self.trainable[lane] = {
            name: nn.Parameter(tensor.detach().to(device, copy=True).contiguous())
            for name, tensor in sorted(trainable.items())
        }
        self.frozen[lane] = {
            name: tensor.detach().to(device, copy=name in self.mutable_buffers).contiguous()
            for name, tensor in sorted(frozen.items())
        }
        self._cached_stacks.clear()

    def remove_lane(self, lane: str) -> None:
        """Delete a lane's tensors."""
        del self.trainable[lane], self.frozen[lane]
        self.gradient_constants.pop(lane, None)
        self._cached_stacks.clear()

    def lane_tensors(self, lane: str) -> dict[str, Tensor]:
        """Return a lane's trainable and frozen tensors, without the lane dimension."""
        return {**self.trainable[lane], **self.frozen[lane]}

    def stack(self, lanes: tuple[str, ...]) -> dict[str, Tensor]:
        """Return the tensors of K lanes as (K, ...), without those that only hooks read."""
        parameters = [self.trainable[lane] for lane in lanes]
        frozen = [
            {n: t for n, t in self.frozen[lane].items() if n not in self.hook_only_buffers} for lane in lanes
        ]
        stacked = stack_by_name(parameters)
        if len(lanes) == 1:
            return {**stacked, **stack_by_name(frozen)}
        if not frozen[0]:
            return stacked
        # Frozen tensors are stacked again only after a hook has written one of them.
        versions = [tensor._version for each in frozen for tensor in each.values()]
        if lanes not in self._cached_stacks or self._cached_stacks[lanes][0] != versions:
            if len(self._cached_stacks) >= MAX_CACHED_STACKS:
                self._cached_stacks.pop(next(iter(self._cached_stacks)))
            self._cached_stacks[lanes] = (versions, stack_by_name(frozen))
        return {**stacked, **self._cached_stacks[lanes][1]}

    def versions(self, lanes: tuple[str, ...]) -> list[int]:
        """Return numbers that change with every in-place write of one of the lanes' tensors.

        AdamW's fused kernel does not change them, so `Adapters.after_step` does, after each optimizer step.
        """
        kinds = (kind[lane] for lane in lanes for kind in (self.trainable, self.frozen))
        return [tensor._version for tensors in kinds for tensor in tensors.values()]
