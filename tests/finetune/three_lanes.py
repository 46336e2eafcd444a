"""Three lanes of LoRA on a model with a head, each with weights of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from orchestrator.finetune.models.loading import Bench
from variants import catalogue as variants
from variants.attach import Adapters, attach
from variants.base import Settings
from variants.base import number as seed_of

NAMES = ("x", "y", "z")


@contextmanager
def three_lanes(bench: Bench, deviation: float = 0.5) -> Iterator[Adapters]:
    settings = Settings(rank=4, alpha=8.0)
    adapters = attach(bench.model, variants.get("lora"), settings, "blocks", heads=bench.heads)
    for number, name in enumerate(NAMES):
        adapters.add(name, settings, seed=number)
        for place, parameter in adapters.trainable(name).items():
            generator = torch.Generator().manual_seed(seed_of(number, place))
            parameter.data.copy_(deviation * torch.randn(parameter.shape, generator=generator))
    yield adapters
    adapters.detach()
