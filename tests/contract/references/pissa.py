"""PEFT's PiSSA."""

from __future__ import annotations

from parity import AB, Reference, lora_config

REFERENCE = Reference(lora_config(init_lora_weights="pissa"), AB, residual=True)
