"""PEFT's CorDA in its instruction mode, with the second moment of the lane's calibration batches."""

from __future__ import annotations

import torch
from parity import AB, RANK, Reference, lora_config
from peft import LoraConfig, PeftModel
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import collect_eigens, crop_corda_eigens
from torch import Tensor, nn

from variants.adapters import Adapters
from variants.testing.cases import Case
from variants.testing.rig import model_output

CONFIG = CordaConfig(corda_method="ipm")


def _init_corda(reference_model: PeftModel, adapters: Adapters, case: Case) -> None:
    """Initialize CorDA in PEFT, without PEFT's own moments, which depend on each sample's largest value."""
    modules = dict(reference_model.get_base_model().named_modules())
    layers = nn.ModuleDict({str(i): modules[name].base_layer for i, name in enumerate(adapters.layers)})
    config = LoraConfig(r=RANK, target_modules=list(layers), corda_config=CONFIG)
    for layer in layers.values():
        layer.covariance_matrix, layer.rank, layer.corda_method = 0.0, RANK, CONFIG.corda_method

    def add(layer: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        x = args[0].flatten(0, -2)
        layer.covariance_matrix = layer.covariance_matrix + x.t() @ x / len(x) / 3

    handles = [layer.register_forward_hook(add) for layer in layers.values()]
    with reference_model.disable_adapter():
        for step in range(3):
            model_output(reference_model, case.rows(0, step))
    for handle in handles:
        handle.remove()
    collect_eigens(layers, config, verbose=False)
    crop_corda_eigens(layers, config)
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
