"""Variants with hooks: ReLoRA's merges, Delta-LoRA's telescoped weight, AdaLoRA's rank budget."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from rule import weight_change
from torch import Tensor

from variants import catalogue
from variants.adapters import Adapters
from variants.api import FrozenLayer, UnsupportedError, VariantSettings
from variants.baseline.lora import LoRA
from variants.merging import merge_and_detach
from variants.storage import load_peft, save_peft
from variants.testing.rig import (
    CASES,
    Case,
    LaneOptimizer,
    attach_lanes,
    lane_outputs,
    model_output,
    relative_error,
    tensors_equal,
    train,
    train_step,
)

RECTANGLES = Case("rectangles", out_features=40, in_features=24, bias=True)
LLAMA = Case("llama", model="llama", lanes=2)
LOW = Case("low", out_features=24, in_features=40, dtype=torch.bfloat16, lanes=2)


def train_steps(case: Case, adapters: Adapters, steps: int) -> Iterator[int]:
    """Train all lanes and yield the number of steps taken after each step."""
    optimizers = {lane: LaneOptimizer(adapters, lane, 0.01, steps) for lane in adapters.lanes}
    for step in range(steps):
        train_step(case, adapters, optimizers)
        yield step + 1


MOMENTS = ("exp_avg", "exp_avg_sq")

# -- ReLoRA -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [RECTANGLES, LLAMA, LOW], ids=lambda case: case.name)
def test_a_merge_of_relora_changes_no_output(case: Case) -> None:
    adapters = attach_lanes(case, catalogue.get("relora"), 2)
    optimizers = {lane: LaneOptimizer(adapters, lane, 0.01, 1000) for lane in adapters.lanes}
    for _ in range(5):
        train_step(case, adapters, optimizers)
    before, frozen = lane_outputs(case, adapters), adapters.frozen("0")
    old = {name: tensor.clone() for name, tensor in adapters.trainable("0").items()}
    assert not any(tensor.any() for tensor in frozen.values())
    for lane, each in optimizers.items():
        adapters.after_step(lane, 250, 1000, each.optimizer)
    after = lane_outputs(case, adapters)
    assert relative_error(after, before) < case.tolerance / 10
    for name, tensor in adapters.trainable("0").items():
        layer, parameter = name.rsplit(".", 1)
        merged = frozen[f"{layer}.merged {parameter}"]
        assert torch.equal(merged[:4] if parameter == "A" else merged[:, :4], old[name])
        assert parameter == "A" or not tensor.any()
        assert not torch.equal(tensor, old[name])


def test_relora_prunes_adams_moments() -> None:
    adapters = attach_lanes(RECTANGLES, catalogue.get("relora"), 1)
    optimizer = LaneOptimizer(adapters, "0", 0.01, 1000)
    for _ in range(3):
        train_step(RECTANGLES, adapters, {"0": optimizer})
    parameters = adapters.trainable("0").values()
    before = [{key: optimizer.optimizer.state[p][key].clone() for key in MOMENTS} for p in parameters]
    adapters.after_step("0", 250, 1000, optimizer.optimizer)
    for parameter, old in zip(parameters, before, strict=True):
        now = optimizer.optimizer.state[parameter]
        kept = now["exp_avg"] != 0
        assert kept.sum() == parameter.numel() - int(0.99 * parameter.numel()) > 0
        assert torch.equal(kept, now["exp_avg_sq"] != 0)
        for key in old:
            assert torch.equal(now[key][kept], old[key][kept])
        assert old["exp_avg"][kept].abs().min() >= old["exp_avg"][~kept].abs().max()


def test_relora_warms_up_again_after_each_merge() -> None:
    variant = catalogue.get("relora")
    settings = variant.validate_settings(VariantSettings(4))
    factors = [variant.schedule_lr_scale(step, 1562, settings) for step in range(1562)]
    jagged = [step for step, factor in enumerate(factors) if factor < 1]
    assert jagged == [point + i for point in (390, 781, 1171) for i in range(10)]
    assert factors[390:401] == pytest.approx([i / 11 for i in range(1, 12)])
    assert [s for s in range(20) if variant.schedule_lr_scale(s, 20, settings) < 1] == [5, 10, 15]


@pytest.mark.parametrize("case", [RECTANGLES, LLAMA], ids=lambda case: case.name)
def test_relora_reaches_a_higher_rank_and_can_be_merged_and_exported(case: Case, tmp_path: Path) -> None:
    adapters = attach_lanes(case, catalogue.get("relora"), 1, VariantSettings(2, 8.0))
    train(case, adapters, steps=8)
    name = next(iter(adapters.layers))
    assert torch.linalg.matrix_rank(weight_change(adapters, name)) == 2 * 4
    out = lane_outputs(case, adapters)
    save_peft(adapters, "0", tmp_path, "base")
    back = load_peft(case.build(), tmp_path, lane="0")
    assert (back.variant.name, back.settings.rank) == ("lora", 8)
    assert relative_error(lane_outputs(case, back), out) < case.tolerance
    with torch.no_grad():
        assert (
            relative_error(model_output(PeftModel.from_pretrained(case.build(), tmp_path), case.rows(0)), out)
            < 1e-5
        )
        merge_and_detach(adapters, "0")
        assert relative_error(model_output(adapters.model, case.rows(0)), out) < case.tolerance


# -- Delta-LoRA ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["rectangles", "llama"])
def test_delta_lora_equals_the_papers_stepwise_accumulation(model: str) -> None:
    """The reference is LoRA with base weights that change after each step t > K (algorithm 1)."""
    case, steps = Case(model, model=model, out_features=40, in_features=24, dtype=torch.float64), 12
    adapters, reference = (attach_lanes(case, catalogue.get(name), 1) for name in ("delta_lora", "lora"))
    initial_weights = {name: layer.frozen_layer.weight.clone() for name, layer in adapters.layers.items()}
    k, taken = round(500 / 1562 * steps), train_steps(case, adapters, steps)
    product = {name: weight_change(reference, name) for name in initial_weights}
    for t, now in enumerate(train_steps(case, reference, steps)):
        assert next(taken) == now
        for name, layer in reference.layers.items():
            before, product[name] = product[name], weight_change(reference, name)
            if t > k:
                with torch.no_grad():
                    layer.base_layer.weight.add_(2.0 * (product[name] - before))  # type: ignore[operator]
            accumulated = layer.frozen_layer.weight - initial_weights[name] + product[name]
            torch.testing.assert_close(weight_change(adapters, name), accumulated, rtol=1e-9, atol=1e-12)
        for name, tensor in reference.trainable("0").items():
            torch.testing.assert_close(adapters.trainable("0")[name], tensor, rtol=1e-9, atol=1e-12)
    assert k == 4
    for name in initial_weights:
        assert (weight_change(adapters, name) - product[name]).norm() > 0.1 * product[name].norm()


def test_delta_lora_has_no_dropout() -> None:
    adapters = attach_lanes(RECTANGLES, catalogue.get("delta_lora"), 1, VariantSettings(4, 8.0, dropout=0.5))
    assert adapters.settings.dropout == 0
    train(RECTANGLES, adapters, steps=3)
    clean = attach_lanes(RECTANGLES, catalogue.get("delta_lora"), 1)
    train(RECTANGLES, clean, steps=3)
    assert tensors_equal(adapters.trainable("0"), clean.trainable("0"))


# -- AdaLoRA ------------------------------------------------------------------------------------------------


def test_adaloras_ranks_follow_the_budget() -> None:
    """Of 4 layers with 6 triplets each, 16 triplets are kept. t_i is 3 and T - t_f is 17 of 40 steps."""
    adapters = attach_lanes(RECTANGLES, catalogue.get("adalora"), 2)
    for step in train_steps(RECTANGLES, adapters, 40):
        share = min(1.0, max(0.0, (step - 3) / 14))
        left = 16 + math.floor(8 * (1 - share) ** 3)
        for lane in adapters.lanes:
            values = [t for n, t in adapters.trainable(lane).items() if n.endswith(".E")]
            assert sum(int(t.count_nonzero()) for t in values) == left
            ranks = adapters.ranks_in_use(lane)
            assert sum(ranks.values()) == (16 if step >= 17 else 24)
            assert adapters.variant.rank_budget(4, adapters.settings, step, 40) == sum(ranks.values())
        if step == 17:
            final_ranks = {lane: adapters.ranks_in_use(lane) for lane in adapters.lanes}
    assert len(set(final_ranks["0"].values())) > 1
    for lane in adapters.lanes:
        assert adapters.ranks_in_use(lane) == final_ranks[lane]
        for name, tensor in adapters.trainable(lane).items():
            layer, parameter = name.rsplit(".", 1)
            if parameter == "E":
                assert torch.equal((tensor != 0).float(), adapters.frozen(lane)[f"{layer}.mask"])


def test_adaloras_averages_stay_where_a_layer_has_no_gradient() -> None:
    adapters = attach_lanes(RECTANGLES, catalogue.get("adalora"), 1)
    optimizer = LaneOptimizer(adapters, "0", 0.01, 40)
    train_step(RECTANGLES, adapters, {"0": optimizer})
    before = {name: tensor.clone() for name, tensor in adapters.frozen("0").items()}
    for name, parameter in adapters.trainable("0").items():
        if name.startswith("there.1."):
            parameter.grad = None
    adapters.after_step("0", 2, 40, optimizer.optimizer)
    after = adapters.frozen("0")
    changed = {name.rpartition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {*adapters.layers} - {"there.1"}


def test_the_gradient_of_adaloras_loss_equals_a_numerical_one() -> None:
    layer = FrozenLayer("layer", torch.zeros(5, 4).double(), None)
    a, b = (torch.randn(2, *shape).double().requires_grad_() for shape in ((3, 4), (5, 3)))
    settings = VariantSettings(3, None, extra={"orthogonality": 0.5})

    def loss(a: Tensor, b: Tensor) -> Tensor:
        x, mask = torch.zeros(2, 1, 1, 4).double(), torch.ones(2, 1, 1).double()
        params = {"A": a, "B": b}
        return catalogue.get("adalora").auxiliary_loss(x, mask, params, layer.with_settings(settings))

    assert torch.autograd.gradcheck(loss, (a, b))
    eye = torch.eye(3).double().repeat(2, 1, 1)
    (at_zero,) = torch.autograd.grad(loss(eye.requires_grad_(), eye.detach()).sum(), eye)
    assert not at_zero.any()


# -- all three --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adalora", "delta_lora", "relora"])
def test_lanes_are_independent_through_all_phases(name: str) -> None:
    """The law's five steps contain one merge of ReLoRA and two prunings of AdaLoRA.

    These sixteen steps contain three merges and six prunings.
    """
    case = CASES[3]
    grouped, steps = attach_lanes(case, catalogue.get(name), 3), 16
    train(case, grouped, steps)
    for lane in range(3):
        alone = attach_lanes(case, catalogue.get(name), 0)
        alone.add_lane(str(lane), alone.settings, seed=lane)
        train(case, alone, steps)
        assert tensors_equal(alone.trainable(str(lane)), grouped.trainable(str(lane)))
        assert tensors_equal(alone.frozen(str(lane)), grouped.frozen(str(lane)))


def test_adaloras_phases_are_in_order() -> None:
    with pytest.raises(UnsupportedError, match="warmup and final"):
        catalogue.get("adalora").validate_settings(VariantSettings(extra={"warmup": 0.6, "final": 0.5}))


def test_a_hook_without_its_mixin_is_refused_with_the_fix() -> None:
    with pytest.raises(TypeError, match=r"Mine defines after_step, .*: class Mine\(api\.StepHooks, \.\.\.\)"):
        type("Mine", (LoRA,), {"after_step": lambda self, lane: None})
