"""Choice of target layers, and models that are refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from variants import targets
from variants.api import UnsupportedError
from variants.targets import find_target_layers
from variants.testing import Case


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return Case("llama", model="llama").build()


@pytest.fixture(scope="module")
def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=16, n_layer=1, n_head=2, n_positions=8))


def test_blocks_selects_the_linear_layers_of_all_blocks(llama: nn.Module, gpt2: nn.Module) -> None:
    found = find_target_layers(llama, "blocks")
    assert len(found) == 14
    assert all(name.startswith("model.layers.") for name in found)
    assert sorted(find_target_layers(gpt2, "blocks")) == [
        "transformer.h.0.attn.c_attn",
        "transformer.h.0.attn.c_proj",
        "transformer.h.0.mlp.c_fc",
        "transformer.h.0.mlp.c_proj",
    ]


def test_targets_may_be_name_endings_or_a_regular_expression(llama: nn.Module) -> None:
    assert len(find_target_layers(llama, "q_proj, v_proj")) == 4
    assert list(find_target_layers(llama, "lm_head")) == ["lm_head"]
    assert list(find_target_layers(llama, "1.mlp.up_proj")) == ["model.layers.1.mlp.up_proj"]
    assert len(find_target_layers(llama, r"re:.*\.1\.(self_attn|mlp)\..*")) == 7


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("q_prj", r"target 'q_prj': no module's name ends with it. Did you mean 'q_proj'\?"),
        ("q_proj,", "target ''"),
        ("zzz", "linear layers end in: down_proj, gate_proj"),
        ("embed_tokens", "'model.embed_tokens' is of type Embedding"),
        ("re:nothing", "selects no linear layer"),
        ("re:(", "not a regular expression"),
    ],
)
def test_invalid_targets_are_refused(llama: nn.Module, targets: str, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        find_target_layers(llama, targets)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(4, 8, 8))


class Holder(nn.Module):
    """A model of one block: the given module and a plain linear layer."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"part": part, "plain": nn.Linear(8, 8)})])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0]["plain"](x)  # type: ignore[index]


QUANTIZED = torch.ao.nn.quantized.dynamic.Linear


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (nn.MultiheadAttention(8, 2), "blocks.0.part is an nn.MultiheadAttention"),
        (nn.TransformerEncoderLayer(8, 2), "part.self_attn is an nn.MultiheadAttention"),
        (Experts(), "blocks.0.part.gate_up is a 3-D weight"),
        (QUANTIZED(8, 8), "blocks.0.part is quantized"),
        (nn.Linear(8, 8).to(torch.float8_e4m3fn), "blocks.0.part holds a torch.float8_e4m3fn"),
    ],
)
def test_modules_that_bypass_adapters_are_refused(part: nn.Module, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        find_target_layers(Holder(part), "blocks")


def test_modules_outside_the_targets_are_not_checked() -> None:
    assert list(find_target_layers(Holder(Experts()), "plain")) == ["blocks.0.plain"]
    assert list(find_target_layers(Holder(nn.Conv1d(4, 4, 3)), "blocks")) == ["blocks.0.plain"]
    with pytest.raises(UnsupportedError, match="MultiheadAttention"):
        find_target_layers(Holder(nn.MultiheadAttention(8, 2)), "out_proj")


@pytest.mark.parametrize(
    "pattern", [r"re:(\w+\.?)+!", r"re:(.*)*\d+x", r"re:(?:\w|\w\w|\.|\.\w)+(?<=x)q_proj"]
)
def test_a_regular_expression_that_takes_too_long_is_refused(
    pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets, "PATTERN_TIMEOUT_SECONDS", 0.1)
    model = nn.ModuleDict({"layers_of_the_model_number_0_self_attention_q_proj": nn.Linear(4, 4)})
    with pytest.raises(UnsupportedError, match=r"repetition inside of a repetition|no linear layer"):
        find_target_layers(model, pattern)


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="has no ModuleList"):
        find_target_layers(nn.Sequential(nn.Linear(4, 4)), "blocks")
