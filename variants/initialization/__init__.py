"""Variants that change the initialization of LoRA."""
