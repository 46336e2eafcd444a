"""Three lanes of LoRA on a model with a head, each with its own weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from orchestrator.finetune.models.base_model import BaseModel
from variants import catalogue as variants
from variants.api import VariantSettings
from variants.api import stable_seed as seed_of
from variants.attach import Adapters, attach

NAMES = ("x", "y", "z")


@contextmanager
def three_lanes(base_model: BaseModel, deviation: float = 0.5) -> Iterator[Adapters]:
    settings = VariantSettings(rank=4, alpha=8.0)
    adapters = attach(base_model.model, variants.get("lora"), settings, "blocks", heads=base_model.head_names)
    for number, name in enumerate(NAMES):
        adapters.add_lane(name, settings, seed=number)
        for place, parameter in adapters.trainable(name).items():
            generator = torch.Generator().manual_seed(seed_of(number, place))
            parameter.data.copy_(deviation * torch.randn(parameter.shape, generator=generator))
    yield adapters
    adapters.detach()
