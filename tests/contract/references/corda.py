"""PEFT's CorDA in its instruction mode, initialized from the samples of the lane's calibration batches."""

from __future__ import annotations

import torch
from parity import AB, RANK, Reference, lora_config
from peft import LoraConfig, PeftModel
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from torch import nn

from variants.adapters import Adapters
from variants.testing.cases import Case
from variants.testing.rig import model_output

CONFIG = CordaConfig(corda_method="ipm")


def _init_corda(reference_model: PeftModel, adapters: Adapters, case: Case) -> None:
    """Initialize CorDA in PEFT, whose hooks expect batches of one sample."""
    modules = dict(reference_model.get_base_model().named_modules())
    layers = nn.ModuleDict({str(i): modules[name].base_layer for i, name in enumerate(adapters.layers)})
    config = LoraConfig(r=RANK, target_modules=list(layers), corda_config=CONFIG)

    def run() -> None:
        with reference_model.disable_adapter():
            for sample in torch.cat([case.rows(0, step) for step in range(3)]).split(1):
                model_output(reference_model, sample)

    preprocess_corda(layers, config, run)
    for name in adapters.layers:
        modules[name].corda_init("default", "corda")
        assert torch.isfinite(modules[name].lora_A["default"].weight).all()


REFERENCE = Reference(
    lora_config(),
    AB,
    residual=True,
    residual_tolerance=1e-4,  # PEFT also inverts the moment in float32
    init=_init_corda,
)
