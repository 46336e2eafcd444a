"""PEFT's IA3 without layers whose input is scaled."""

from __future__ import annotations

from parity import Reference
from peft import IA3Config

REFERENCE = Reference(
    lambda targets: IA3Config(target_modules=targets, feedforward_modules=[]), {"ia3_l": "l"}
)
