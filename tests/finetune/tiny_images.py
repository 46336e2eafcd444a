"""Small image models, saved like published checkpoints: CLIP with its text tower, and ViT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

from orchestrator.finetune.models import loading
from orchestrator.finetune.models.base_model import BaseModel
from orchestrator.finetune.sources import base_store
from orchestrator.finetune.tasks.base import Task
from orchestrator.study.configuration import ModelChoice

SIDE = 32
_SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
_SIZES |= {"num_attention_heads": 4}


def clip(folder: Path) -> Path:
    torch.manual_seed(0)
    config = CLIPConfig(
        vision_config={**_SIZES, "image_size": SIDE, "patch_size": 8},
        text_config={
            **_SIZES,
            "vocab_size": 50,
            "max_position_embeddings": 8,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    )
    with base_store.suppress_transformers_logging():
        CLIPModel(config).save_pretrained(folder)
        CLIPImageProcessorPil(
            size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
        ).save_pretrained(folder)
    return folder


def vit(folder: Path) -> Path:
    torch.manual_seed(0)
    with base_store.suppress_transformers_logging():
        ViTModel(ViTConfig(**_SIZES, image_size=SIDE, patch_size=8)).save_pretrained(folder)
        ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return folder


MAKE = {"clip": clip, "vit": vit}


def choice(folder: Path) -> ModelChoice:
    return ModelChoice(str(folder), base_store.content_hash(folder))


def load(folder: Path, task: Task) -> BaseModel:
    return loading.load_base_model(choice(folder), folder, "cpu", task)
