"""What the laws are tried on: small models, inputs for each lane, and a training loop of a few lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from variants.attach import Adapters, attach
from variants.contract import Settings, Variant

ROWS, LENGTH, WORDS = 8, 5, 64
"""Rows of a lane (fewer, and a CPU's matmul may round differently in company), their length, the
vocabulary."""


@dataclass(frozen=True)
class Case:
    """`model`: "rig" (layers of shape out x in and back), "llama", or "gpt2" (whose layers are Conv1D)."""

    name: str
    model: str = "rig"
    out: int = 32
    inside: int = 32
    bias: bool = False
    dtype: torch.dtype = torch.float32
    lanes: int = 3
    device: str = "cpu"

    @property
    def tolerance(self) -> float:
        """Relative error that rounding explains."""
        return {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}[self.dtype]

    def build(self) -> nn.Module:
        """The same weights at every call."""
        with torch.random.fork_rng():
            torch.manual_seed(7)
            return _MODELS[self.model](self).to(self.device, self.dtype).eval()

    def rows(self, lane: int, step: int = 0) -> Tensor:
        """One lane's input at its own step `step`: its data depends on nothing else."""
        noise = torch.Generator().manual_seed(1000 * lane + step)
        if self.model == "rig":
            return torch.randn(ROWS, LENGTH, self.inside, generator=noise).to(self.device, self.dtype)
        return torch.randint(0, WORDS, (ROWS, LENGTH), generator=noise).to(self.device)

    def loss(self, output: Tensor, rows: Tensor) -> Tensor:
        """One lane's: regression on the rotated input for the rig, the next token for language models."""
        wide = torch.promote_types(output.dtype, torch.float32)
        if self.model == "rig":
            return (output.to(wide) - rows.to(wide).roll(1, dims=-1)).square().mean()
        logits = output[:, :-1].to(wide).reshape(-1, WORDS)
        return nn.functional.cross_entropy(logits, rows[:, 1:].reshape(-1))


class Rectangles(nn.Module):
    """Two blocks of a layer (out, in) and one back (in, out), with a residual path."""

    def __init__(self, out: int, inside: int, bias: bool) -> None:
        super().__init__()
        self.there = nn.ModuleList(nn.Linear(inside, out, bias=bias) for _ in range(2))
        self.back = nn.ModuleList(nn.Linear(out, inside, bias=bias) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for there, back in zip(self.there, self.back, strict=True):
            x = x + back(torch.tanh(there(x)))
        return x


def _llama(case: Case) -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=WORDS, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, initializer_range=0.15,
        )
    )  # fmt: skip


def _gpt2(case: Case) -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=WORDS, n_positions=16, n_embd=32, n_layer=2, n_head=4, initializer_range=0.15,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )
    )  # fmt: skip


_MODELS = {"rig": lambda case: Rectangles(case.out, case.inside, case.bias), "llama": _llama, "gpt2": _gpt2}

CASES = (
    Case("tall-bias-float32-one", out=40, inside=24, bias=True, lanes=1),
    Case("tall-nobias-bfloat16-several", out=40, inside=24, dtype=torch.bfloat16),
    Case("wide-bias-bfloat16-several", out=24, inside=40, bias=True, dtype=torch.bfloat16),
    Case("wide-nobias-float32-several", out=24, inside=40),
    Case("wide-nobias-bfloat16-one", out=24, inside=40, dtype=torch.bfloat16, lanes=1),
    Case("llama-float32-several", model="llama"),
    Case("gpt2-float32-several", model="gpt2"),
)
"""The first five meet every pair of (shape, bias, dtype, number of lanes)."""


def run(model: nn.Module, x: Tensor) -> Tensor:
    out = model(x)
    return out if isinstance(out, Tensor) else out.logits


def put_on(model: nn.Module, variant: Variant, lanes: int, rank: int = 4, dropout: float = 0.0) -> Adapters:
    """Lanes "0", "1", … with seeds 0, 1, …"""
    settings = Settings(rank=rank, alpha=8.0, dropout=dropout)
    adapters = attach(model, variant, settings)
    for lane in range(lanes):
        adapters.add(str(lane), settings, seed=lane)
    return adapters


@torch.no_grad()
def stir(case: Case, adapters: Adapters, change: float = 0.2) -> None:
    """Moves every trainable number of every lane, until each lane's output has left the base's by
    `change`."""
    noise = torch.Generator().manual_seed(99)
    with adapters.off():
        base = run(adapters.model, together(case, adapters.lanes)).chunk(len(adapters.lanes))
    for _ in range(50):
        now = output(case, adapters).chunk(len(base))
        if all(distance(out, still) > change for out, still in zip(now, base, strict=True)):
            return
        for lane in adapters.lanes:
            for parameter in adapters.trainable(lane).values():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=noise).to(parameter))
    raise AssertionError(f"{adapters.variant.name}: moving its parameters does not change the output")


@torch.no_grad()
def output(case: Case, adapters: Adapters, lanes: Sequence[str] | None = None) -> Tensor:
    """(K * R, ...) of all lanes, each on its own rows."""
    lanes = adapters.lanes if lanes is None else lanes
    with adapters.rows(lanes, None, rows=ROWS):
        return run(adapters.model, together(case, lanes))


def together(case: Case, lanes: Sequence[str], steps: Mapping[str, int] | None = None) -> Tensor:
    return torch.cat([case.rows(int(lane), steps[lane] if steps else 0) for lane in lanes])


def optimizer(adapters: Adapters, lane: str, rate: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(adapters.trainable(lane).values(), lr=rate, foreach=False)


def train_step(
    case: Case, adapters: Adapters, optimizers: Mapping[str, torch.optim.Optimizer], steps: Mapping[str, int]
) -> float:
    """One optimizer step of each of these lanes, each at its own step; returns the summed loss."""
    lanes = tuple(optimizers)
    x = together(case, lanes, steps)
    with adapters.rows(lanes, [steps[lane] for lane in lanes], rows=ROWS):
        out = run(adapters.model, x)
    parts = zip(out.chunk(len(lanes)), x.chunk(len(lanes)), strict=True)
    loss = torch.stack([case.loss(mine, rows) for mine, rows in parts]).sum()
    for each in optimizers.values():
        each.zero_grad()
    loss.backward()
    for each in optimizers.values():
        each.step()
    return loss.item()


def train(case: Case, adapters: Adapters, steps: int, rate: float = 0.01) -> None:
    """All lanes, side by side."""
    optimizers = {lane: optimizer(adapters, lane, rate) for lane in adapters.lanes}
    for step in range(steps):
        train_step(case, adapters, optimizers, dict.fromkeys(optimizers, step))


def state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every tensor of the model, by its name when no adapters are on."""
    return {name.replace(".base.", "."): value.clone() for name, value in model.state_dict().items()}


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """Bit for bit, names included."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def distance(left: Tensor, right: Tensor) -> float:
    """|left - right| / |right|, in float64."""
    return ((left.double() - right.double()).norm() / right.double().norm()).item()
