"""PEFT's SHiRA, whose random indices are copied to the lane."""

from __future__ import annotations

from parity import RANK, Reference
from peft import PeftModel, ShiraConfig

from variants.adapters import Adapters
from variants.testing.cases import Case


def _init_shira(reference_model: PeftModel, adapters: Adapters, case: Case) -> None:
    modules = dict(reference_model.get_base_model().named_modules())
    for key, indices in adapters.frozen("0").items():
        indices.copy_(modules[key.removesuffix(".indices")].shira_indices["default"])


REFERENCE = Reference(
    lambda targets: ShiraConfig(r=RANK, random_seed=5, target_modules=targets),
    {"shira_weight": "values"},
    init=_init_shira,
    models=("llama",),
)
