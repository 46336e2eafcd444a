"""The laws every variant passes, as plain functions: a law raises AssertionError where a variant breaks it.

test_laws.py tries them on everything in the catalogue, test_laws_bite.py on variants that are broken on
purpose.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from rig import (
    Case,
    LaneOptimizer,
    NotApplicable,
    distance,
    evidence,
    fit,
    frozen_output,
    output,
    put_on,
    run,
    same,
    state,
    stir,
    train,
    train_step,
)
from torch import Tensor

from variants.attach import Adapters
from variants.base import AdaptationScope, Batching, MergeError, Variant, VariantSettings
from variants.merging import merge_and_detach
from variants.storage import load_lane, load_peft, save_lane, save_peft

Law = Callable[[Variant, Case], None]


def starts_at_the_base(variant: Variant, case: Case) -> None:
    """At step 0 every lane computes what the frozen model with the lane's head computes, bit for bit."""
    adapters = put_on(case, variant, case.lanes)
    assert torch.equal(output(case, adapters), frozen_output(case, adapters))


def every_tensor_gets_a_gradient(variant: Variant, case: Case) -> None:
    """Within two steps each trainable tensor of each lane has had a gradient that is not zero."""
    adapters = put_on(case, variant, case.lanes)
    optimizers = {lane: LaneOptimizer(adapters, lane, 0.01, 2) for lane in adapters.lanes}
    reached = set()
    for step in range(2):
        train_step(case, adapters, optimizers, dict.fromkeys(optimizers, step))
        for lane in adapters.lanes:
            for name, parameter in adapters.trainable(lane).items():
                if parameter.grad is not None and parameter.grad.count_nonzero():
                    reached.add((lane, name))
    wanted = {
        (lane, name)
        for lane in adapters.lanes
        for name in adapters.trainable(lane)
        if adapters.ranks_in_use(lane).get(name.rpartition(".")[0], 1)
        > 0  # EVA may leave a layer without any
    }
    assert wanted
    assert reached == wanted, f"without a gradient: {sorted(wanted - reached)}"


def merged_equals_forward(variant: Variant, case: Case) -> None:
    """A merged lane computes what it computed beside the base (or merging is refused by name)."""
    adapters = put_on(case, variant, case.lanes)
    stir(case, adapters)
    before = output(case, adapters).chunk(len(adapters.lanes))[0]
    for other in adapters.lanes[1:]:
        adapters.remove_lane(other)
    refused = ""
    try:
        merge_and_detach(adapters, "0")
    except MergeError as refusal:
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
    adapters = put_on(case, variant, case.lanes, model=model)
    stir(case, adapters)
    assert not torch.equal(output(case, adapters, ["0"]), base)
    with torch.no_grad(), adapters.disable_adapters():
        assert torch.equal(run(model, case.rows(0)), base)
    adapters.detach()
    assert same(dict(model.state_dict()), weights)
    assert [type(module) for module in model.modules()] == kinds
    assert all(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        assert torch.equal(run(model, case.rows(0)), base)


def frozen_stays_frozen(variant: Variant, case: Case) -> None:
    """Training changes neither the base nor what a lane's start froze, but for what is declared moving."""
    adapters = put_on(case, variant, case.lanes)
    assert not any(parameter.requires_grad for parameter in adapters.model.parameters())
    weights = state(adapters.model)
    frozen = {lane: _still(adapters, lane) for lane in adapters.lanes}
    trainable = {lane: {n: t.clone() for n, t in adapters.trainable(lane).items()} for lane in adapters.lanes}
    train(case, adapters, steps=3)
    for lane in adapters.lanes:
        assert not same(adapters.trainable(lane), trainable[lane])  # it did train
        assert same(_still(adapters, lane), frozen[lane])
    assert same(state(adapters.model), weights)


def saved_is_loaded(variant: Variant, case: Case) -> None:
    """A lane's file, on a fresh copy of the same base, gives the same tensors and outputs, bit for bit; also
    what its hooks have written meanwhile."""
    adapters = put_on(case, variant, case.lanes)
    train(case, adapters, steps=6)
    stir(case, adapters)
    fresh = case.build()
    fresh.load_state_dict(state(adapters.model))
    others = fit(case, variant, adapters.settings, fresh)
    with tempfile.TemporaryDirectory() as folder:
        for lane in adapters.lanes:
            save_lane(adapters, lane, Path(folder, f"{lane}.safetensors"))
            load_lane(others, lane, Path(folder, f"{lane}.safetensors"))
    for lane in adapters.lanes:
        assert same(adapters.trainable(lane), others.trainable(lane))
        assert same(adapters.frozen(lane), others.frozen(lane))
        assert adapters.lane_settings(lane) == others.lane_settings(lane)
        assert adapters.lane_seed(lane) == others.lane_seed(lane)
    assert torch.equal(output(case, adapters), output(case, others))


def lanes_do_not_notice_each_other(variant: Variant, case: Case) -> None:
    """Lanes that start 0, 3 and 7 steps apart, with their own alpha, rate and dropout masks, end where they
    end alone: to the bit, since each has 8 rows."""
    if variant.batching is Batching.EXCLUSIVE:
        raise NotApplicable(f"{variant.name} is alone in its pack")
    begins, steps = {"0": 0, "1": 3, "2": 7}, 5
    pack = _open(case, variant)
    optimizers: dict[str, LaneOptimizer] = {}
    for now in range(max(begins.values()) + steps):
        for lane, begin in begins.items():
            if now == begin:
                optimizers[lane] = _enter(case, pack, lane, steps)
            if now == begin + steps:
                del optimizers[lane]
        if optimizers:
            train_step(case, pack, optimizers, {lane: now - begins[lane] for lane in optimizers})
    for lane in begins:
        alone = _open(case, variant)
        only = {lane: _enter(case, alone, lane, steps)}
        for step in range(steps):
            train_step(case, alone, only, {lane: step})
        assert same(pack.trainable(lane), alone.trainable(lane)), f"lane {lane}"
        assert same(pack.frozen(lane), alone.frozen(lane)), f"lane {lane}"
        assert torch.equal(output(case, pack, list(begins)).chunk(3)[int(lane)], output(case, alone))


def counts_its_parameters(variant: Variant, case: Case) -> None:
    """The trainable numbers are as many as the formula says, before and after training; ranks that move sum
    up to the budget, and nothing beyond them gets a gradient."""
    adapters = put_on(case, variant, 1)
    steps = 12
    for step in (0, steps):
        if step:
            train(case, adapters, steps=steps)
        ranks = adapters.ranks_in_use("0")
        assert sum(ranks.values()) == variant.rank_budget(len(ranks), adapters.settings, step, steps)
        assert adapters.parameter_count("0") == _formula(variant, case, adapters, ranks)
    tensors = adapters.trainable("0").values()
    if set(ranks.values()) <= {adapters.settings.rank}:
        assert sum(p.numel() for p in tensors) == adapters.parameter_count("0")
    else:
        learnt = sum(int(p.grad.count_nonzero()) for p in tensors if p.grad is not None)
        assert learnt <= adapters.parameter_count("0")


def _formula(variant: Variant, case: Case, adapters: Adapters, ranks: dict[str, int]) -> int:
    model = case.build()
    heads = sum(p.numel() for name in adapters.heads for p in model.get_submodule(name).parameters())
    if variant.adaptation_scope is AdaptationScope.FULL_MODEL:
        return sum(p.numel() for p in model.parameters())
    settings, shapes = adapters.settings, {n: x.frozen_layer.weight.shape for n, x in adapters.layers.items()}
    own = sum(variant.parameter_count(*shapes[n], replace(settings, rank=rank)) for n, rank in ranks.items())
    return heads + own


def fits_what_it_can_represent(variant: Variant, case: Case) -> None:
    """From its start it learns what another setting of its own parameters computes, its fastest parameters at
    a rate of 0.02. The loss begins at 1, as an auxiliary loss is meant to stand beside one of a task."""
    teacher = put_on(case, variant, 1)
    stir(case, teacher)
    learner = put_on(case, variant, 1)
    names = {name.rpartition(".")[2] for name in learner.trainable("0")}
    rate = 0.02 / max(variant.parameter_lr_scale(name, learner.settings) for name in names)
    steps = LaneOptimizer(learner, "0", rate, 150)
    x = torch.cat([case.rows(0, step) for step in range(8)])
    with torch.no_grad(), teacher.activate_lanes(["0"], None):
        wanted = run(teacher.model, x)
    with torch.no_grad(), learner.activate_lanes(["0"], None):
        unit = (run(learner.model, x) - wanted).square().mean()
    losses = []
    for step in range(150):
        steps.zero_grad()
        with learner.activate_lanes(["0"], step) as now:
            loss = (run(learner.model, x) - wanted).square().mean() / unit
            extra = now.auxiliary_loss()
            (loss if extra is None else loss + extra.sum()).backward()
        steps.step(rate * (1 - step / 150))
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0], f"loss {losses[0]:.3g} only fell to {losses[-1]:.3g}"


def export_loads_in_peft(variant: Variant, case: Case) -> None:
    """PEFT computes from the exported files what the lane computes, and so does the lane that is read
    back."""
    adapters = put_on(case, variant, 1)
    stir(case, adapters)
    mine = output(case, adapters)
    first = next(iter(adapters.layers.values()), None)
    own = {key: tensor.detach() for key, tensor in first.lane_tensors("0").items()} if first else {}
    if first is None or variant.to_peft(own, adapters.settings) is None:
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


OWN_LANES = frozenset(
    law.__name__
    for law in (
        lanes_do_not_notice_each_other,
        counts_its_parameters,
        fits_what_it_can_represent,
        export_loads_in_peft,
    )
)
"""The laws that need a number of lanes of their own, whatever number a case has."""


def concerns(law: Law, variant: Variant, case: Case) -> bool:
    """Return whether `law` says anything about `variant` on `case`.

    Fitting is about the formula, not about models or rounding: the float32 rig shows it. A variant that
    trains a head alone needs a model with a head.
    """
    if variant.adaptation_scope is AdaptationScope.HEAD_ONLY and case.model != "headed":
        return False
    return law is not fits_what_it_can_represent or (
        case.model in ("rig", "headed") and case.dtype == torch.float32
    )


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


def _still(adapters: Adapters, lane: str) -> dict[str, Tensor]:
    moving = adapters.variant.mutable_buffers
    return {n: t.clone() for n, t in adapters.frozen(lane).items() if n.rpartition(".")[2] not in moving}


def _open(case: Case, variant: Variant) -> Adapters:
    return fit(case, variant, VariantSettings(rank=4, alpha=8.0, dropout=0.1))


def _enter(case: Case, adapters: Adapters, lane: str, steps: int) -> LaneOptimizer:
    number = int(lane)
    settings = VariantSettings(rank=4, alpha=4.0 * (number + 1), dropout=0.1)
    adapters.add_lane(lane, settings, number, evidence(case, adapters, number))
    return LaneOptimizer(adapters, lane, 0.003 * (number + 1), steps)
