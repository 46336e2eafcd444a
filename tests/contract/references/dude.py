"""PEFT's DoRA over its PiSSA."""

from __future__ import annotations

from parity import AB, Reference, lora_config

REFERENCE = Reference(
    lora_config(init_lora_weights="pissa", use_dora=True),
    {**AB, "lora_magnitude_vector": "m"},
    residual=True,
)
