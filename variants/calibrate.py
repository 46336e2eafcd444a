"""Calibration: the statistics of gradients or inputs that some initializations are computed from."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import replace

import torch
from torch import Tensor, nn

from variants.adapters import Adapters
from variants.api import Calibrated, CalibrationStatistic, VariantSettings
from variants.hooks import statistic_of
from variants.lane_linear import LaneLinear

MEMORY_BUDGET_BYTES = 4 << 30
"""Bytes that the matrices of one pass over the batches may take."""

LossFactory = Callable[[], Generator[Tensor, None, None]]
"""Starts a pass over the calibration batches. For each batch it runs the frozen model inside
`adapters.disable_adapters(...)` and yields the loss, a scalar."""


def calibrate(
    adapters: Adapters,
    settings: VariantSettings,
    iterate_losses: LossFactory,
    memory_budget: int = MEMORY_BUDGET_BYTES,
) -> dict[str, dict[str, Tensor]]:
    """Compute each layer's calibration statistic and reduce it by the variant's `reduce_calibration`.

    A statistic of the weight needs no batches. The mean gradient is the mean over batches, the moment of the
    inputs is the mean over samples, and the covariance of the inputs is over all positions. Padding does not
    count in inputs. A layer's matrix has the shape (out, in) for gradients and (in, in) for inputs, in the
    lanes' dtype. Layers are processed in groups, with one pass over the same batches for each group.
    The matrices of a group fit into the memory budget, in bytes; a larger matrix has a group of its own. The
    lanes do not take part.

    Returns:
        Layer -> the tensors of `reduce_calibration`, on the CPU.
    """
    reduced: dict[str, dict[str, Tensor]] = {}
    # Without alpha: the result serves lanes of all alphas.
    settings = replace(adapters.variant.validate_settings(settings), alpha=None)
    statistic = statistic_of(adapters.variant)
    if not statistic.needs_data:
        return {
            name: _reduce(layer, settings, layer.frozen_layer.weight.to(layer.frozen_layer.dtype))
            for name, layer in adapters.layers.items()
        }
    groups: list[list[LaneLinear]] = []
    free = 0
    for layer in adapters.layers.values():
        size = layer.frozen_layer.dtype.itemsize * math.prod(_matrix_shape(layer, statistic))
        if size > free:
            groups.append([])
            free = memory_budget
        groups[-1].append(layer)
        free -= size
    for group in groups:
        accumulators = [_StatisticAccumulator(layer, statistic) for layer in group]
        batches = 0
        try:
            with closing(iterate_losses()) as losses:  # closing ends its `disable_adapters` after an error
                for loss in losses:
                    batches += 1
                    if statistic is CalibrationStatistic.MEAN_GRADIENT:
                        loss.backward()
        finally:
            for accumulator in accumulators:
                accumulator.handle.remove()
        for layer, accumulator in zip(group, accumulators, strict=True):
            reduced[layer.name] = _reduce(layer, settings, accumulator.compute(batches))
            accumulator.matrix = torch.empty(0)
    return reduced


def _matrix_shape(layer: LaneLinear, statistic: CalibrationStatistic) -> tuple[int, int]:
    out_features, in_features = layer.frozen_layer.shape
    return (out_features if statistic is CalibrationStatistic.MEAN_GRADIENT else in_features), in_features


def _reduce(layer: LaneLinear, settings: VariantSettings, matrix: Tensor) -> dict[str, Tensor]:
    assert isinstance(layer.variant, Calibrated)
    tensors = layer.variant.reduce_calibration(layer.frozen_layer.with_settings(settings), matrix)
    return {key: tensor.cpu() for key, tensor in tensors.items()}


class _StatisticAccumulator:
    """Accumulation of one layer's matrix in a hook of the layer, while the model runs."""

    def __init__(self, layer: LaneLinear, statistic: CalibrationStatistic) -> None:
        self.adapter_state, self.statistic = layer.adapter_state, statistic
        self.matrix = layer.frozen_layer.zeros(*_matrix_shape(layer, statistic))
        self.count = 0  # positions for the covariance, samples for the moment
        self.shift: Tensor | None = None  # for the covariance, the first batch's mean, to reduce cancellation
        self.shifted_sum = torch.zeros_like(self.matrix[0])
        reads_gradient = statistic is CalibrationStatistic.MEAN_GRADIENT
        hook = self._accumulate_gradient if reads_gradient else self._accumulate_inputs
        self.handle = layer.base_layer.register_forward_hook(hook)

    def _mask(self, x: Tensor) -> Tensor:
        """Return a boolean mask (samples, positions) that is False at padding.

        Without an attention mask, an input (N, in) is one sample of N positions, all of them True.
        """
        context = self.adapter_state.current_context
        mask = None if context is None else context.attention_mask
        if mask is not None and mask.numel() == x.shape[:-1].numel():
            return mask.to(x.device)
        return x.new_ones(x.shape[:-1] if x.dim() > 2 else (1, len(x)), dtype=torch.bool).flatten(1)

    def _accumulate_inputs(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        mask = self._mask(args[0])
        x = args[0].detach().flatten(0, -2)[mask.flatten()].to(self.matrix.dtype)
        if self.statistic is CalibrationStatistic.INPUT_MOMENT:
            sample = mask.nonzero()[:, 0]
            largest = x.new_full((len(mask),), -math.inf).scatter_reduce(0, sample, x.amax(1), "amax").abs()
            x = x / largest.where(largest > 0, 1.0)[sample].unsqueeze(1)
            self.count += int(mask.any(1).sum())
        else:
            self.shift = x.mean(0) if self.shift is None else self.shift
            x = x - self.shift
            self.shifted_sum += x.sum(0)
            self.count += len(x)
        self.matrix.addmm_(x.t(), x)

    def compute(self, batch_count: int) -> Tensor:
        """Return the mean gradient over the batches, or the covariance or moment of the inputs."""
        if self.statistic is CalibrationStatistic.MEAN_GRADIENT:
            return self.matrix.div_(max(1, batch_count))
        count = max(1, self.count)
        offset = self.shifted_sum / count  # zero for the moment
        return self.matrix.div_(count).addr_(offset, offset, alpha=-1)

    def _accumulate_gradient(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = args[0].detach().flatten(0, -2)
        if not output.requires_grad:  # in the first layer of a frozen model the graph has to begin here
            output = output.detach().requires_grad_(True)

        def add(gradient: Tensor) -> None:
            flat = gradient.flatten(0, -2).to(self.matrix.dtype)
            self.matrix.addmm_(flat.t(), x.to(self.matrix.dtype))

        output.register_hook(add)
        return output
