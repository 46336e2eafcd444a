"""PEFT's AdaLoRA with its allocation of ranks after each step."""

from __future__ import annotations

from parity import ALPHA, RANK, STEPS, Reference
from peft import AdaLoraConfig, PeftConfig


def _adalora(orthogonality: float, final: int) -> Reference:
    """Return AdaLoRA's reference, whose ranks are fixed for the last `final` steps."""

    def config(targets: list[str]) -> PeftConfig:
        return AdaLoraConfig(
            init_r=6, target_r=RANK, lora_alpha=int(ALPHA), target_modules=targets, total_step=STEPS,
            tinit=2, tfinal=final, orth_reg_weight=orthogonality,
        )  # fmt: skip

    return Reference(
        config,
        {f"lora_{name}": name for name in "AEB"},
        extra={"initial": 1.5, "warmup": 0.2, "final": final / STEPS, "orthogonality": orthogonality},
        after_step=lambda model, step: model.base_model.update_and_allocate(step),
    )


REFERENCE = _adalora(orthogonality=0.5, final=0)
FIXED_RANKS = _adalora(orthogonality=0.0, final=4)
"""The ranks are fixed in the last steps. There is no orthogonality loss, which then differs from PEFT's."""
