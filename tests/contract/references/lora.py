"""PEFT's LoRA."""

from __future__ import annotations

from parity import AB, Reference, lora_config

REFERENCE = Reference(lora_config(), AB)
