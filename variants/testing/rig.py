"""The cases of the laws, and helpers that attach lanes to a case's model, train them, and compare results."""

from __future__ import annotations

import copy
import sys
import traceback
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor, nn

from variants.adapters import Adapters, CalibrationTensors, attach
from variants.api import CalibrationStatistic, ExtraSettings, Variant, VariantSettings
from variants.calibrate import calibrate
from variants.errors import UnsupportedError
from variants.frozen_layer import seeded_generator
from variants.hooks import parameter_lr_scale, schedule_lr_scale, statistic_of
from variants.nf4 import NF4Linear, quantize_blocks

SETTINGS = VariantSettings(rank=4, alpha=8.0)

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
    """A model of two residual blocks. Each block has a layer (out, in) and a layer (in, out).

    With `head`, a task's head of two linear layers follows the blocks, as in RoBERTa.
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


class NotApplicableError(Exception):
    """A law does not apply to a variant, for the reason in the message."""


@contextmanager
def one_thread() -> Iterator[None]:
    """Let PyTorch compute with one thread, as trainers on CPUs do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def model_output(model: nn.Module, x: Tensor) -> Tensor:
    """Return a model's output tensor, or the logits of a language model."""
    out = model(x)
    return out if isinstance(out, Tensor) else out.logits


def attach_lanes(
    case: Case,
    variant: Variant,
    lanes: int,
    settings: VariantSettings = SETTINGS,
    model: nn.Module | None = None,
) -> Adapters:
    """Attach a variant with lanes "0", "1", ... whose seeds are 0, 1, ...

    Args:
        case: The case that builds the model.
        variant: The variant.
        lanes: The number of lanes; a variant that permits fewer gets as many as it permits.
        settings: The settings of each lane; `LAW_SETTINGS` completes them.
        model: A model to use in place of a new one.
    """
    settings = replace(settings, extra={**LAW_SETTINGS.get(variant.name, {}), **settings.extra})
    heads = ["head"] if case.model == "headed" else []
    adapters = attach(case.build() if model is None else model, variant, settings, heads=heads)
    for lane in range(min(lanes, adapters.max_lanes)):
        adapters.add_lane(str(lane), settings, lane, calibrate_lane(case, adapters, lane))
    return adapters


def calibrate_lane(case: Case, adapters: Adapters, lane: int) -> CalibrationTensors | None:
    """Return the calibration tensors from a lane's first three batches with the lane's initial head.

    The result is None if the variant needs no calibration.
    """
    if statistic_of(adapters.variant) is CalibrationStatistic.NONE:
        return None

    def iterate_losses() -> Generator[Tensor, None, None]:
        for step in range(3):
            rows = case.rows(lane, step)
            with adapters.disable_adapters(head_weights=adapters.init_heads(lane)):
                yield case.loss(model_output(adapters.model, rows), rows)

    return calibrate(adapters, adapters.settings, iterate_losses)


@torch.no_grad()
def perturb_lanes(case: Case, adapters: Adapters) -> None:
    """Add noise to every parameter until each lane's output differs by 20 % from what it was.

    If an update is bounded (a reflection), no noise may reach that; 10 % are then enough.

    The noise of a tensor depends on its name only, and not on the order in which a lane keeps its tensors. It
    is smaller for a variant with a `typical_lr_scale` below 1, because noise that is large for the parameters
    of such a variant changes the output by far more than 20 % at once.

    Raises:
        AssertionError: The parameters do not affect the output.
    """
    before = lane_outputs(case, adapters).chunk(len(adapters.lanes))
    size = 0.1 * min(1.0, adapters.variant.typical_lr_scale)
    rounds = 200
    for attempt in range(rounds + 1):
        outputs = lane_outputs(case, adapters).chunk(len(before))
        change = min(relative_error(out, start) for out, start in zip(outputs, before, strict=True))
        if change > (0.2 if attempt < rounds else 0.1):
            return
        for lane in adapters.lanes:
            for name, parameter in adapters.trainable(lane).items():
                noise = seeded_generator(99, lane, name, attempt)
                growth = max(1, attempt // 20)  # for a variant that divides by the size of the layer
                parameter.add_(size * growth * torch.randn(parameter.shape, generator=noise).to(parameter))
    raise AssertionError(f"{adapters.variant.name}: a change of its parameters does not change the output")


@torch.no_grad()
def lane_outputs(case: Case, adapters: Adapters, lanes: Sequence[str] | None = None) -> Tensor:
    """Return the outputs (K * ROWS, ...) of some or all lanes, each for its own rows."""
    lanes = adapters.lanes if lanes is None else lanes
    with adapters.activate_lanes(lanes, None, rows_per_lane=ROWS):
        return model_output(adapters.model, lane_inputs(case, lanes))


def lane_inputs(case: Case, lanes: Sequence[str], steps: Sequence[int] | None = None) -> Tensor:
    """Return the rows (K * ROWS, ...) of K lanes, each at its own step (0 by default)."""
    steps = steps or [0] * len(lanes)
    return torch.cat([case.rows(int(lane), step) for lane, step in zip(lanes, steps, strict=True)])


@torch.no_grad()
def base_outputs(case: Case, adapters: Adapters) -> Tensor:
    """Return the outputs (K * ROWS, ...) of the frozen model with each lane's initial head."""
    outputs = []
    for lane in adapters.lanes:
        with adapters.disable_adapters(head_weights=adapters.init_heads(adapters.lane_seed(lane))):
            outputs.append(model_output(adapters.model, case.rows(int(lane))))
    return torch.cat(outputs)


class LaneOptimizer:
    """AdamW for one lane with its variant's learning-rate factors and hooks, which assume `total_steps`."""

    def __init__(self, adapters: Adapters, lane: str, learning_rate: float, total_steps: int) -> None:
        self.adapters, self.lane = adapters, lane
        self.learning_rate, self.total_steps = learning_rate, total_steps
        self.settings, self.steps_taken = adapters.lane_settings(lane), 0
        groups: dict[float, list[nn.Parameter]] = {}
        for name, parameter in adapters.trainable(lane).items():
            scale = parameter_lr_scale(adapters.variant, name.rpartition(".")[2], self.settings)
            groups.setdefault(scale, []).append(parameter)
        self.optimizer = torch.optim.AdamW(
            [{"params": parameters, "scale": scale} for scale, parameters in groups.items()],
            lr=learning_rate,
            fused=True,  # as in orchestrator/finetune/engine/lane.py
        )

    def zero_grad(self) -> None:
        """Delete the lane's gradients."""
        self.optimizer.zero_grad()

    def step(self) -> None:
        """Take a step."""
        adapters, taken = self.adapters, self.steps_taken
        factor = schedule_lr_scale(adapters.variant, taken, self.total_steps, self.settings)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * group["scale"] * factor
        adapters.before_step(self.lane, taken, self.total_steps, self.optimizer)
        self.optimizer.step()
        self.steps_taken += 1
        adapters.after_step(self.lane, self.steps_taken, self.total_steps, self.optimizer)


def train_step(case: Case, adapters: Adapters, optimizers: Mapping[str, LaneOptimizer]) -> None:
    """Take one optimizer step of several lanes together."""
    for optimizer in optimizers.values():
        optimizer.zero_grad()
    backward(case, adapters, tuple(optimizers), [each.steps_taken for each in optimizers.values()])
    for optimizer in optimizers.values():
        optimizer.step()


def backward(case: Case, adapters: Adapters, lanes: Sequence[str], steps: Sequence[int]) -> Tensor | None:
    """Compute the gradients of several lanes in one backward pass.

    Args:
        case: The case of the laws, with its model and loss.
        adapters: The adapters that hold the lanes.
        lanes: The K lanes.
        steps: Each lane's optimizer step, which determines its inputs and dropout masks.

    Returns:
        The lanes' auxiliary losses, (K,); None if the variant has none.
    """
    x = lane_inputs(case, lanes, steps)
    with adapters.activate_lanes(lanes, steps, rows_per_lane=ROWS) as context:
        parts = zip(model_output(adapters.model, x).chunk(len(lanes)), x.chunk(len(lanes)), strict=True)
        losses = torch.stack([case.loss(out, rows) for out, rows in parts])
        auxiliary = context.auxiliary_loss()
        (losses if auxiliary is None else losses + auxiliary).sum().backward()
    return auxiliary


def train(case: Case, adapters: Adapters, steps: int) -> None:
    """Train all lanes together for a number of steps, at a learning rate of 0.01."""
    optimizers = {lane: LaneOptimizer(adapters, lane, 0.01, steps) for lane in adapters.lanes}
    for _ in range(steps):
        train_step(case, adapters, optimizers)


def find_fault(variant: Variant, settings: VariantSettings) -> str:
    """Attach a variant to a small model on the CPU, take one optimizer step, and return what went wrong.

    The result is a clause with the line in the variant's file and the error. It is empty if there was no
    error, or if the variant does not support the layers of the small model.
    """
    size = 64 * max(1, -(-2 * settings.rank // 64))
    case = Case("trial", model="headed", out_features=size, in_features=2 * size, bias=True)
    own_file = variant.source_path or getattr(sys.modules.get(type(variant).__module__), "__file__", None)
    try:
        adapters = attach_lanes(case, variant, 2, settings)
        train_step(case, adapters, {lane: LaneOptimizer(adapters, lane, 0.01, 2) for lane in adapters.lanes})
    except UnsupportedError:
        return ""
    except Exception as error:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == own_file]
        where = f"line {lines[-1]}: " if lines else ""
        return where + " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return ""


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of all tensors of a model, under the names that they have without adapters."""
    return {name.replace(".base_layer.", "."): value.clone() for name, value in model.state_dict().items()}


def tensors_equal(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """Return whether both mappings have the same names and, bit for bit, the same tensors."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def relative_error(left: Tensor, right: Tensor) -> float:
    """Return |left - right| / |right|, computed in float64."""
    return ((left.double() - right.double()).norm() / right.double().norm()).item()
