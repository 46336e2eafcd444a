"""Evidence for starts that are computed from gradients or inputs: one pass over a few batches, in bounded
memory."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing

import torch
from torch import Tensor, nn

from variants.attach import Adapters
from variants.base import Evidence, Settings
from variants.lane_linear import LaneLinear

BUDGET = 4 << 30
"""Bytes that the matrices of the layers looked at in one pass may take."""

Losses = Callable[[], Generator[Tensor, None, None]]


def calibrate(
    adapters: Adapters, settings: Settings, losses: Losses, budget: int = BUDGET
) -> dict[str, dict[str, Tensor]]:
    """Layer -> what the variant's `distill` makes of the layer's evidence, on the CPU.

    `losses()` goes over the batches anew at every call: for each it runs the frozen model inside
    `adapters.off(...)`, and yields the loss, a scalar. A layer's matrix is float32, as large as its weight
    (gradients) or its inputs squared; layers are looked at in groups whose matrices fit into `budget` bytes,
    with a pass over the batches for each group. The mean gradient is the mean of the batches' gradients; the
    covariance of the inputs is over all positions that are no padding.
    """
    found: dict[str, dict[str, Tensor]] = {}
    settings = adapters.variant.checked_settings(settings)
    for group in _groups(adapters, budget):
        looks = {layer.name: _Look(layer, adapters.variant.evidence) for layer in group}
        try:
            batches = 0
            with closing(losses()) as found_losses:  # it may be inside `off`, which has to end here
                for loss in found_losses:
                    batches += 1
                    if adapters.variant.evidence is Evidence.GRADIENT:
                        loss.backward()
        finally:
            for look in looks.values():
                look.handle.remove()
        for name, look in looks.items():
            tensors = adapters.variant.distill(adapters.layers[name].layer, look.mean(batches), settings)
            found[name] = {key: tensor.cpu() for key, tensor in tensors.items()}
            look.matrix = torch.empty(0)
    return found


def _groups(adapters: Adapters, budget: int) -> Iterator[list[LaneLinear]]:
    group: list[LaneLinear] = []
    size = 0
    for layer in adapters.layers.values():
        out, inside = layer.layer.weight.shape
        rows = out if adapters.variant.evidence is Evidence.GRADIENT else inside
        own = 4 * rows * inside
        if group and size + own > budget:
            yield group
            group, size = [], 0
        group.append(layer)
        size += own
    if group:
        yield group


class _Look:
    """Sums up one layer's matrix while the model runs."""

    def __init__(self, layer: LaneLinear, evidence: Evidence) -> None:
        out, inside = layer.layer.weight.shape
        rows = out if evidence is Evidence.GRADIENT else inside
        self.board = layer.board
        self.matrix = torch.zeros(rows, inside, device=layer.layer.weight.device, dtype=layer.layer.dtype)
        self.positions = 0
        self.near: Tensor | None = None  # the first batch's mean, so that little cancels in the covariance
        self.total = torch.zeros_like(self.matrix[0])
        hook = self._gradient if evidence is Evidence.GRADIENT else self._inputs
        self.handle = layer.base.register_forward_hook(hook)

    def _inputs(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        x = args[0].detach().flatten(0, -2)
        real = self.board.now.real if self.board.now is not None else None
        if real is not None and real.numel() == len(x):
            x = x[real.flatten().to(x.device)]
        x = x.to(self.matrix.dtype)
        self.near = x.mean(0) if self.near is None else self.near
        x = x - self.near
        self.total += x.sum(0)
        self.matrix.addmm_(x.t(), x)
        self.positions += len(x)

    def mean(self, batches: int) -> Tensor:
        """The mean gradient of so many batches, or the covariance."""
        if self.near is None:
            return self.matrix.div_(max(1, batches))
        offset = self.total / self.positions
        return self.matrix.div_(self.positions).addr_(offset, offset, alpha=-1)

    def _gradient(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = args[0].detach().flatten(0, -2)
        if not output.requires_grad:  # the first layer of a frozen model: the graph begins here
            output = output.detach().requires_grad_(True)

        def add(gradient: Tensor) -> None:
            flat = gradient.flatten(0, -2).to(self.matrix.dtype)
            self.matrix.addmm_(flat.t(), x.to(self.matrix.dtype))

        output.register_hook(add)
        return output
