"""PEFT's MiSS."""

from __future__ import annotations

from parity import RANK, Reference
from peft import MissConfig

REFERENCE = Reference(
    lambda targets: MissConfig(r=RANK, target_modules=targets), {"miss_block": "D"}, models=("llama",)
)
