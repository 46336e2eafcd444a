"""What lanes own in one place of the model: a layer, a head, a group of layers, a parameter."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

STACKS = 2  # kept of frozen tensors: training's lanes and evaluation's


class LaneTensors:
    """Each lane's tensors are separate, so that lanes come and go and each has its own optimizer; they are
    stacked when they are computed with."""

    def __init__(self, moving: frozenset[str] = frozenset(), unseen: frozenset[str] = frozenset()) -> None:
        """`moving`: frozen tensors that hooks write, so that no lane may share them. `unseen`: those that
        only hooks read."""
        self.moving, self.unseen = moving, unseen
        self.trainable: dict[str, dict[str, nn.Parameter]] = {}
        self.frozen: dict[str, dict[str, Tensor]] = {}
        self._stacks: dict[tuple[str, ...], tuple[list[int], dict[str, Tensor]]] = {}

    def put(
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
            name: tensor.detach().to(device, copy=name in self.moving).contiguous()
            for name, tensor in sorted(frozen.items())
        }
        self._stacks.clear()

    def drop(self, lane: str) -> None:
        del self.trainable[lane], self.frozen[lane]
        self._stacks.clear()

    def one(self, lane: str) -> dict[str, Tensor]:
        """A lane's tensors, trainable and frozen, without the lane dimension."""
        return {**self.trainable[lane], **self.frozen[lane]}

    def stack(self, lanes: tuple[str, ...]) -> dict[str, Tensor]:
        """The tensors of these lanes that are computed with, (K, ...)"""
        parameters = [self.trainable[lane] for lane in lanes]
        if len(lanes) == 1:
            visible = {n: t for n, t in self.frozen[lanes[0]].items() if n not in self.unseen}
            return {name: tensor.unsqueeze(0) for name, tensor in {**parameters[0], **visible}.items()}
        stacked = {name: torch.stack([each[name] for each in parameters]) for name in parameters[0]}
        if not self.frozen[lanes[0]]:
            return stacked
        frozen = [{n: t for n, t in self.frozen[lane].items() if n not in self.unseen} for lane in lanes]
        # Frozen ones are stacked anew only when a hook has written them.
        seen = [tensor._version for each in frozen for tensor in each.values()]
        if lanes not in self._stacks or self._stacks[lanes][0] != seen:
            if len(self._stacks) >= STACKS:
                self._stacks.pop(next(iter(self._stacks)))
            kept = {name: torch.stack([each[name] for each in frozen]) for name in frozen[0]}
            self._stacks[lanes] = (seen, kept)
        return {**stacked, **self._stacks[lanes][1]}

    def versions(self, lanes: tuple[str, ...]) -> list[int]:
        """Changes with every in-place write of a tensor."""
        return [t._version for lane in lanes for t in self.one(lane).values()]
