"""What lanes own in one place of the model: a layer, a head, a group of layers, a parameter."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

MAX_CACHED_STACKS = 2  # kept of frozen tensors: training's lanes and evaluation's


class LaneTensors:
    """Each lane's tensors are separate, so that lanes come and go and each has its own optimizer; they are
    stacked when they are computed with.
    """

    def __init__(
        self, mutable_buffers: frozenset[str] = frozenset(), hook_only_buffers: frozenset[str] = frozenset()
    ) -> None:
        """`moving`: frozen tensors that hooks write, so that no lane may share them. `unseen`: those that
        only hooks read.
        """
        self.mutable_buffers, self.hook_only_buffers = mutable_buffers, hook_only_buffers
        self.trainable: dict[str, dict[str, nn.Parameter]] = {}
        self.frozen: dict[str, dict[str, Tensor]] = {}
        self._cached_stacks: dict[tuple[str, ...], tuple[list[int], dict[str, Tensor]]] = {}

    def add_lane(
        self, lane: str, trainable: Mapping[str, Tensor], frozen: Mapping[str, Tensor], device: torch.device
    ) -> None:
        """Give `lane` copies of the tensors that training changes; other lanes may share the rest.

        The tensors are kept in the order of their names. safetensors returns them in that order after a
        resumption, and the last bits of the gradient norm, which is a sum, depend on the order.
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
        del self.trainable[lane], self.frozen[lane]
        self._cached_stacks.clear()

    def lane_tensors(self, lane: str) -> dict[str, Tensor]:
        """A lane's tensors, trainable and frozen, without the lane dimension."""
        return {**self.trainable[lane], **self.frozen[lane]}

    def stack(self, lanes: tuple[str, ...]) -> dict[str, Tensor]:
        """The tensors of these lanes that are computed with, (K, ...)"""
        parameters = [self.trainable[lane] for lane in lanes]
        if len(lanes) == 1:
            visible = {n: t for n, t in self.frozen[lanes[0]].items() if n not in self.hook_only_buffers}
            return {name: tensor.unsqueeze(0) for name, tensor in {**parameters[0], **visible}.items()}
        stacked = {name: torch.stack([each[name] for each in parameters]) for name in parameters[0]}
        if not self.frozen[lanes[0]]:
            return stacked
        frozen = [
            {n: t for n, t in self.frozen[lane].items() if n not in self.hook_only_buffers} for lane in lanes
        ]
        # Frozen ones are stacked anew only when a hook has written them.
        versions = [tensor._version for each in frozen for tensor in each.values()]
        if lanes not in self._cached_stacks or self._cached_stacks[lanes][0] != versions:
            if len(self._cached_stacks) >= MAX_CACHED_STACKS:
                self._cached_stacks.pop(next(iter(self._cached_stacks)))
            kept = {name: torch.stack([each[name] for each in frozen]) for name in frozen[0]}
            self._cached_stacks[lanes] = (versions, kept)
        return {**stacked, **self._cached_stacks[lanes][1]}

    def versions(self, lanes: tuple[str, ...]) -> list[int]:
        """Changes with every in-place write of a tensor."""
        return [t._version for lane in lanes for t in self.lane_tensors(lane).values()]
