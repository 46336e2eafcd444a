"""What the laws are tried on: small models, inputs for each lane, and a training loop of a few lines."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from variants.attach import Adapters, CalibrationTensors, attach
from variants.base import CalibrationStatistic, UnsupportedError, Variant, VariantSettings, stable_seed
from variants.calibrate import calibrate

ROWS, LENGTH, WORDS, CLASSES = 8, 5, 64, 6
"""Rows of a lane (fewer, and a CPU's matmul may round differently in company), their length, the vocabulary,
the outputs of a head."""


@dataclass(frozen=True)
class Case:
    """`model`: "rig" (layers of shape out x in and back), "headed" (the same with a task's head), "llama", or
    "gpt2" (whose layers are Conv1D)."""

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
        """Return a new model in evaluation mode, with the same weights at every call."""
        made = copy.deepcopy(_prototype(self.model, self.out, self.inside, self.bias))
        return made.to(self.device, self.dtype).eval()

    def rows(self, lane: int, step: int = 0) -> Tensor:
        """One lane's input at its own step `step`: its data depends on nothing else."""
        noise = torch.Generator().manual_seed(1000 * lane + step)
        if self.model in ("rig", "headed"):
            return torch.randn(ROWS, LENGTH, self.inside, generator=noise).to(self.device, self.dtype)
        return torch.randint(0, WORDS, (ROWS, LENGTH), generator=noise).to(self.device)

    def loss(self, output: Tensor, rows: Tensor) -> Tensor:
        """One lane's: regression on the rotated input for the rig, the next token for language models."""
        wide = torch.promote_types(output.dtype, torch.float32)
        if self.model in ("rig", "headed"):
            wanted = rows.to(wide).roll(1, dims=-1)[..., : output.shape[-1]]
            return (output.to(wide) - wanted).square().mean()
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


class Headed(Rectangles):
    """With a head of two layers behind, as RoBERTa's."""

    def __init__(self, out: int, inside: int, bias: bool) -> None:
        super().__init__(out, inside, bias)
        self.head = nn.Sequential(nn.Linear(inside, inside), nn.Tanh(), nn.Linear(inside, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(super().forward(x))


@cache
def _prototype(model: str, out: int, inside: int, bias: bool) -> nn.Module:
    """Build a model in float32 on the CPU, once a process: building one takes longer than a step of it."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return _MODELS[model](out, inside, bias)


def _llama(out: int, inside: int, bias: bool) -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=WORDS, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, initializer_range=0.15,
        )
    )  # fmt: skip


def _gpt2(out: int, inside: int, bias: bool) -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=WORDS, n_positions=16, n_embd=32, n_layer=2, n_head=4, initializer_range=0.15,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )
    )  # fmt: skip


_MODELS: dict[str, Callable[[int, int, bool], nn.Module]] = {
    "rig": Rectangles,
    "headed": Headed,
    "llama": _llama,
    "gpt2": _gpt2,
}

CASES = (
    Case("tall-bias-float32-one", out=40, inside=24, bias=True, lanes=1),
    Case("tall-nobias-bfloat16-several", out=40, inside=24, dtype=torch.bfloat16),
    Case("wide-bias-bfloat16-several", out=24, inside=40, bias=True, dtype=torch.bfloat16),
    Case("wide-nobias-float32-several", out=24, inside=40),
    Case("wide-nobias-bfloat16-one", out=24, inside=40, dtype=torch.bfloat16, lanes=1),
    Case("llama-float32-several", model="llama"),
    Case("gpt2-float32-several", model="gpt2"),
    Case("headed-float32-several", model="headed", out=40, inside=24, bias=True),
    Case("headed-bfloat16-one", model="headed", out=24, inside=40, dtype=torch.bfloat16, lanes=1),
)
"""The first five meet every pair of (shape, bias, dtype, number of lanes)."""


class NotApplicable(Exception):
    """A law says nothing about this variant, for the reason in the text."""


def run(model: nn.Module, x: Tensor) -> Tensor:
    out = model(x)
    return out if isinstance(out, Tensor) else out.logits


def put_on(
    case: Case,
    variant: Variant,
    lanes: int,
    rank: int = 4,
    dropout: float = 0.0,
    model: nn.Module | None = None,
) -> Adapters:
    """Lanes "0", "1", … with seeds 0, 1, …; fewer where the variant cannot have as many."""
    settings = VariantSettings(rank=rank, alpha=8.0, dropout=dropout)
    adapters = fit(case, variant, settings, model)
    for lane in range(min(lanes, adapters.max_lanes)):
        adapters.add_lane(str(lane), settings, seed=lane, calibration=evidence(case, adapters, lane))
    return adapters


def fit(case: Case, variant: Variant, settings: VariantSettings, model: nn.Module | None = None) -> Adapters:
    """Raises NotApplicable for a variant that trains a head alone where there is none."""
    try:
        heads = ["head"] if case.model == "headed" else []
        return attach(case.build() if model is None else model, variant, settings, heads=heads)
    except UnsupportedError as refusal:
        if case.model != "headed" and "head alone" in str(refusal):
            raise NotApplicable(str(refusal)) from None
        raise


def evidence(case: Case, adapters: Adapters, lane: int) -> CalibrationTensors | None:
    """From three batches, as the lane will see them with its own head."""
    if adapters.variant.calibration_statistic is CalibrationStatistic.NONE:
        return None

    def losses() -> Iterator[Tensor]:
        for step in range(3):
            rows = case.rows(lane, step)
            with adapters.disable_adapters(head_weights=adapters.init_heads(lane)):
                yield case.loss(run(adapters.model, rows), rows)

    return calibrate(adapters, adapters.settings, losses)


@torch.no_grad()
def stir(case: Case, adapters: Adapters, change: float = 0.2) -> None:
    """Moves every trainable number of every lane, until each lane's output has left the base's by
    `change`. The noise of a tensor follows from its name, whatever order a lane keeps its tensors in."""
    base = frozen_output(case, adapters).chunk(len(adapters.lanes))
    for again in range(50):
        now = output(case, adapters).chunk(len(base))
        if all(distance(out, still) > change for out, still in zip(now, base, strict=True)):
            return
        for lane in adapters.lanes:
            for name, parameter in adapters.trainable(lane).items():
                noise = torch.Generator().manual_seed(stable_seed(99, lane, name, again))
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=noise).to(parameter))
    raise AssertionError(f"{adapters.variant.name}: moving its parameters does not change the output")


@torch.no_grad()
def output(case: Case, adapters: Adapters, lanes: Sequence[str] | None = None) -> Tensor:
    """(K * R, ...) of all lanes, each on its own rows."""
    lanes = adapters.lanes if lanes is None else lanes
    with adapters.activate_lanes(lanes, None, rows_per_lane=ROWS):
        return run(adapters.model, together(case, lanes))


def together(case: Case, lanes: Sequence[str], steps: Mapping[str, int] | None = None) -> Tensor:
    return torch.cat([case.rows(int(lane), steps[lane] if steps else 0) for lane in lanes])


@torch.no_grad()
def frozen_output(case: Case, adapters: Adapters) -> Tensor:
    """(K * R, ...) of the frozen model, behind it each lane's head as it started."""
    outs = []
    for lane in adapters.lanes:
        with adapters.disable_adapters(head_weights=adapters.init_heads(adapters.lane_seed(lane))):
            outs.append(run(adapters.model, case.rows(int(lane))))
    return torch.cat(outs)


class LaneOptimizer:
    """AdamW for one lane, with what its variant has to say: rates, hooks before and after the step."""

    def __init__(self, adapters: Adapters, lane: str, rate: float, horizon: int) -> None:
        self.adapters, self.lane, self.rate, self.horizon = adapters, lane, rate, horizon
        self.settings, self.step_number = adapters.lane_settings(lane), 0
        variant = adapters.variant
        groups: dict[float, list[nn.Parameter]] = {}
        for name, parameter in adapters.trainable(lane).items():
            scale = variant.parameter_lr_scale(name.rpartition(".")[2], self.settings)
            groups.setdefault(scale, []).append(parameter)
        self.inner = torch.optim.AdamW(
            [{"params": parameters, "scale": scale} for scale, parameters in groups.items()],
            lr=rate,
            fused=True,  # as orchestrator/finetune/engine/lane.py has it
        )

    def zero_grad(self) -> None:
        self.inner.zero_grad()

    def step(self, rate: float | None = None) -> None:
        adapters, taken = self.adapters, self.step_number
        factor = adapters.variant.schedule_lr_scale(taken, self.horizon, self.settings)
        for group in self.inner.param_groups:
            group["lr"] = (self.rate if rate is None else rate) * group["scale"] * factor
        adapters.before_step(self.lane, taken, self.horizon, self._moments)
        self.inner.step()
        self.step_number += 1
        adapters.after_step(self.lane, self.step_number, self.horizon, self._moments)

    def _moments(self, parameter: Tensor) -> Mapping[str, Tensor]:
        kept = self.inner.state.get(parameter, {})
        return {name: kept[name] for name in ("exp_avg", "exp_avg_sq") if name in kept}


def train_step(
    case: Case, adapters: Adapters, optimizers: Mapping[str, LaneOptimizer], steps: Mapping[str, int]
) -> float:
    """One optimizer step of each of these lanes, each at its own step; returns the summed loss."""
    lanes = tuple(optimizers)
    x = together(case, lanes, steps)
    for each in optimizers.values():
        each.zero_grad()
    with adapters.activate_lanes(lanes, [steps[lane] for lane in lanes], rows_per_lane=ROWS) as now:
        parts = zip(run(adapters.model, x).chunk(len(lanes)), x.chunk(len(lanes)), strict=True)
        losses = torch.stack([case.loss(mine, rows) for mine, rows in parts])
        extra = now.auxiliary_loss()
        (losses if extra is None else losses + extra).sum().backward()
    for each in optimizers.values():
        each.step()
    return losses.sum().item()


def train(case: Case, adapters: Adapters, steps: int, rate: float = 0.01) -> None:
    """All lanes, side by side."""
    optimizers = {lane: LaneOptimizer(adapters, lane, rate, steps) for lane in adapters.lanes}
    for step in range(steps):
        train_step(case, adapters, optimizers, dict.fromkeys(optimizers, step))


def state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every tensor of the model, by its name when no adapters are on."""
    return {name.replace(".base_layer.", "."): value.clone() for name, value in model.state_dict().items()}


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """Bit for bit, names included."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def distance(left: Tensor, right: Tensor) -> float:
    """|left - right| / |right|, in float64."""
    return ((left.double() - right.double()).norm() / right.double().norm()).item()
