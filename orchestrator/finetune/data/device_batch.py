"""Batches on the model's device, made so that the host does not wait for the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from orchestrator.finetune.data.batches import Batch, PaddedRows
from orchestrator.finetune.device_copy import copy_without_waiting
from orchestrator.finetune.tasks.base import Image


@dataclass(frozen=True)
class DeviceBatch(PaddedRows):
    """Padded rows of one or several lanes on a device, with the positions and labels of their targets.

    Targets with the label IGNORE_INDEX are removed on the CPU. On a GPU the host would have to wait for the
    number of the remaining targets, which is a size of tensors.
    """

    ids: Tensor
    lengths: Tensor
    second_segment_starts: Tensor | None
    target_positions: Tensor
    """The indices of the targets in the flattened (rows, length) positions, (targets,) int64."""
    labels: Tensor
    """The label of each target, (targets,) int64, or float64 for a regression task."""
    weights: Tensor
    """The weight of each target's loss in the objective, (targets,) float64."""
    lane_target_counts: tuple[int, ...]
    """The number of targets of each lane. The targets of a lane follow those of the lane before."""
    first_target_column: int
    """The first column in which some row has a target."""
    images: tuple[Image, ...] = ()

    @classmethod
    def copy_to(
        cls, device: torch.device, batches: Sequence[Batch], weights: Sequence[float] | None = None
    ) -> DeviceBatch:
        """Copy one batch per lane to a device, in one transfer for which the host does not wait.

        Args:
            device: The device.
            batches: One batch for each lane, of equal size.
            weights: For each lane, the weight of each of its targets' losses; by default
                1 / (number of all targets).
        """
        joined = Batch.concatenate(batches)
        counts = tuple(batch.target_count for batch in batches)
        if weights is None:
            weights = [1 / max(1, sum(counts))] * len(counts)
        positions = joined.target_positions
        parts = [joined.ids, joined.lengths, positions, joined.targets.flatten()[positions]]
        parts += [torch.tensor(weights, dtype=torch.float64).repeat_interleave(torch.tensor(counts))]
        if joined.second_segment_starts is not None:
            parts.append(joined.second_segment_starts)
        ids, lengths, moved_positions, labels, moved_weights, *starts = _move_together(parts, device)
        columns = positions % max(1, joined.length)
        return cls(
            ids,
            lengths,
            starts[0] if starts else None,
            moved_positions,
            labels,
            moved_weights,
            counts,
            int(columns.min()) if len(columns) else 0,
            joined.images,
        )


def _move_together(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copy tensors of 8-byte types to a device as one buffer, and return them there as views of it."""
    buffer = copy_without_waiting(torch.cat([t.reshape(-1).view(torch.int64) for t in tensors]), device)
    parts = buffer.split([tensor.numel() for tensor in tensors])
    return [p.view(t.dtype).view(t.shape) for p, t in zip(parts, tensors, strict=True)]
