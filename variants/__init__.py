"""LoRA and its variants: rules by which a frozen linear layer learns. Depends on torch, not on Ray."""
