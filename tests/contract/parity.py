"""Ten optimizer steps beside the PEFT library: its random draws copied in, float64, everything compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft import HiraConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from rig import Case, put_on, run
from torch import Tensor, nn

from variants.attach import Adapters
from variants.contract import Settings, Start, Variant
from variants.targets import is_conv1d

RANK, ALPHA, STEPS, RATE = 4, 8.0, 10, 0.01


@dataclass(frozen=True)
class Oracle:
    """PEFT's config for a variant; `own` finds our name of PEFT's tensor by its name's ending."""

    config: Callable[[list[str]], PeftConfig]
    own: dict[str, str]
    residual: bool = False
    """PEFT has written the start's residual into the weight (PiSSA)."""


AB = {"lora_A.weight": "A", "lora_B.weight": "B"}


def _lora(**more: object) -> Callable[[list[str]], PeftConfig]:
    return lambda targets: LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules=targets, **more)


SETTINGS = {
    "lora": Oracle(_lora(), AB),
    "rslora": Oracle(_lora(use_rslora=True), AB),
    "dora": Oracle(_lora(use_dora=True), {**AB, "lora_magnitude_vector": "m"}),
    "hira": Oracle(
        lambda targets: HiraConfig(r=RANK, target_modules=targets), {"hira_A": "A", "hira_B": "B"}
    ),
    "pissa": Oracle(_lora(init_lora_weights="pissa"), AB, residual=True),
}


def steps_alike(variant: Variant, oracle: Oracle, model: str) -> None:
    """Raises AssertionError, with the step and the tensor, where ours and PEFT's differ by more than 1e-6."""
    case = Case(model, model=model, dtype=torch.float64)
    ours = put_on(case.build(), variant, 0)
    # PEFT's SVD wants float32: made there, then everything goes to float64.
    begun = case.build().to(torch.float32 if oracle.residual else torch.float64)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        theirs = get_peft_model(begun, oracle.config(sorted(ours.layers))).double().eval()
    _copy_in(ours, theirs, variant, oracle)

    mine = ours.trainable("0")
    yours = _tensors(theirs, oracle)
    assert mine.keys() == yours.keys()
    optimizers = [torch.optim.AdamW(tensors.values(), lr=RATE) for tensors in (mine, yours)]
    for step in range(STEPS):
        rows = case.rows(0, step)
        with ours.rows(["0"], step):
            out = run(ours.model, rows)
        losses = [case.loss(each, rows) for each in (out, run(theirs, rows))]
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0, msg=lambda m: f"step {step}: {m}")  # noqa: B023
        for each, loss in zip(optimizers, losses, strict=True):
            each.zero_grad()
            loss.backward()
            each.step()
        for name, tensor in mine.items():
            assert torch.allclose(tensor, yours[name], rtol=1e-6, atol=1e-9), f"step {step}: {name} differs"


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


def _copy_in(ours: Adapters, theirs: PeftModel, variant: Variant, oracle: Oracle) -> None:
    assert get_peft_model_state_dict(theirs)
    begin = {name: tensor.detach().clone() for name, tensor in _tensors(theirs, oracle).items()}
    frozen: dict[str, Tensor] = {}
    settings = Settings(RANK, ALPHA)
    if oracle.residual:
        scaling = variant.scaling(settings)
        modules = dict(theirs.get_base_model().named_modules())
        for name, layer in ours.layers.items():
            a, b = begin[f"{name}.A"], begin[f"{name}.B"]
            frozen |= {f"{name}.A0": a, f"{name}.B0": b}
            residual = layer.layer.weight - scaling * b @ a
            weight = modules[name].base_layer.weight.data  # type: ignore[union-attr]
            stored = weight.t() if is_conv1d(layer.base) else weight
            torch.testing.assert_close(stored, residual, rtol=0, atol=1e-6)  # the same start, up to float32
            stored.copy_(residual)
            own = variant.start(layer.layer, variant.checked_settings(settings), torch.Generator())
            _same_product(own, a, b)
    ours.load("0", begin, frozen, settings)


def _same_product(own: Start, a: Tensor, b: Tensor) -> None:
    """Singular vectors are unique up to sign: their product is what counts."""
    torch.testing.assert_close(own.trainable["B"] @ own.trainable["A"], b @ a, rtol=0, atol=1e-5)
