"""PEFT's LoRA with its optimizer for LoRA+."""

from __future__ import annotations

import torch
from parity import AB, DECAY, LEARNING_RATE, Reference, lora_config
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer


def _lora_plus_optimizer(model: PeftModel) -> torch.optim.Optimizer:
    return create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=LEARNING_RATE, loraplus_lr_ratio=16, loraplus_weight_decay=DECAY
    )


REFERENCE = Reference(lora_config(), AB, optimizer=_lora_plus_optimizer)
