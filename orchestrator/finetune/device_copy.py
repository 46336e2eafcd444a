"""Copies from the CPU to a GPU for which the host does not wait."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def copy_without_waiting(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor from the CPU to a device; if the device is the CPU, return the tensor itself.

    The copy to a GPU is made from pinned memory: from other memory, PyTorch would wait until the GPU has
    finished all earlier work.
    """
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
