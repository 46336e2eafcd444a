"""PEFT's LoRA with a frozen A and its optimizer for LoRA-FA."""

from __future__ import annotations

import math

import torch
from parity import ALPHA, DECAY, LEARNING_RATE, RANK, Reference, lora_config
from peft import PeftModel
from peft.optimizers import create_lorafa_optimizer

from variants.adapters import Adapters
from variants.testing.cases import Case


def _freeze_a(reference_model: PeftModel, adapters: Adapters, case: Case) -> None:
    """Freeze A in PEFT, as its optimizer will, and copy the lane's A to it."""
    modules = dict(reference_model.get_base_model().named_modules())
    for name in adapters.layers:
        a = modules[name].lora_A["default"].weight
        a.requires_grad_(False)
        a.copy_(adapters.frozen("0")[f"{name}.A"])


class _WithAdamWsConventions:
    """PEFT's optimizer with AdamW's weight decay and epsilon, which PEFT applies at other places.

    PEFT decays after the step and divides by sqrt(v) + epsilon, where v is not yet corrected for its bias.
    """

    def __init__(self, model: PeftModel) -> None:
        self.optimizer = create_lorafa_optimizer(model, RANK, int(ALPHA), LEARNING_RATE)
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.steps = 0

    def zero_grad(self) -> None:
        """Delete the gradients."""
        self.optimizer.zero_grad()

    @torch.no_grad()
    def step(self) -> None:
        """Take a step."""
        self.steps += 1
        for parameter in self.parameters:
            parameter.mul_(1 - LEARNING_RATE * DECAY)
        self.optimizer.param_groups[0]["eps"] = 1e-8 * math.sqrt(1 - 0.999**self.steps)
        self.optimizer.step()


REFERENCE = Reference(lora_config(), {"lora_B.weight": "B"}, init=_freeze_a, optimizer=_WithAdamWsConventions)  # type: ignore[arg-type]
