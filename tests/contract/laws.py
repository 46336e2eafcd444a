"""The laws every variant passes, as plain functions: a law raises AssertionError where a variant breaks it.

test_laws.py tries them on everything in the catalogue, test_laws_bite.py on variants that are broken on
purpose.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from rig import (
    Case,
    distance,
    optimizer,
    output,
    put_on,
    run,
    same,
    state,
    stir,
    together,
    train,
    train_step,
)
from torch import nn

from variants.attach import Adapters, attach
from variants.contract import MergeRefused, Settings, Variant
from variants.storage import load_lane, load_peft, save_lane, save_peft

Law = Callable[[Variant, Case], None]


class NotApplicable(Exception):
    """The law says nothing about this variant, for the reason in the text."""


def starts_at_the_base(variant: Variant, case: Case) -> None:
    """At step 0 every lane computes what the frozen model computes, bit for bit."""
    adapters = put_on(case.build(), variant, case.lanes)
    with torch.no_grad(), adapters.off():
        base = run(adapters.model, together(case, adapters.lanes))
    assert torch.equal(output(case, adapters), base)


def every_tensor_gets_a_gradient(variant: Variant, case: Case) -> None:
    """Within two steps each trainable tensor of each lane has had a gradient that is not zero."""
    adapters = put_on(case.build(), variant, case.lanes)
    optimizers = {lane: optimizer(adapters, lane, 0.01) for lane in adapters.lanes}
    reached = set()
    for step in range(2):
        train_step(case, adapters, optimizers, dict.fromkeys(optimizers, step))
        for lane in adapters.lanes:
            for name, parameter in adapters.trainable(lane).items():
                if parameter.grad is not None and parameter.grad.count_nonzero():
                    reached.add((lane, name))
    wanted = {(lane, name) for lane in adapters.lanes for name in adapters.trainable(lane)}
    assert wanted
    assert reached == wanted, f"without a gradient: {sorted(wanted - reached)}"


def merged_equals_forward(variant: Variant, case: Case) -> None:
    """A merged lane computes what it computed beside the base (or merging is refused by name)."""
    adapters = put_on(case.build(), variant, case.lanes)
    stir(case, adapters)
    before = output(case, adapters).chunk(case.lanes)[0]
    for other in adapters.lanes[1:]:
        adapters.remove(other)
    refused = ""
    try:
        adapters.merge("0")
    except MergeRefused as refusal:
        refused = str(refusal)
    if refused:
        assert variant.name in refused
        raise NotApplicable(refused)
    with torch.no_grad():
        merged = run(adapters.model, case.rows(0))
    assert distance(merged, before) < case.tolerance


def off_gives_the_base_back(variant: Variant, case: Case) -> None:
    """off() computes, and detach() leaves, the model as it was before: outputs, weights and flags, bit for
    bit."""
    model = case.build()
    weights, kinds = state(model), [type(module) for module in model.modules()]
    with torch.no_grad():
        base = run(model, case.rows(0))
    adapters = put_on(model, variant, case.lanes)
    stir(case, adapters)
    assert not torch.equal(output(case, adapters, ["0"]), base)
    with torch.no_grad(), adapters.off():
        assert torch.equal(run(model, case.rows(0)), base)
    adapters.detach()
    assert same(dict(model.state_dict()), weights)
    assert [type(module) for module in model.modules()] == kinds
    assert all(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        assert torch.equal(run(model, case.rows(0)), base)


def frozen_stays_frozen(variant: Variant, case: Case) -> None:
    """Training changes neither the base nor what a lane's start froze."""
    adapters = put_on(case.build(), variant, case.lanes)
    assert not any(parameter.requires_grad for parameter in adapters.model.parameters())
    weights = state(adapters.model)
    frozen = {lane: {n: t.clone() for n, t in adapters.frozen(lane).items()} for lane in adapters.lanes}
    trainable = {lane: {n: t.clone() for n, t in adapters.trainable(lane).items()} for lane in adapters.lanes}
    train(case, adapters, steps=3)
    for lane in adapters.lanes:
        assert not same(adapters.trainable(lane), trainable[lane])  # it did train
        assert same(adapters.frozen(lane), frozen[lane])
    assert same(state(adapters.model), weights)


def saved_is_loaded(variant: Variant, case: Case) -> None:
    """A lane's file, on a fresh copy of the same base, gives the same tensors and outputs, bit for bit."""
    adapters = put_on(case.build(), variant, case.lanes)
    stir(case, adapters)
    fresh = case.build()
    fresh.load_state_dict(state(adapters.model))
    others = attach(fresh, variant, adapters.settings)
    with tempfile.TemporaryDirectory() as folder:
        for lane in adapters.lanes:
            save_lane(adapters, lane, Path(folder, f"{lane}.safetensors"))
            load_lane(others, lane, Path(folder, f"{lane}.safetensors"))
    for lane in adapters.lanes:
        assert same(adapters.trainable(lane), others.trainable(lane))
        assert same(adapters.frozen(lane), others.frozen(lane))
        assert adapters.settings_of(lane) == others.settings_of(lane)
        assert adapters.seed_of(lane) == others.seed_of(lane)
    assert torch.equal(output(case, adapters), output(case, others))


def lanes_do_not_notice_each_other(variant: Variant, case: Case) -> None:
    """Lanes that start 0, 3 and 7 steps apart, with their own alpha, rate and dropout masks, end where they
    end alone: to the bit, since each has 8 rows."""
    begins, steps = {"0": 0, "1": 3, "2": 7}, 5
    pack = _open(case.build(), variant)
    optimizers: dict[str, torch.optim.Optimizer] = {}
    for now in range(max(begins.values()) + steps):
        for lane, begin in begins.items():
            if now == begin:
                optimizers[lane] = _enter(pack, lane)
            if now == begin + steps:
                del optimizers[lane]
        if optimizers:
            train_step(case, pack, optimizers, {lane: now - begins[lane] for lane in optimizers})
    for lane in begins:
        alone = _open(case.build(), variant)
        only: dict[str, torch.optim.Optimizer] = {lane: _enter(alone, lane)}
        for step in range(steps):
            train_step(case, alone, only, {lane: step})
        assert same(pack.trainable(lane), alone.trainable(lane)), f"lane {lane}"
        assert torch.equal(output(case, pack, list(begins)).chunk(3)[int(lane)], output(case, alone))


def counts_its_parameters(variant: Variant, case: Case) -> None:
    """The trainable numbers are as many as the formula says, before and after training."""
    adapters = put_on(case.build(), variant, 1)
    shapes = [layer.layer.weight.shape for layer in adapters.layers.values()]
    formula = sum(variant.parameter_count(out, inside, adapters.settings) for out, inside in shapes)
    assert sum(p.numel() for p in adapters.trainable("0").values()) == formula
    train(case, adapters, steps=2)
    assert sum(p.numel() for p in adapters.trainable("0").values()) == formula


def fits_what_it_can_represent(variant: Variant, case: Case) -> None:
    """From its start it learns what another setting of its own parameters computes."""
    teacher = put_on(case.build(), variant, 1)
    stir(case, teacher)
    learner = put_on(case.build(), variant, 1)
    steps = optimizer(learner, "0", 0.02)
    x = torch.cat([case.rows(0, step) for step in range(8)])
    with torch.no_grad(), teacher.rows(["0"], None):
        wanted = run(teacher.model, x)
    losses = []
    for step in range(150):
        for group in steps.param_groups:
            group["lr"] = 0.02 * (1 - step / 150)
        with learner.rows(["0"], step):
            loss = (run(learner.model, x) - wanted).square().mean()
        steps.zero_grad()
        loss.backward()
        steps.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0], f"loss {losses[0]:.3g} only fell to {losses[-1]:.3g}"


def export_loads_in_peft(variant: Variant, case: Case) -> None:
    """PEFT computes from the exported files what the lane computes, and so does the lane that is read
    back."""
    adapters = put_on(case.build(), variant, 1)
    stir(case, adapters)
    mine = output(case, adapters)
    own = {key: tensor.detach() for key, tensor in next(iter(adapters.layers.values())).one("0").items()}
    if variant.to_peft(own, adapters.settings) is None:
        raise NotApplicable(f"PEFT does not have {variant.name}")
    with tempfile.TemporaryDirectory() as name:
        save_peft(adapters, "0", Path(name), "base")
        theirs = PeftModel.from_pretrained(case.build(), name)
        back = load_peft(case.build(), Path(name), lane="0")
    with torch.no_grad():
        oracle = run(theirs, case.rows(0))
    assert distance(mine, oracle) < case.tolerance
    assert distance(output(case, back), mine) < case.tolerance


LAWS: dict[str, Law] = {
    law.__name__: law
    for law in (
        starts_at_the_base,
        every_tensor_gets_a_gradient,
        merged_equals_forward,
        off_gives_the_base_back,
        frozen_stays_frozen,
        saved_is_loaded,
        lanes_do_not_notice_each_other,
        counts_its_parameters,
        fits_what_it_can_represent,
        export_loads_in_peft,
    )
}


def concerns(law: Law, case: Case) -> bool:
    """Fitting is about the formula, not about models or rounding: the float32 rig shows it."""
    return law is not fits_what_it_can_represent or (case.model == "rig" and case.dtype == torch.float32)


def holds(law: Law, variant: Variant, case: Case) -> bool:
    """Whether `variant` passes; what does not apply to it passes."""
    try:
        law(variant, case)
    except NotApplicable:
        return True
    except AssertionError:
        return False
    return True


def check(law: Law, variant: Variant, case: Case) -> None:
    try:
        law(variant, case)
    except NotApplicable as reason:
        pytest.skip(str(reason))


def _open(model: nn.Module, variant: Variant) -> Adapters:
    return attach(model, variant, Settings(rank=4, alpha=8.0, dropout=0.1))


def _enter(adapters: Adapters, lane: str) -> torch.optim.Optimizer:
    number = int(lane)
    adapters.add(lane, Settings(rank=4, alpha=4.0 * (number + 1), dropout=0.1), seed=number)
    return optimizer(adapters, lane, 0.003 * (number + 1))
