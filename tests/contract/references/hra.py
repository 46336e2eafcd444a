"""PEFT's HRA."""

from __future__ import annotations

from parity import RANK, Reference
from peft import HRAConfig

REFERENCE = Reference(
    lambda targets: HRAConfig(r=RANK, target_modules=targets), {"hra_u": "U"}, models=("llama",)
)
