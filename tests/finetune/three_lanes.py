"""Three lanes of a model, logits and tokenized splits for tests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from orchestrator.finetune.data.batches import Batch, DeviceBatch, encode_examples
from orchestrator.finetune.evaluation import forward
from orchestrator.finetune.evaluation.evaluate import EvaluationSplit
from orchestrator.finetune.models.base_model import BaseModel
from orchestrator.finetune.tasks.base import Example, Task
from variants import catalogue as variants
from variants.adapters import Adapters, attach
from variants.api import VariantSettings
from variants.api import stable_seed as seed_of

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


def compute_logits(base_model: BaseModel, task: Task, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the logits of the targets, (targets, classes), and their labels, (targets,)."""
    on_device = DeviceBatch.copy_to(base_model.device, [batch])
    return forward.compute_logits(base_model, task, on_device), on_device.labels


def tokenized_split(
    examples: Sequence[Example], task: Task, processor: Any, max_row_length: int
) -> EvaluationSplit:
    """Tokenize examples. `processor` is the model's tokenizer or image processor."""
    rows = encode_examples(examples, task, processor, max_row_length if task.has_head else None)
    return EvaluationSplit(examples, rows, max_row_length, processor)
