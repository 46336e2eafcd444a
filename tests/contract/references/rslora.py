"""PEFT's rsLoRA."""

from __future__ import annotations

from parity import AB, Reference, lora_config

REFERENCE = Reference(lora_config(use_rslora=True), AB)
