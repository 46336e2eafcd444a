"""PEFT's DeLoRA, which starts from B = 0 and adapts layers of type Linear only."""

from __future__ import annotations

import torch
from parity import RANK, Reference
from peft import DeloraConfig, PeftModel

from variants.adapters import Adapters
from variants.testing.cases import Case


def _widen_norms(reference_model: PeftModel, adapters: Adapters, case: Case) -> None:
    """Compute the norms of W's columns again in float64, because PEFT made them in float32."""
    modules = dict(reference_model.get_base_model().named_modules())
    for name, layer in adapters.layers.items():
        norms = layer.frozen_layer.weight.norm(dim=0)
        torch.testing.assert_close(modules[name].delora_w_norm["default"].double(), norms, rtol=1e-6, atol=0)
        modules[name].delora_w_norm["default"] = norms


REFERENCE = Reference(
    lambda targets: DeloraConfig(r=RANK, delora_lambda=8, target_modules=targets),
    {"delora_A": "A", "delora_B": "B", "delora_lambda": "lambda"},
    extra={"initial": "zero"},
    init=_widen_norms,
    models=("llama",),
)
