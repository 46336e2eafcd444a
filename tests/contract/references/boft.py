"""PEFT's BOFT with one factor: it needs a GPU for several."""

from __future__ import annotations

from parity import Reference
from peft import BOFTConfig

REFERENCE = Reference(
    lambda targets: BOFTConfig(target_modules=targets), {"boft_R": "M", "boft_s": "s"}, models=("llama",)
)
