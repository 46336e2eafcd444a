"""A lane group of two lanes on a device, for one step."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from scripted import WORDS_TASK, configuration

from orchestrator.finetune.data.batches import encode_examples
from orchestrator.finetune.engine.lane import Lane
from orchestrator.finetune.engine.lane_group import LaneGroup, TaskData
from orchestrator.finetune.engine.lane_source import Lease
from orchestrator.finetune.models.base_model import BaseModel
from orchestrator.finetune.models.changes import enable_activation_checkpointing
from orchestrator.finetune.process_group import SINGLE_PROCESS_GROUP
from orchestrator.finetune.tasks import catalogue as tasks
from orchestrator.finetune.tasks.letters import VOCABULARY, tokenizer
from variants import catalogue
from variants.adapters import attach
from variants.api import VariantSettings

OPTIONS = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
KINDS = {"Llama": {}, "Qwen3": {}, "Mistral": {"sliding_window": 8}, "Gemma3Text": {"sliding_window": 8}}


def make_step_lanes(
    device: torch.device,
    kind: str,
    checkpointing: bool = False,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> tuple[LaneGroup, list[Lane]]:
    """Return a lane group of two lanes on a device, initialized on the CPU.

    Args:
        device: The device.
        kind: A key of `KINDS`.
        checkpointing: Whether activations are computed again in the backward pass.
        dtype: The dtype of the base model.
        options: Options of the model's configuration in place of `OPTIONS`.
    """
    config = getattr(transformers, f"{kind}Config")(**{**OPTIONS, **KINDS[kind], **options}, pad_token_id=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
    model = model.eval().requires_grad_(False).to(dtype)
    if checkpointing:
        enable_activation_checkpointing(model)
    base_model = BaseModel(model, tokenizer(), torch.device("cpu"))
    task = tasks.get(WORDS_TASK)
    rows = encode_examples(task.examples("train", 32), task, tokenizer(), 64)
    adapters = attach(model, catalogue.get("lora"), VariantSettings(4, 8.0))
    group = LaneGroup(base_model, adapters, TaskData(task, rows, {}, {}), SINGLE_PROCESS_GROUP)
    lanes = []
    for seed in range(2):
        one = configuration(task=WORDS_TASK, seed=seed, batch_size=4, accumulation=3, max_length=64)
        lane = Lane(Lease(one, 1))
        lane.initialize(adapters, 1e9, None)
        lanes.append(lane)
    if device.type != "cpu":
        group.base_model = BaseModel(model.to(device), base_model.processor, device)
        for owner in adapters.tensors_by_owner.values():
            for tensors in owner.trainable.values():
                for name, parameter in tensors.items():
                    tensors[name] = torch.nn.Parameter(parameter.to(device))
        adapters.state.generation += 1
        for lane in lanes:
            lane.parameters = adapters.trainable(lane.fingerprint)
    return group, lanes
