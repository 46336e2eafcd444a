"""PEFT's VB-LoRA on the whole model, with one learning rate for logits and bank."""

from __future__ import annotations

from parity import RANK, Reference
from peft import VBLoRAConfig

REFERENCE = Reference(
    lambda targets: VBLoRAConfig(r=RANK, num_vectors=12, vector_length=8, topk=3, target_modules=targets),
    {"vblora_logits_A": "PA", "vblora_logits_B": "PB", "vblora_vector_bank": "bank"},
    extra={"vectors": 12, "vector_length": 8, "top_k": 3, "logit_lr_ratio": 1.0},
)
