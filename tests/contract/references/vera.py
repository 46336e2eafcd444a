"""PEFT's VeRA, whose frozen matrices are copied to the lane."""

from __future__ import annotations

from parity import RANK, Reference
from peft import PeftModel, VeraConfig

from variants.adapters import Adapters
from variants.testing.cases import Case


def _init_vera(reference_model: PeftModel, adapters: Adapters, case: Case) -> None:
    for key, tensor in adapters.frozen("0").items():
        tensor.copy_(getattr(reference_model.base_model, f"vera_{key[-1]}")["default"])


REFERENCE = Reference(
    lambda targets: VeraConfig(r=16 * RANK, target_modules=targets),
    {"vera_lambda_b": "b", "vera_lambda_d": "d"},
    extra={"rank_factor": 16},
    init=_init_vera,
)
