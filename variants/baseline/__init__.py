"""Baselines: LoRA and two controls, full fine-tuning and a trained head."""
