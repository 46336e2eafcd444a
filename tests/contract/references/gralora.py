"""PEFT's GraLoRA in its hybrid form."""

from __future__ import annotations

from parity import ALPHA, RANK, Reference
from peft import GraloraConfig

REFERENCE = Reference(
    lambda targets: GraloraConfig(
        r=RANK, alpha=int(ALPHA), hybrid_r=2, gralora_k=2, target_modules=targets
    ),
    {
        "gralora_A_general.weight": "HA", "gralora_B_general.weight": "HB",
        "gralora_A": "A", "gralora_B": "B",
    },
    extra={"blocks": 2, "hybrid_rank": 2},
)  # fmt: skip
