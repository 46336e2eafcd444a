"""PEFT's OLoRA. PEFT cannot initialize Conv1D layers, so their factors are computed here."""

from __future__ import annotations

import torch
from parity import AB, RANK, Reference, lora_config
from peft import PeftModel

from variants.adapters import Adapters
from variants.targets import is_conv1d
from variants.testing.cases import Case


def _init_olora(reference_model: PeftModel, adapters: Adapters, case: Case) -> None:
    modules = dict(reference_model.get_base_model().named_modules())
    for name, layer in adapters.layers.items():
        module = modules[name]
        if not is_conv1d(layer.base_layer):
            module.olora_init("default")
            continue
        # PEFT decomposes the stored weight of such a layer, W^T, whose factors fit square layers only.
        q, r = torch.linalg.qr(module.base_layer.weight.t())
        module.lora_A["default"].weight.copy_(r[:RANK])
        module.lora_B["default"].weight.copy_(q[:, :RANK])
        module.base_layer.weight.sub_(module.scaling["default"] * (q[:, :RANK] @ r[:RANK]).t())


REFERENCE = Reference(lora_config(), AB, residual=True, init=_init_olora)
