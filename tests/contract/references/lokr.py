"""PEFT's LoKr, at a rank that makes the second factor low-rank in some layers and full in others."""

from __future__ import annotations

from parity import ALPHA, RANK, Reference
from peft import LoKrConfig

REFERENCE = Reference(
    lambda targets: LoKrConfig(r=RANK, alpha=int(ALPHA), decompose_factor=3, target_modules=targets),
    {"lokr_w1": "C", "lokr_w2_a": "B", "lokr_w2_b": "A", "lokr_w2": "D"},
    extra={"factor": 3},
    models=("llama",),
)
