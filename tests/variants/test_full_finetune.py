"""Full fine-tuning, in which the lane's copies replace the model's parameters during computation."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from variants import catalogue
from variants.adapters import Adapters, attach
from variants.api import UnsupportedError, VariantSettings

SETTINGS = VariantSettings()
IDS = torch.arange(24).view(8, 3)


def llama(dtype: torch.dtype = torch.float32, tied: bool = True) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            tie_word_embeddings=tied,
        )  # fmt: skip
        return LlamaForCausalLM(config).to(dtype).eval()


def take_steps(adapters: Adapters, count: int) -> None:
    optimizer = torch.optim.AdamW(adapters.trainable("0").values(), lr=0.01)
    for _ in range(count):
        optimizer.zero_grad()
        with adapters.activate_lanes(["0"], 0):
            adapters.model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("tied", [True, False])
def test_it_equals_plain_training_of_all_parameters(tied: bool) -> None:
    adapters, plain = attach(llama(tied=tied), catalogue.get("full"), SETTINGS), llama(tied=tied)
    adapters.add_lane("0", SETTINGS, seed=0)
    take_steps(adapters, 5)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.01)
    for _ in range(5):
        optimizer.zero_grad()
        plain(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    trainable = adapters.trainable("0")
    assert adapters.parameter_count("0") == sum(p.numel() for p in plain.parameters())
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(trainable[f"model:{name}"], parameter)


def test_copies_are_float32_and_the_model_computes_in_its_own_dtype() -> None:
    adapters = attach(llama(torch.bfloat16), catalogue.get("full"), SETTINGS)
    adapters.add_lane("0", SETTINGS, seed=0)
    assert {p.dtype for p in adapters.trainable("0").values()} == {torch.float32}
    before = {name: p.detach().clone() for name, p in adapters.trainable("0").items()}
    # The learning rate is far below the resolution of most weights in bfloat16.
    take_steps(adapters, 1)
    assert all(not torch.equal(p, before[name]) for name, p in adapters.trainable("0").items())
    with torch.no_grad(), adapters.activate_lanes(["0"], None):
        assert adapters.model(input_ids=IDS).logits.dtype == torch.bfloat16


def test_the_parameters_are_restored_after_an_error() -> None:
    model = llama()
    frozen = dict(model.named_parameters())
    adapters = attach(model, catalogue.get("full"), SETTINGS)
    adapters.add_lane("0", SETTINGS, seed=0)
    with pytest.raises(RuntimeError, match="in the middle"), adapters.activate_lanes(["0"], 0):
        raise RuntimeError("in the middle")
    assert all(parameter is frozen[name] for name, parameter in model.named_parameters())


def test_a_second_lane_is_refused() -> None:
    adapters = attach(llama(), catalogue.get("full"), SETTINGS)
    adapters.add_lane("0", SETTINGS, seed=0)
    assert adapters.max_lanes == 1
    with pytest.raises(UnsupportedError, match="one lane at a time"):
        adapters.add_lane("1", SETTINGS, seed=1)
