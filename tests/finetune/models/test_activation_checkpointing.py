"""Activation checkpointing runs blocks twice and changes no number."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from scripted import WORDS_TASK, Script, configuration, leases, numbers_of, solo, tiny_base_model, train
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
)

from orchestrator.finetune.models.base_model import BaseModel
from orchestrator.finetune.models.changes import enable_activation_checkpointing, patch_deberta_attention
from orchestrator.finetune.tasks.base import Task
from orchestrator.record.store import Store
from orchestrator.study.configuration import ModelChoice
from variants import catalogue
from variants.adapters import Adapters, attach
from variants.api import VariantSettings

SETTINGS = VariantSettings(rank=4, alpha=8.0, dropout=0.3)
ROWS, LENGTH = 8, 12


def llama() -> nn.Module:
    return tiny_base_model(ModelChoice("tiny", "0" * 64)).model


def bert() -> nn.Module:
    """Return a BERT with its own dropout, which eval mode turns off."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=25, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64,
            hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5,
        )  # fmt: skip
        return BertForSequenceClassification(config).eval().requires_grad_(False)


def deberta() -> nn.Module:
    """Return a DeBERTa, whose attention calls some projections twice, with separate masks for each call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = DebertaV2Config(
            vocab_size=25, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64,
            relative_attention=True, pos_att_type="p2c|c2p", position_buckets=32, share_att_key=True,
            type_vocab_size=0,
        )  # fmt: skip
        model = DebertaV2ForSequenceClassification(config)
    patch_deberta_attention(model)
    return model.eval().requires_grad_(False)


def adapted(model: nn.Module, variant: str) -> Adapters:
    adapters = attach(model, catalogue.get(variant), SETTINGS)
    for lane in ("a", "b"):
        adapters.add_lane(lane, SETTINGS, seed=ord(lane))
        for name, parameter in sorted(adapters.trainable(lane).items()):
            with torch.no_grad():
                parameter += 0.05 * torch.randn(
                    parameter.shape, generator=torch.Generator().manual_seed(len(name))
                )
    return adapters


def gradients(adapters: Adapters) -> dict[str, Tensor]:
    ids = torch.randint(1, 25, (2 * ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    with adapters.activate_lanes(["a", "b"], [3, 5], 1, ROWS):
        adapters.model(input_ids=ids, use_cache=False).logits.square().mean().backward()
    return {
        f"{lane} {name}": parameter.grad
        for lane in ("a", "b")
        for name, parameter in adapters.trainable(lane).items()
        if parameter.grad is not None
    }


def count_attention_calls(model: Any) -> Counter[str]:
    """Return a counter of the calls of each block's attention."""
    calls: Counter[str] = Counter()
    blocks = {n: m for n, m in model.named_modules() if n.endswith((".self_attn", ".attention"))}
    assert blocks
    for name, module in blocks.items():
        module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    return calls


@pytest.mark.parametrize(
    ("make", "variant"),
    [
        *((make, "lora") for make in (llama, bert, deberta)),
        *((llama, name) for name in ("dora", "hira", "oft", "road", "lora_moe", "rasa")),
    ],
)
def test_gradients_with_dropout_are_bit_identical(make: Any, variant: str) -> None:
    plain = gradients(adapted(make(), variant))
    model = make()
    enable_activation_checkpointing(model)
    assert not any(module.training for module in model.modules())
    calls = count_attention_calls(model)
    adapters = adapted(model, variant)
    checkpointed = gradients(adapters)
    assert set(calls.values()) == {2}
    assert len(calls) == model.config.num_hidden_layers
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        assert torch.equal(gradient, checkpointed[name]), name
        assert gradient.any()


@pytest.mark.parametrize("make", [llama, bert])
def test_without_gradients_blocks_run_once(make: Any) -> None:
    model = make()
    enable_activation_checkpointing(model)
    calls = count_attention_calls(model)
    adapters = adapted(model, "lora")
    with torch.no_grad(), adapters.activate_lanes(["a"], None):
        adapters.model(input_ids=torch.ones(ROWS, LENGTH, dtype=torch.long), use_cache=False)
    assert set(calls.values()) == {1}


@pytest.mark.parametrize("variant", ["lora", "full"])
def test_a_lane_record_is_bit_identical(variant: str, store: Store, tmp_path: Path) -> None:
    """The lane accumulates gradients, and evaluates and generates with a cache."""

    def load(choice: ModelChoice, task: Task) -> BaseModel:
        base_model = tiny_base_model(choice, task)
        enable_activation_checkpointing(base_model.model)
        return base_model

    dropout = 0.2 if variant == "lora" else 0.0
    one = configuration(variant=variant, task=WORDS_TASK, dropout=dropout, accumulation=2, steps=6)
    train(Script(leases([one])), store, load_base_model=load)
    record = store.get(one.fingerprint)
    assert record is not None
    assert numbers_of(record) == numbers_of(solo(one, tmp_path))


def test_fewer_activations_are_kept_for_the_backward_pass() -> None:
    def saved_elements(model: nn.Module) -> int:
        size = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal size
            size += tensor.numel()
            return tensor

        adapters = adapted(model, "lora")
        ids = torch.ones(2 * ROWS, LENGTH, dtype=torch.long)
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
            adapters.activate_lanes(["a", "b"], [0, 0]),
        ):
            adapters.model(input_ids=ids, use_cache=False)
        return size

    model = bert()
    enable_activation_checkpointing(model)
    assert saved_elements(model) < saved_elements(bert()) / 3
