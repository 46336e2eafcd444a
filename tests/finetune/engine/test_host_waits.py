"""The host queues a whole step without waiting for the device.

On the meta device, which has no values, each operation that would wait for a GPU raises an error: to read a
number, to branch on one, to find the labelled positions.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from scripted import WORDS_TASK, configuration
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from orchestrator.finetune.data.batches import encode_examples
from orchestrator.finetune.engine.lane import Lane
from orchestrator.finetune.engine.lane_group import LaneGroup, TaskData
from orchestrator.finetune.engine.lane_source import Lease
from orchestrator.finetune.models.activation_checkpointing import enable_activation_checkpointing
from orchestrator.finetune.models.base_model import BaseModel
from orchestrator.finetune.process_group import SINGLE_PROCESS_GROUP
from orchestrator.finetune.tasks import catalogue as tasks
from orchestrator.finetune.tasks.local.letters import VOCABULARY, tokenizer
from variants import catalogue
from variants.api import VariantSettings
from variants.attach import attach

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


def lanes_on(device: torch.device, kind: str, checkpointing: bool = False) -> tuple[LaneGroup, list[Lane]]:
    """Return a lane group of two lanes on a device, initialized on the CPU."""
    config = getattr(transformers, f"{kind}Config")(**{**OPTIONS, **KINDS[kind]}, pad_token_id=0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
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
        adapters.state.invalidate()
        for lane in lanes:
            lane.parameters = adapters.trainable(lane.fingerprint)
    return group, lanes


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_no_operation_of_a_step_waits_for_the_device(kind: str, checkpointing: bool) -> None:
    group, lanes = lanes_on(torch.device("meta"), kind, checkpointing)
    assert group.base_model.ends_with_output_layer
    losses, counts = group.backward(lanes)
    assert losses.shape == (2,)
    assert min(counts) > 0
    assert all(p.grad is not None for lane in lanes for p in lane.parameters.values())


class Transfers(TorchDispatchMode):
    """A mode that counts copies to the meta device and reads of numbers on any device."""

    copies = reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        is_moved = isinstance(made, Tensor) and made.is_meta and isinstance(args[0], Tensor)
        self.copies += name == "_to_copy" and is_moved and not args[0].is_meta
        self.reads += name == "_local_scalar_dense"
        return made


def test_a_micro_batch_takes_one_transfer() -> None:
    group, lanes = lanes_on(torch.device("meta"), "Llama")
    group.backward(lanes)  # fills caches
    first, second = group._load_batches(lanes)
    passes = sum(len({a.length, b.length}) for a, b in zip(first.batches, second.batches, strict=True))
    with Transfers() as seen:
        group.backward(lanes)
    assert seen.copies == passes


def test_a_step_reads_its_numbers_from_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    group, lanes = lanes_on(torch.device("cpu"), "Llama")
    lists: list[int] = []
    original = Tensor.tolist
    flat, counts = group.backward(lanes)
    monkeypatch.setattr(Tensor, "tolist", lambda tensor: lists.append(tensor.numel()) or original(tensor))
    with Transfers() as seen:
        results = group.reduce_gradients(lanes, flat, counts)
    assert lists == [4], "two losses and two gradient norms"
    assert seen.reads == 0
    assert all(result.loss > 0 and result.gradient_norm > 0 for result in results)
