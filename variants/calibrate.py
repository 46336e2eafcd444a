"""Evidence for starts that are computed from gradients or inputs: one pass over a few batches, in bounded
memory.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing

import torch
from torch import Tensor, nn

from variants.attach import Adapters
from variants.base import CalibrationStatistic, VariantSettings
from variants.lane_linear import LaneLinear

MEMORY_BUDGET_BYTES = 4 << 30
"""Bytes that the matrices of the layers looked at in one pass may take."""

LossFactory = Callable[[], Generator[Tensor, None, None]]


def calibrate(
    adapters: Adapters,
    settings: VariantSettings,
    iterate_losses: LossFactory,
    memory_budget: int = MEMORY_BUDGET_BYTES,
) -> dict[str, dict[str, Tensor]]:
    """Layer -> what the variant's `distill` makes of the layer's evidence, on the CPU.

    `losses()` goes over the batches anew at every call: for each it runs the frozen model inside
    `adapters.off(...)`, and yields the loss, a scalar. A layer's matrix is float32, as large as its weight
    (gradients) or its inputs squared; layers are looked at in groups whose matrices fit into `budget` bytes,
    with a pass over the batches for each group. The mean gradient is the mean of the batches' gradients; the
    covariance of the inputs is over all positions that are no padding.
    """
    reduced: dict[str, dict[str, Tensor]] = {}
    settings = adapters.variant.validate_settings(settings)
    for group in _split_by_memory(adapters, memory_budget):
        accumulators = {
            layer.name: _StatisticAccumulator(layer, adapters.variant.calibration_statistic)
            for layer in group
        }
        try:
            batches = 0
            with closing(iterate_losses()) as losses:  # it may be inside `off`, which has to end here
                for loss in losses:
                    batches += 1
                    if adapters.variant.calibration_statistic is CalibrationStatistic.MEAN_GRADIENT:
                        loss.backward()
        finally:
            for accumulator in accumulators.values():
                accumulator.handle.remove()
        for name, accumulator in accumulators.items():
            tensors = adapters.variant.reduce_calibration(
                adapters.layers[name].frozen_layer, accumulator.compute(batches), settings
            )
            reduced[name] = {key: tensor.cpu() for key, tensor in tensors.items()}
            accumulator.matrix = torch.empty(0)
    return reduced


def _split_by_memory(adapters: Adapters, memory_budget: int) -> Iterator[list[LaneLinear]]:
    group: list[LaneLinear] = []
    size = 0
    for layer in adapters.layers.values():
        out_features, in_features = layer.frozen_layer.weight.shape
        rows = (
            out_features
            if adapters.variant.calibration_statistic is CalibrationStatistic.MEAN_GRADIENT
            else in_features
        )
        layer_bytes = 4 * rows * in_features
        if group and size + layer_bytes > memory_budget:
            yield group
            group, size = [], 0
        group.append(layer)
        size += layer_bytes
    if group:
        yield group


class _StatisticAccumulator:
    """Sums up one layer's matrix while the model runs."""

    def __init__(self, layer: LaneLinear, statistic: CalibrationStatistic) -> None:
        out_features, in_features = layer.frozen_layer.weight.shape
        rows = out_features if statistic is CalibrationStatistic.MEAN_GRADIENT else in_features
        self.adapter_state = layer.adapter_state
        self.matrix = torch.zeros(
            rows, in_features, device=layer.frozen_layer.weight.device, dtype=layer.frozen_layer.dtype
        )
        self.positions = 0
        self.shift: Tensor | None = None  # the first batch's mean, so that little cancels in the covariance
        self.shifted_sum = torch.zeros_like(self.matrix[0])
        hook = (
            self._accumulate_gradient
            if statistic is CalibrationStatistic.MEAN_GRADIENT
            else self._accumulate_inputs
        )
        self.handle = layer.base_layer.register_forward_hook(hook)

    def _accumulate_inputs(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        x = args[0].detach().flatten(0, -2)
        attention_mask = (
            self.adapter_state.current_context.attention_mask
            if self.adapter_state.current_context is not None
            else None
        )
        if attention_mask is not None and attention_mask.numel() == len(x):
            x = x[attention_mask.flatten().to(x.device)]
        x = x.to(self.matrix.dtype)
        self.shift = x.mean(0) if self.shift is None else self.shift
        x = x - self.shift
        self.shifted_sum += x.sum(0)
        self.matrix.addmm_(x.t(), x)
        self.positions += len(x)

    def compute(self, batch_count: int) -> Tensor:
        """The mean gradient of so many batches, or the covariance."""
        if self.shift is None:
            return self.matrix.div_(max(1, batch_count))
        offset = self.shifted_sum / self.positions
        return self.matrix.div_(self.positions).addr_(offset, offset, alpha=-1)

    def _accumulate_gradient(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = args[0].detach().flatten(0, -2)
        if not output.requires_grad:  # the first layer of a frozen model: the graph begins here
            output = output.detach().requires_grad_(True)

        def add(gradient: Tensor) -> None:
            flat = gradient.flatten(0, -2).to(self.matrix.dtype)
            self.matrix.addmm_(flat.t(), x.to(self.matrix.dtype))

        output.register_hook(add)
        return output
