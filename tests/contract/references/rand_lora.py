"""PEFT's RandLoRA on the whole model, whose bases are copied to the lane."""

from __future__ import annotations

import torch
from parity import ALPHA, RANK, Reference
from peft import PeftModel, RandLoraConfig

from variants.adapters import Adapters
from variants.testing.cases import Case


def _copy_bases(reference_model: PeftModel, adapters: Adapters, case: Case) -> None:
    """Compare the initial scales, which involve no noise, and copy the bases."""
    modules = dict(reference_model.get_base_model().named_modules())
    for name in adapters.layers:
        for ours, theirs in {"l": "randlora_lambda", "g": "randlora_gamma"}.items():
            own, expected = (
                adapters.trainable("0")[f"{name}.{ours}"],
                getattr(modules[name], theirs)["default"],
            )
            torch.testing.assert_close(own, expected.to(own))
    for key, tensor in adapters.frozen("0").items():
        tensor.copy_(getattr(reference_model.base_model, f"randlora_{key[-1]}")["default"])


REFERENCE = Reference(
    lambda targets: RandLoraConfig(r=2 * RANK, randlora_alpha=int(2 * ALPHA), target_modules=targets),
    {"randlora_lambda": "l", "randlora_gamma": "g"},
    extra={"rank_factor": 2, "normalized": False},
    init=_copy_bases,
)
