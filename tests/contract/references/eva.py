"""PEFT's EVA, initialized from the lane's calibration batches."""

from __future__ import annotations

import torch
from parity import AB, Reference, lora_config
from peft import EvaConfig, PeftModel, initialize_lora_eva_weights
from torch import nn

from variants.adapters import Adapters
from variants.testing.cases import Case


def _init_eva(reference_model: PeftModel, adapters: Adapters, case: Case) -> None:
    """Initialize EVA in PEFT with the lane's calibration batches, and compare ranks and directions."""
    with torch.random.fork_rng():
        batches = [{"input_ids": torch.cat([case.rows(0, step) for step in range(3)])}]
        initialize_lora_eva_weights(reference_model, batches, show_progress_bar=False)
    modules = dict(reference_model.get_base_model().named_modules())
    ranks = adapters.ranks_in_use("0")
    assert len(set(ranks.values())) > 1
    assert ranks == {name: modules[name].r["default"] for name in ranks}
    for name, rank in ranks.items():
        mine, a = adapters.trainable("0")[f"{name}.A"][:rank], modules[name].lora_A["default"].weight
        assert nn.functional.cosine_similarity(mine, a.to(mine), dim=1).abs().min() > 1 - 1e-5


REFERENCE = Reference(lora_config(init_lora_weights="eva", eva_config=EvaConfig(rho=2.0)), AB, init=_init_eva)
