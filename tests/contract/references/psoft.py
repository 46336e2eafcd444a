"""PEFT's PSOFT, whose singular vectors are copied to the lane, because their signs are not unique."""

from __future__ import annotations

from parity import RANK, Reference
from peft import PeftModel, PsoftConfig

from variants.adapters import Adapters
from variants.testing.cases import Case


def _copy_subspace(reference_model: PeftModel, adapters: Adapters, case: Case) -> None:
    modules = dict(reference_model.get_base_model().named_modules())
    for name in adapters.layers:
        a, b = modules[name]._get_psoft_ab_cache_buffers("default")
        frozen = adapters.frozen("0")
        frozen[f"{name}.Vh"].copy_(a)
        frozen[f"{name}.US"].copy_(modules[name].scaling["default"] * b)


REFERENCE = Reference(
    lambda targets: PsoftConfig(r=RANK, target_modules=targets),
    {"psoft_R.weight": "Q", "psoft_R.vector_a": "a", "psoft_R.vector_b": "b"},
    init=_copy_subspace,
    models=("llama",),
)
