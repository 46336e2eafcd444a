"""Frozen layers that do more than one product are called, and models may write a layer's output in place."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import OlmoConfig, OlmoForCausalLM
from transformers.pytorch_utils import Conv1D

from variants import catalogue
from variants.adapters import Adapters, attach
from variants.api import AdaptationScope, Start, VariantSettings
from variants.nf4 import NF4Linear
from variants.testing.rig import Case, attach_lanes, perturb_lanes

NAMES = [n for n in catalogue.names() if catalogue.get(n).adaptation_scope is AdaptationScope.TARGET_LAYERS]
STARTING_AT_BASE = [name for name in NAMES if catalogue.get(name).start is Start.BASE]
CASE = Case("rows", out_features=32, in_features=32)


class HalvedLinear(nn.Linear):
    """A linear layer with a forward method of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


class HalvedConv1D(Conv1D):
    """A Conv1D with a forward method of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


def halved_by_a_hook() -> nn.Module:
    layer = nn.Linear(32, 32)
    layer.register_forward_hook(lambda module, args, out: out / 2)
    return layer


def halved_by_a_pre_hook() -> nn.Module:
    layer = nn.Linear(32, 32)
    layer.register_forward_pre_hook(lambda module, args: (args[0] / 2,))
    return layer


def halved_on_the_object() -> nn.Module:
    layer = nn.Linear(32, 32)
    whole = layer.forward
    layer.forward = lambda x: whole(x) / 2  # type: ignore[method-assign]
    return layer


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "subclass": lambda: HalvedLinear(32, 32),
    "Conv1D": lambda: HalvedConv1D(32, 32),
    "hook": halved_by_a_hook,
    "pre-hook": halved_by_a_pre_hook,
    "object": halved_on_the_object,
}


class OneLayer(nn.Module):
    """A model of one layer in a block, whose output is passed to `consumer`."""

    def __init__(self, layer: nn.Module, consumer: Callable[[Tensor], Tensor] = lambda out: out) -> None:
        super().__init__()
        self.there = nn.ModuleList([layer])
        self.consumer = consumer

    def forward(self, x: Tensor) -> Tensor:
        return self.consumer(self.there[0](x))


@pytest.mark.parametrize("name", STARTING_AT_BASE)
def test_a_layer_that_is_more_than_a_product_is_called(name: str) -> None:
    x = CASE.rows(0)
    for kind, build in LAYERS.items():
        model = OneLayer(build())
        expected = model(x).detach()
        adapters = attach_lanes(CASE, catalogue.get(name), 1, model=model)
        for with_gradients in (False, True):
            with torch.set_grad_enabled(with_gradients), adapters.activate_lanes(["0"], None):
                assert torch.equal(model(x), expected), kind


IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu_,
    "clamp": lambda out: out.clamp_(-0.5, 0.5),
    "add": lambda out: out.add_(out.detach().sin()),
}
ELSEWHERE = {
    "relu": torch.relu,
    "clamp": lambda out: out.clamp(-0.5, 0.5),
    "add": lambda out: out + out.detach().sin(),
}


def gradients(adapters: Adapters) -> list[Tensor]:
    x = torch.cat([CASE.rows(lane) for lane in range(len(adapters.lanes))]).requires_grad_()
    with adapters.activate_lanes(adapters.lanes, 0):
        adapters.model(x).square().sum().backward()
    assert x.grad is not None
    found = [p.grad for lane in adapters.lanes for p in adapters.trainable(lane).values()]
    return [x.grad, *(tensor for tensor in found if tensor is not None)]


KINDS_OF_LAYER = ("bias", "no bias", "NF4", "dropout")


def pairs() -> list[Any]:
    """Return combinations that have every pair of two values.

    The default run has one a variant, and every pair of consumer and layer.
    """
    consumers, found = list(IN_PLACE), []
    for i, name in enumerate(NAMES):
        for j, kind in enumerate(KINDS_OF_LAYER):
            marks = () if i % len(KINDS_OF_LAYER) == j else pytest.mark.slow
            found.append(pytest.param(name, consumers[(i + j) % len(consumers)], kind, marks=marks))
    return found


@pytest.mark.parametrize(("name", "consumer", "kind"), pairs())
def test_a_model_may_write_a_layers_output_in_place(name: str, consumer: str, kind: str) -> None:
    """The gradients are those of a model that writes its result elsewhere."""
    check_in_place(name, consumer, kind)


@pytest.mark.nightly
@pytest.mark.parametrize("name", NAMES)
def test_every_consumer_may_write_the_output_of_every_layer_in_place(name: str) -> None:
    for consumer, kind in itertools.product(IN_PLACE, KINDS_OF_LAYER):
        check_in_place(name, consumer, kind)


def check_in_place(name: str, consumer: str, kind: str) -> None:
    found = []
    for consumers in (IN_PLACE, ELSEWHERE):
        torch.manual_seed(0)
        layer: nn.Module = nn.Linear(32, 32, bias=kind != "no bias")
        if kind == "NF4":
            layer = NF4Linear.from_linear(layer)  # type: ignore[arg-type]
        settings = VariantSettings(4, 8.0, dropout=0.5 if kind == "dropout" else 0.0)
        adapters = attach_lanes(
            CASE, catalogue.get(name), 2, catalogue.get(name).validate_settings(settings), OneLayer(layer)
        )
        perturb_lanes(CASE, adapters)
        adapters.model.consumer = consumers[consumer]  # type: ignore[assignment]
        found.append(gradients(adapters))
    assert len(found[0]) == len(found[1]) > 1
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True)), (consumer, kind)


@pytest.mark.parametrize("name", ["lora", "pissa", "dora", "vera", "hira"])
def test_lanes_train_in_olmo_which_clips_the_outputs_of_layers_in_place(name: str) -> None:
    config = OlmoConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        clip_qkv=0.05,
    )  # fmt: skip
    variant = catalogue.get(name)
    adapters = attach(OlmoForCausalLM(config), variant, variant.validate_settings(VariantSettings(4, 8.0)))
    adapters.add_lane("0", adapters.settings, 0)
    with adapters.activate_lanes(["0"], 0):
        adapters.model(torch.randint(0, 64, (2, 5))).logits.square().sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in adapters.trainable("0").values())
