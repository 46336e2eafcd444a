"""LoRA and its variants: how a frozen linear layer learns. Depends on torch alone."""
