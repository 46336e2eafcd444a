"""Copies from the CPU to a GPU that the host does not wait for."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def copy_without_waiting(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor from the CPU to a device; return it as it is if that is the CPU.

    From memory that is not pinned, PyTorch would wait until the GPU has done all earlier work.
    """
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
