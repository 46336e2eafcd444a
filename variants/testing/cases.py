"""Cases on which the laws are checked: small models with inputs and a loss for each lane."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from variants.api import ExtraSettings
from variants.nf4 import NF4Linear, quantize_blocks

ROWS, LENGTH, VOCABULARY, CLASSES = 8, 5, 64, 6
"""Rows per lane, positions per row, size of the vocabulary, outputs of a head. With fewer than 8 rows a
matrix product on a CPU may round differently for several lanes than for one."""

LAW_SETTINGS: Mapping[str, ExtraSettings] = {
    "fourier_ft": {"frequencies": 60, "scale": 5.0},
    "salora": {"gate_lr": 3.0},
}
"""Variant -> its own hyperparameters for the small layers here, where its defaults suit large layers only."""

ROUNDS_BY_SIZE = ("adamole", "aurora")
"""Variants whose lane in a group equals the same lane alone only up to rounding, and not bit for bit.
PyTorch's sigmoid and tanh round the last values of a tensor according to the tensor's size."""


@dataclass(frozen=True)
class Case:
    """A small model with inputs and a loss for each lane."""

    name: str
    model: str = "rectangles"
    """"rectangles" (layers of shape out x in and in x out), "headed" (the same with a task's head), "llama",
    or "gpt2" (whose layers are Conv1D)."""
    out_features: int = 32
    in_features: int = 32
    bias: bool = False
    dtype: torch.dtype = torch.float32
    nf4: bool = False
    """True to quantize the layers of the blocks to 4 bits."""
    lanes: int = 3
    device: str = "cpu"

    @property
    def is_language_model(self) -> bool:
        """Whether inputs are token ids."""
        return self.model in ("llama", "gpt2")

    @property
    def tolerance(self) -> float:
        """The largest relative error that rounding explains."""
        return {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}[self.dtype]

    def build(self) -> nn.Module:
        """Return a new model in evaluation mode, with the same weights at every call."""
        model = copy.deepcopy(_prototype(self.model, self.out_features, self.in_features, self.bias))
        model = model.to(self.device, self.dtype).eval()
        if self.nf4:
            quantize_blocks(model)
        return model

    def build_for_peft(self) -> nn.Module:
        """Return the same model with dequantized weights, because PEFT does not know `NF4Linear`."""
        model = self.build()
        for name, module in list(model.named_modules()):
            if isinstance(module, NF4Linear):
                parent, _, key = name.rpartition(".")
                setattr(model.get_submodule(parent), key, module.to_linear())
        return model

    def rows(self, lane: int, step: int = 0) -> Tensor:
        """Return a lane's input at one of its steps, (ROWS, LENGTH, in), or token ids (ROWS, LENGTH)."""
        noise = torch.Generator().manual_seed(1000 * lane + step)
        if self.is_language_model:
            return torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=noise).to(self.device)
        return torch.randn(ROWS, LENGTH, self.in_features, generator=noise).to(self.device, self.dtype)

    def loss(self, output: Tensor, rows: Tensor) -> Tensor:
        """Return a lane's loss, a scalar, of the model's output for these rows.

        Language models predict the next token. Other models predict their input with its features rolled by
        one position.
        """
        wide = torch.promote_types(output.dtype, torch.float32)
        if self.is_language_model:
            logits = output[:, :-1].to(wide).reshape(-1, VOCABULARY)
            return nn.functional.cross_entropy(logits, rows[:, 1:].reshape(-1))
        target = rows.to(wide).roll(1, dims=-1)[..., : output.shape[-1]]
        return (output.to(wide) - target).square().mean()


class Rectangles(nn.Module):
    """Two residual blocks, each with a layer (out, in) and a layer (in, out).

    With `head` they are followed by a task's head of two layers, as RoBERTa has it.
    """

    def __init__(self, out_features: int, in_features: int, bias: bool, head: bool) -> None:
        super().__init__()
        self.there = nn.ModuleList(nn.Linear(in_features, out_features, bias=bias) for _ in range(2))
        self.back = nn.ModuleList(nn.Linear(out_features, in_features, bias=bias) for _ in range(2))
        layers = [nn.Linear(in_features, in_features), nn.Tanh(), nn.Linear(in_features, CLASSES)]
        self.head = nn.Sequential(*layers if head else [])

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., in), or with a head to (..., CLASSES)."""
        for there, back in zip(self.there, self.back, strict=True):
            x = x + back(torch.tanh(there(x)))
        return self.head(x)


@cache
def _prototype(model: str, out_features: int, in_features: int, bias: bool) -> nn.Module:
    """Build a model in float32 on the CPU, once per process: this takes longer than a training step."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        if model == "llama":
            from transformers import LlamaConfig, LlamaForCausalLM

            llama = LlamaConfig(
                vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, initializer_range=0.15,
            )  # fmt: skip
            return LlamaForCausalLM(llama)
        if model == "gpt2":
            from transformers import GPT2Config, GPT2LMHeadModel

            gpt2 = GPT2Config(
                vocab_size=VOCABULARY, n_positions=16, n_embd=32, n_layer=2, n_head=4,
                initializer_range=0.15, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            )  # fmt: skip
            return GPT2LMHeadModel(gpt2)
        return Rectangles(out_features, in_features, bias, head=model == "headed")


CASES = (
    Case("tall-bias-float32-one", out_features=40, in_features=24, bias=True, lanes=1),
    Case("tall-nobias-bfloat16-several", out_features=40, in_features=24, dtype=torch.bfloat16),
    Case("wide-bias-bfloat16-several", out_features=24, in_features=40, bias=True, dtype=torch.bfloat16),
    Case("wide-nobias-float32-several", out_features=24, in_features=40),
    Case("wide-nobias-bfloat16-one", out_features=24, in_features=40, dtype=torch.bfloat16, lanes=1),
    Case("llama-float32-several", model="llama"),
    Case("gpt2-float32-several", model="gpt2"),
    Case("headed-float32-several", model="headed", out_features=40, in_features=24, bias=True),
    Case("nf4-llama-bfloat16-several", model="llama", dtype=torch.bfloat16, nf4=True),
    Case(
        "headed-bfloat16-one", model="headed", out_features=24, in_features=40, dtype=torch.bfloat16, lanes=1
    ),
)
"""The first five contain every pair of values of shape, bias, dtype and number of lanes."""
