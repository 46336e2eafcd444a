"""PEFT's BOFT with one factor and with several, for which PEFT itself needs a GPU."""

from __future__ import annotations

import pytest
import torch
from parity import Reference
from peft import BOFTConfig
from peft.tuners.boft import layer as boft_layer
from torch import Tensor

NAMES = {"boft_R": "M", "boft_s": "s"}
REFERENCE = Reference(lambda targets: BOFTConfig(target_modules=targets), NAMES, models=("llama",))
OTHER_SETTINGS = {
    f"{factors} factors of blocks of {size}": Reference(
        lambda targets, size=size, factors=factors: BOFTConfig(
            boft_block_size=size, boft_n_butterfly_factor=factors, target_modules=targets
        ),
        NAMES,
        extra={"block_size": size, "factors": factors},
    )
    for size, factors in ((4, 2), (2, 3))
}


class _BlockDiagonal:
    """In place of PEFT's CUDA extension: block-diagonal matrices (m, in, in) of blocks (m, in / b, b, b)."""

    @staticmethod
    def apply(blocks: Tensor) -> Tensor:
        return torch.stack([torch.block_diag(*each) for each in blocks])


def replace_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let PEFT compute several factors without its CUDA extension."""
    monkeypatch.setattr(boft_layer, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(boft_layer, "FastBlockDiag", _BlockDiagonal)
