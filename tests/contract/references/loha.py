"""PEFT's LoHa."""

from __future__ import annotations

from parity import ALPHA, RANK, Reference
from peft import LoHaConfig

REFERENCE = Reference(
    lambda targets: LoHaConfig(r=RANK, alpha=int(ALPHA), target_modules=targets),
    {"hada_w1_a": "B1", "hada_w1_b": "A1", "hada_w2_a": "B2", "hada_w2_b": "A2"},
    models=("llama",),
)
