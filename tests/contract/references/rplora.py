"""PEFT's LoRA with its Riemannian optimizer."""

from __future__ import annotations

import torch
from parity import AB, DECAY, LEARNING_RATE, Reference, lora_config
from peft import PeftModel
from peft.optimizers import create_riemannian_optimizer


def _riemannian_optimizer(model: PeftModel) -> torch.optim.Optimizer:
    return create_riemannian_optimizer(model, torch.optim.AdamW, lr=LEARNING_RATE, weight_decay=DECAY)


REFERENCE = Reference(lora_config(), AB, optimizer=_riemannian_optimizer)
