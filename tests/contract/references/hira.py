"""PEFT's HiRA."""

from __future__ import annotations

from parity import RANK, Reference
from peft import HiraConfig

REFERENCE = Reference(
    lambda targets: HiraConfig(r=RANK, target_modules=targets), {"hira_A": "A", "hira_B": "B"}
)
