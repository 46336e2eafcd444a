"""Logits and labels of a batch on the CPU."""

from __future__ import annotations

from torch import Tensor

from orchestrator.finetune.data.batches import Batch
from orchestrator.finetune.data.device_batch import DeviceBatch
from orchestrator.finetune.evaluation import forward
from orchestrator.finetune.models.base_model import BaseModel
from orchestrator.finetune.tasks.base import Task


def compute_logits(base_model: BaseModel, task: Task, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the logits of the targets, (targets, classes), and their labels, (targets,)."""
    on_device = DeviceBatch.copy_to(base_model.device, [batch])
    return forward.compute_logits(base_model, task, on_device), on_device.labels
