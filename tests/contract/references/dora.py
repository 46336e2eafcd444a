"""PEFT's DoRA."""

from __future__ import annotations

from parity import AB, Reference, lora_config

REFERENCE = Reference(lora_config(use_dora=True), {**AB, "lora_magnitude_vector": "m"})
