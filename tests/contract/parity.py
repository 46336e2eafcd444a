"""Ten optimizer steps beside a trusted implementation: its random draws copied in, float64, everything
compared.

For variants that PEFT has, that is PEFT, with its own optimizer, loss term or call after the step where it
has one; for the controls, plain AdamW on the model itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from peft import (
    AdaLoraConfig,
    EvaConfig,
    HiraConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
    initialize_lora_eva_weights,
)
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor, nn

from variants.attach import Adapters
from variants.base import ExtraSettings, InitialTensors, Variant, VariantSettings
from variants.full_finetune import MODEL_PREFIX
from variants.targets import is_conv1d
from variants.testing.cases import Case
from variants.testing.rig import LaneOptimizer, attach_variant, calibrate_lane, model_output

RANK, ALPHA, STEPS, RATE, DECAY = 4, 8.0, 10, 0.01, 0.01

LANGUAGE = ("llama", "gpt2")
"""Layers of Linear, and of Conv1D."""


@dataclass(frozen=True)
class Oracle:
    """PEFT's config for a variant; `own` finds our name of PEFT's tensor by its name's ending. Without a
    config the oracle is the model itself, whose parameters have the names of the lane's."""

    config: Callable[[list[str]], PeftConfig] | None
    own: dict[str, str] = field(default_factory=dict)
    residual: bool = False
    """PEFT has written the start's residual into the weight (PiSSA)."""
    extra: ExtraSettings = field(default_factory=dict)
    """Of our variant's settings."""
    start: Callable[[PeftModel, Adapters, Case], None] | None = None
    """What else PEFT's start needs, or the lane takes over (EVA's ranks, VeRA's projections)."""
    optimizer: Callable[[PeftModel], torch.optim.Optimizer] | None = None
    """PEFT's own (LoRA+); else AdamW."""
    after: Callable[[PeftModel, int], None] | None = None
    """What PEFT wants called after each step, with the number of steps taken (AdaLoRA)."""
    models: tuple[str, ...] = LANGUAGE


AB = {"lora_A.weight": "A", "lora_B.weight": "B"}


def _lora(**more: object) -> Callable[[list[str]], PeftConfig]:
    return lambda targets: LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules=targets, **more)


def _plus(model: PeftModel) -> torch.optim.Optimizer:
    return create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=16, loraplus_weight_decay=DECAY
    )


def _adalora(orthogonality: float, final: int) -> Oracle:
    """Reallocated after steps 3 to 9 or so; settled `final` steps before the last."""

    def config(targets: list[str]) -> PeftConfig:
        return AdaLoraConfig(
            init_r=6, target_r=RANK, lora_alpha=int(ALPHA), target_modules=targets, total_step=STEPS,
            tinit=2, tfinal=final, orth_reg_weight=orthogonality,
        )  # fmt: skip

    return Oracle(
        config,
        {f"lora_{name}": name for name in "AEB"},
        extra={"initial": 1.5, "warmup": 0.2, "final": final / STEPS, "orthogonality": orthogonality},
        after=lambda model, step: model.base_model.update_and_allocate(step),
    )


def _eva(theirs: PeftModel, ours: Adapters, case: Case) -> None:
    """From the batches that the lane was calibrated with: the same ranks, and the same directions up to
    sign."""
    with torch.random.fork_rng():
        batches = [{"input_ids": torch.cat([case.rows(0, step) for step in range(3)])}]
        initialize_lora_eva_weights(theirs, batches, show_progress_bar=False)
    modules = dict(theirs.get_base_model().named_modules())
    ranks = ours.ranks_in_use("0")
    assert len(set(ranks.values())) > 1
    assert ranks == {name: modules[name].r["default"] for name in ranks}
    for name, rank in ranks.items():
        mine, a = ours.trainable("0")[f"{name}.A"][:rank], modules[name].lora_A["default"].weight
        assert nn.functional.cosine_similarity(mine, a.to(mine), dim=1).abs().min() > 1 - 1e-5


def _vera(theirs: PeftModel, ours: Adapters, case: Case) -> None:
    for key, tensor in ours.frozen("0").items():
        tensor.copy_(getattr(theirs.base_model, f"vera_{key[-1]}")["default"])


SETTINGS = {
    "lora": Oracle(_lora(), AB),
    "rslora": Oracle(_lora(use_rslora=True), AB),
    "dora": Oracle(_lora(use_dora=True), {**AB, "lora_magnitude_vector": "m"}),
    "hira": Oracle(
        lambda targets: HiraConfig(r=RANK, target_modules=targets), {"hira_A": "A", "hira_B": "B"}
    ),
    "pissa": Oracle(_lora(init_lora_weights="pissa"), AB, residual=True),
    "adalora": _adalora(orthogonality=0.5, final=0),
    "eva": Oracle(_lora(init_lora_weights="eva", eva_config=EvaConfig(rho=2.0)), AB, start=_eva),
    "vera": Oracle(
        lambda targets: VeraConfig(r=16 * RANK, target_modules=targets),
        {"vera_lambda_b": "b", "vera_lambda_d": "d"},
        extra={"rank_factor": 16},
        start=_vera,
    ),
    "lora_plus": Oracle(_lora(), AB, optimizer=_plus),
    "full": Oracle(None),
    "head_only": Oracle(None, models=("headed",)),
}
ADALORA_SETTLED = _adalora(orthogonality=0.0, final=4)
"""The steps with ranks that stay: there ours and PEFT's orthogonality differ (see the variant)."""


def steps_alike(variant: Variant, oracle: Oracle, model: str) -> Adapters:
    """Raises AssertionError, with the step and the tensor, where ours and the oracle's differ by more than
    1e-6; returns ours after the steps."""
    case = Case(model, model=model, dtype=torch.float64)
    settings = VariantSettings(RANK, ALPHA, extra=oracle.extra)
    ours = attach_variant(case, variant, settings)
    ours.add_lane("0", settings, seed=0, calibration=calibrate_lane(case, ours, 0))
    theirs, yours = _peft(case, ours, oracle) if oracle.config else _itself(case, ours)
    mine = ours.trainable("0")
    assert mine.keys() == yours.keys()
    stepper = LaneOptimizer(ours, "0", RATE, STEPS)
    if oracle.optimizer is not None:
        other = oracle.optimizer(theirs)  # type: ignore[arg-type]
    else:
        other = torch.optim.AdamW(yours.values(), lr=RATE, weight_decay=DECAY)
    for step in range(STEPS):
        rows = case.rows(0, step)
        stepper.zero_grad()
        other.zero_grad()
        with ours.activate_lanes(["0"], step) as now:
            loss, extra = case.loss(model_output(ours.model, rows), rows), now.auxiliary_loss()
            loss = loss if extra is None else loss + extra.sum()
            loss.backward()
        wanted = _loss(theirs, case, rows)
        wanted.backward()
        torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0, msg=lambda m: f"step {step}: {m}")  # noqa: B023
        stepper.step()
        other.step()
        if oracle.after is not None:
            oracle.after(theirs, step + 1)  # type: ignore[arg-type]
        for name, tensor in mine.items():
            wanted = _padded(yours[name], tensor)
            assert torch.allclose(tensor, wanted, rtol=1e-6, atol=1e-9), f"step {step}: {name} differs"
    return ours


def _loss(theirs: nn.Module, case: Case, rows: Tensor) -> Tensor:
    """PEFT's own, with what it adds in its forward, where the oracle is PEFT's."""
    if isinstance(theirs, PeftModel):
        return theirs.base_model(input_ids=rows, labels=rows).loss
    return case.loss(model_output(theirs, rows), rows)


def _itself(case: Case, ours: Adapters) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """The model with the lane's head, and its parameters by our names."""
    model = case.build()
    names = {name: name.removeprefix(MODEL_PREFIX) for name in ours.trainable("0")}
    learnt = {name: model.get_parameter(path) for name, path in names.items()}
    for parameter in model.parameters():
        parameter.requires_grad_(any(parameter is each for each in learnt.values()))
    with torch.no_grad():
        for name, parameter in learnt.items():
            parameter.copy_(ours.trainable("0")[name])
    return model, learnt


def _peft(case: Case, ours: Adapters, oracle: Oracle) -> tuple[PeftModel, dict[str, nn.Parameter]]:
    """PEFT's model, whose draws the lane takes over, and its parameters by our names."""
    assert oracle.config is not None
    # Made over float32, where the weights are drawn: PEFT's SVD wants it, and over float64 AdaLoRA's ranknum
    # would learn. Then everything goes to float64.
    begun = case.build().float()
    begun.loss_function = lambda logits, labels, **_: case.loss(logits, labels)  # transformers' is float32
    with torch.random.fork_rng():
        torch.manual_seed(3)
        theirs = get_peft_model(begun, oracle.config(sorted(ours.layers))).eval()
    if oracle.start is not None:
        with torch.no_grad():
            oracle.start(theirs, ours, case)
    learnt = {name for name, parameter in theirs.named_parameters() if parameter.requires_grad}
    for name, parameter in theirs.double().named_parameters():
        parameter.requires_grad_(name in learnt)
    yours = _tensors(theirs, oracle)
    with torch.no_grad():
        for name, parameter in ours.trainable("0").items():
            parameter.copy_(_padded(yours[name], parameter))
        if oracle.residual:
            _share_residual(ours, theirs, yours)
    return theirs, yours


def _tensors(theirs: PeftModel, oracle: Oracle) -> dict[str, nn.Parameter]:
    """PEFT's parameters by our names."""
    found = {}
    for key, parameter in theirs.named_parameters():
        if not parameter.requires_grad:
            continue
        name = key.removeprefix("base_model.model.").replace(".default", "")
        ending = next(end for end in oracle.own if f".{end}" in name)
        found[f"{name[: name.index(f'.{ending}')]}.{oracle.own[ending]}"] = parameter
    return found


def _padded(theirs: Tensor, mine: Tensor) -> Tensor:
    """With zeros for the ranks that the lane does not use and PEFT does not have (EVA)."""
    whole = torch.zeros_like(mine)
    whole[tuple(map(slice, theirs.shape))] = theirs
    return whole


def _share_residual(ours: Adapters, theirs: PeftModel, yours: Mapping[str, Tensor]) -> None:
    """PEFT's start becomes the lane's offset, and the lane's residual weight PEFT's weight."""
    scaling = ours.variant.scaling(ours.settings)
    modules = dict(theirs.get_base_model().named_modules())
    frozen = ours.frozen("0")
    for name, layer in ours.layers.items():
        a, b = yours[f"{name}.A"].detach(), yours[f"{name}.B"].detach()
        frozen[f"{name}.A0"].copy_(a)
        frozen[f"{name}.B0"].copy_(b)
        residual = layer.frozen_layer.weight - scaling * b @ a
        weight = modules[name].base_layer.weight.data  # type: ignore[union-attr]
        stored = weight.t() if is_conv1d(layer.base_layer) else weight
        torch.testing.assert_close(stored, residual, rtol=0, atol=1e-6)  # the same start, up to float32
        stored.copy_(residual)
        _same_product(ours.variant.init(layer.frozen_layer, ours.settings, torch.Generator()), a, b)


def _same_product(own: InitialTensors, a: Tensor, b: Tensor) -> None:
    """Singular vectors are unique up to sign: their product is what counts."""
    torch.testing.assert_close(own.trainable["B"] @ own.trainable["A"], b @ a, rtol=0, atol=1e-5)
