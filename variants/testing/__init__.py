"""The laws that every variant must satisfy, for use in tests of variants inside and outside this project.

    from variants.testing import check_laws

    def test_my_variant() -> None:
        check_laws(MyVariant())

A law is a function of a variant and a case. It raises AssertionError where the variant breaks the law, and
NotApplicableError where the law does not apply to the variant. The laws run on small models on the CPU. They
need transformers, and the law about PEFT needs peft (the extra `test` of this project installs it); they do
not need pytest.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from variants.adapters import Adapters
from variants.api import RANK_MASK, AdaptationScope, Batching, Start, Variant, VariantSettings
from variants.describe import count_parameters
from variants.errors import MergeError, UnsupportedError
from variants.hooks import RankAllocation, StepHooks, parameter_lr_scale
from variants.merging import merge_and_detach
from variants.peft_format import TaskType
from variants.storage import load_lane, load_peft, save_lane, save_peft
from variants.testing.rig import (
    CASES,
    ROUNDS_BY_SIZE,
    ROWS,
    Case,
    LaneOptimizer,
    NotApplicableError,
    attach_lanes,
    base_outputs,
    calibrate_lane,
    lane_inputs,
    lane_outputs,
    model_output,
    model_state,
    one_thread,
    perturb_lanes,
    relative_error,
    tensors_equal,
    train,
    train_step,
)
from variants.variant_settings import PEFT_AXIS

__all__ = ["CASES", "LAWS", "Case", "Law", "NotApplicableError", "applies", "check_laws", "find_broken_laws"]

DROPOUT_SETTINGS = VariantSettings(rank=4, alpha=8.0, dropout=0.1)

Law = Callable[[Variant, Case], None]


def starts_as_declared(variant: Variant, case: Case) -> None:
    """At step 0 every lane computes the function that the variant's `start` declares.

    `Start.BASE` is what the frozen model with the lane's head computes, bit for bit; `Start.ROUNDED` is the
    same up to rounding; `Start.OTHER` is another function, and then the merged model computes it too. The
    difference may be too small for the model's dtype, so it is looked for in the update itself, or in float32
    if the update is not a matrix.
    """
    adapters = attach_lanes(case, variant, case.lanes)
    lane, base = lane_outputs(case, adapters), base_outputs(case, adapters)
    if variant.start is Start.BASE:
        assert torch.equal(lane, base)
    elif variant.start is Start.ROUNDED:
        assert relative_error(lane, base) < case.tolerance
    elif not variant.merge_obstacle:
        assert _has_update(adapters), "a lane starts at the base: declare Start.BASE"
        _check_merged(case, adapters)
    else:
        exact = replace(case, dtype=torch.float32)
        adapters = attach_lanes(exact, variant, case.lanes)
        difference = relative_error(lane_outputs(exact, adapters), base_outputs(exact, adapters))
        assert difference > exact.tolerance, "a lane starts at the base: declare Start.BASE"


def every_tensor_gets_a_gradient(variant: Variant, case: Case) -> None:
    """Within two steps each trainable tensor of each lane gets a non-zero gradient."""
    adapters = attach_lanes(case, variant, case.lanes)
    optimizers = {lane: LaneOptimizer(adapters, lane, 0.01, 2) for lane in adapters.lanes}
    parameters = {(lane, name): p for lane in adapters.lanes for name, p in adapters.trainable(lane).items()}
    reached = set()
    for _ in range(2):
        train_step(case, adapters, optimizers)
        reached |= {key for key, p in parameters.items() if p.grad is not None and p.grad.count_nonzero()}
    expected = {(lane, name) for lane, name in parameters if _has_rank(adapters, lane, name)}
    assert expected
    assert reached == expected, f"without a gradient: {sorted(expected - reached)}"


def merged_equals_forward(variant: Variant, case: Case) -> None:
    """A merged model computes what the lane computed, or merging raises an error that names the variant."""
    adapters = attach_lanes(case, variant, case.lanes)
    perturb_lanes(case, adapters)
    try:
        _check_merged(case, adapters)
    except MergeError as refusal:
        raise _refused(variant, refusal) from None


def removal_restores_the_base(variant: Variant, case: Case) -> None:
    """Disabled adapters give the base model's outputs, and detaching restores the model, bit for bit."""
    model = case.build()
    weights, kinds = model_state(model), [type(module) for module in model.modules()]
    with torch.no_grad():
        base = model_output(model, case.rows(0))
    adapters = attach_lanes(case, variant, case.lanes, model=model)
    perturb_lanes(case, adapters)
    assert not torch.equal(lane_outputs(case, adapters, ["0"]), base)
    with torch.no_grad(), adapters.disable_adapters():
        assert torch.equal(model_output(model, case.rows(0)), base)
    adapters.detach()
    assert tensors_equal(dict(model.state_dict()), weights)
    assert [type(module) for module in model.modules()] == kinds
    assert all(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        assert torch.equal(model_output(model, case.rows(0)), base)


def frozen_stays_frozen(variant: Variant, case: Case) -> None:
    """Training changes neither the base model nor a lane's frozen tensors, except its `mutable_buffers`."""
    adapters = attach_lanes(case, variant, case.lanes)
    assert not any(parameter.requires_grad for parameter in adapters.model.parameters())
    weights = model_state(adapters.model)
    frozen = {lane: _immutable_buffers(adapters, lane) for lane in adapters.lanes}
    trainable = {lane: {n: t.clone() for n, t in adapters.trainable(lane).items()} for lane in adapters.lanes}
    train(case, adapters, steps=3)
    for lane in adapters.lanes:
        assert not tensors_equal(adapters.trainable(lane), trainable[lane]), "training changed nothing"
        assert tensors_equal(_immutable_buffers(adapters, lane), frozen[lane])
    assert tensors_equal(model_state(adapters.model), weights)


def saved_lane_is_restored(variant: Variant, case: Case) -> None:
    """A saved lane, loaded over a copy of the base model, has the same tensors and outputs, bit for bit.

    This includes the frozen tensors that the variant's hooks have written.
    """
    adapters = attach_lanes(case, variant, case.lanes)
    train(case, adapters, steps=6)
    perturb_lanes(case, adapters)
    fresh = case.build()
    fresh.load_state_dict(model_state(adapters.model))
    restored = attach_lanes(case, variant, 0, adapters.settings, fresh)
    with tempfile.TemporaryDirectory() as folder:
        for lane in adapters.lanes:
            save_lane(adapters, lane, Path(folder, f"{lane}.safetensors"))
            load_lane(restored, lane, Path(folder, f"{lane}.safetensors"))
    for lane in adapters.lanes:
        assert tensors_equal(adapters.trainable(lane), restored.trainable(lane))
        assert tensors_equal(adapters.frozen(lane), restored.frozen(lane))
        assert adapters.lane_settings(lane) == restored.lane_settings(lane)
        assert adapters.lane_seed(lane) == restored.lane_seed(lane)
    assert torch.equal(lane_outputs(case, adapters), lane_outputs(case, restored))


@one_thread()
def lanes_are_independent(variant: Variant, case: Case) -> None:
    """Each lane of a lane group ends with the tensors and outputs of the lane trained alone, bit for bit.

    They start 0, 3 and 7 steps apart, with their own alpha, learning rate and dropout masks. The equality to
    the bit needs one thread and at least 8 rows per lane on a CPU. For `ROUNDS_BY_SIZE` the outputs are equal
    up to rounding only. In both cases no lane's output has a gradient for another lane's input.
    """
    if variant.batching is Batching.EXCLUSIVE:
        raise NotApplicableError(f"{variant.name} trains one lane at a time")
    first_rounds, steps = {"0": 0, "1": 3, "2": 7}, 5
    grouped = attach_lanes(case, variant, 0, DROPOUT_SETTINGS)
    optimizers: dict[str, LaneOptimizer] = {}
    for current in range(max(first_rounds.values()) + steps):
        for lane, first in first_rounds.items():
            if current == first:
                optimizers[lane] = _add_lane(case, grouped, lane, steps)
            if current == first + steps:
                del optimizers[lane]
        if optimizers:
            train_step(case, grouped, optimizers)
    for lane in first_rounds:
        alone = attach_lanes(case, variant, 0, DROPOUT_SETTINGS)
        optimizer = {lane: _add_lane(case, alone, lane, steps)}
        for _ in range(steps):
            train_step(case, alone, optimizer)
        in_group = lane_outputs(case, grouped, list(first_rounds)).chunk(3)[int(lane)]
        if variant.name in ROUNDS_BY_SIZE:
            assert relative_error(in_group, lane_outputs(case, alone)) < case.tolerance, f"lane {lane}"
        else:
            assert tensors_equal(grouped.trainable(lane), alone.trainable(lane)), f"lane {lane}"
            assert tensors_equal(grouped.frozen(lane), alone.frozen(lane)), f"lane {lane}"
            assert torch.equal(in_group, lane_outputs(case, alone))
    _check_no_gradient_between_lanes(case, grouped)


def parameter_count_follows_from_shapes(variant: Variant, case: Case) -> None:
    """A lane has as many trainable values as `count_parameters` states, before and after training.

    The ranks in use add up to `rank_budget`, and values beyond them get no gradient.
    """
    adapters = attach_lanes(case, variant, 1)
    for step in (0, 12):
        train(case, adapters, steps=step)
        ranks = adapters.ranks_in_use("0")
        if isinstance(variant, RankAllocation):
            budget = variant.rank_budget(len(ranks), adapters.settings, step, 12)
            assert budget is None or sum(ranks.values()) == budget
        expected = _expected_parameter_count(case, adapters, ranks)
        assert expected is None or adapters.parameter_count("0") == expected
    tensors = adapters.trainable("0").values()
    if not _has_mask(adapters):
        assert sum(p.numel() for p in tensors) == adapters.parameter_count("0")
    else:
        trained = sum(int(p.grad.count_nonzero()) for p in tensors if p.grad is not None)
        assert trained <= adapters.parameter_count("0")


def fits_a_representable_target(variant: Variant, case: Case) -> None:
    """A lane learns, from its initialization, what other values of its own parameters compute.

    The highest learning rate of a parameter is 0.02, or 0.02 times the variant's `typical_lr_scale`. The loss
    is scaled to begin at 1, because the weight of an auxiliary loss is meant for the loss of a task.
    """
    ends = {rate: _fit_teacher(variant, case, rate) for rate in (0.02, 0.02 * variant.typical_lr_scale)}
    assert min(ends.values()) < 0.1, f"the loss only fell to (by learning rate): {ends}"


def export_loads_in_peft(variant: Variant, case: Case) -> None:
    """PEFT and this project load the export of a lane, and both compute the outputs of the lane.

    A variant may refuse the export with an error that names the variant. PEFT loads the export of a language
    model by `AutoPeftModelForCausalLM`, together with the base model.
    """
    from peft import AutoPeftModelForCausalLM, PeftModel  # so that the other laws do not need peft

    adapters = attach_lanes(case, variant, 1)
    perturb_lanes(case, adapters)
    exported = lane_outputs(case, adapters)
    with tempfile.TemporaryDirectory() as folder:
        base: Any = case.build_for_peft()
        task_type: TaskType | None = "CAUSAL_LM" if case.is_language_model else None
        try:
            save_peft(adapters, "0", Path(folder), f"{folder}/base", task_type)
        except UnsupportedError as refusal:
            raise _refused(variant, refusal) from None
        if case.is_language_model:
            base.save_pretrained(f"{folder}/base")
            peft_model = AutoPeftModelForCausalLM.from_pretrained(folder)
        else:
            peft_model = PeftModel.from_pretrained(base, folder)
        is_tuner = variant.axis == PEFT_AXIS  # `load_peft` cannot load PEFT's own tuners
        loaded = adapters if is_tuner else load_peft(case.build(), Path(folder), lane="0")
    with torch.no_grad():
        peft_output = model_output(peft_model, case.rows(0))
    assert relative_error(exported, peft_output) < case.tolerance
    assert relative_error(lane_outputs(case, loaded), exported) < case.tolerance


LAWS: dict[str, Law] = {law.__name__: law for law in (
    starts_as_declared, every_tensor_gets_a_gradient, merged_equals_forward, removal_restores_the_base,
    frozen_stays_frozen, saved_lane_is_restored, lanes_are_independent, parameter_count_follows_from_shapes,
    fits_a_representable_target, export_loads_in_peft,
)}  # fmt: skip


def applies(law: Law, variant: Variant, case: Case) -> bool:
    """Return whether a law applies to a variant on a case.

    `fits_a_representable_target` tests the formula and neither models nor rounding, so small float32 models
    are enough. A variant that trains only a head needs a model with a head. Full fine-tuning refuses
    quantized weights.
    """
    if variant.adaptation_scope is AdaptationScope.HEAD_ONLY and case.model != "headed":
        return False
    if variant.adaptation_scope is AdaptationScope.FULL_MODEL and case.nf4:
        return False
    return law is not fits_a_representable_target or (
        not case.is_language_model and case.dtype == torch.float32
    )


def find_broken_laws(variant: Variant, case: Case) -> Iterator[tuple[str, AssertionError]]:
    """Check all laws that apply to a variant on a case, and yield the name and error of each broken one."""
    for name, law in LAWS.items():
        try:
            if applies(law, variant, case):
                law(variant, case)
        except NotApplicableError:
            continue
        except AssertionError as error:
            yield name, error


def check_laws(variant: Variant, cases: Iterable[Case] = CASES) -> None:
    """Check all laws on all cases to which they apply.

    Raises:
        AssertionError: The variant breaks a law; the message names the law and the case.
    """
    for case in cases:
        for name, error in find_broken_laws(variant, case):
            raise AssertionError(f"{variant.name} breaks {name} on {case.name}: {error}") from error


@torch.no_grad()
def _has_update(adapters: Adapters) -> bool:
    """Return whether the first lane changes the weight of some layer, however little."""
    lane, variant = adapters.lanes[0], adapters.variant
    inputs = ((layer.lane_tensors(lane), layer.lane_layer(lane)) for layer in adapters.layers.values())
    return any(variant.delta_weight(*each).count_nonzero() for each in inputs)


def _refused(variant: Variant, refusal: ValueError) -> Exception:
    """Return what a law raises if a merge or an export is refused: the refusal has to name the variant."""
    if variant.name in str(refusal):
        return NotApplicableError(str(refusal))
    return AssertionError(f"the refusal does not name the variant: {refusal}")


def _has_rank(adapters: Adapters, lane: str, parameter: str) -> bool:
    """Return whether the parameter's layer has a rank in use; EVA may mask all ranks of a layer."""
    mask = adapters.frozen(lane).get(f"{parameter.rpartition('.')[0]}.{RANK_MASK}")
    return mask is None or bool(mask.any())


def _fit_teacher(variant: Variant, case: Case, highest_rate: float) -> float:
    """Train a lane to reproduce the outputs of a teacher, and return its last loss divided by its first.

    The teacher is a lane of the same variant whose tensors have other values.
    """
    teacher = attach_lanes(case, variant, 1)
    perturb_lanes(case, teacher)
    learner = attach_lanes(case, variant, 1)
    names = {name.rpartition(".")[2] for name in learner.trainable("0")}
    learning_rate = highest_rate / max(parameter_lr_scale(variant, name, learner.settings) for name in names)
    optimizer = LaneOptimizer(learner, "0", learning_rate, 150)
    x = torch.cat([case.rows(0, step) for step in range(8)])
    with torch.no_grad(), teacher.activate_lanes(["0"], None), learner.activate_lanes(["0"], None):
        target = model_output(teacher.model, x)
        unit = (model_output(learner.model, x) - target).square().mean()
    losses = []
    for step in range(150):
        optimizer.zero_grad()
        with learner.activate_lanes(["0"], step) as context:
            loss = (model_output(learner.model, x) - target).square().mean() / unit
            auxiliary = context.auxiliary_loss()
            (loss if auxiliary is None else loss + auxiliary.sum()).backward()
        optimizer.learning_rate = learning_rate * (1 - step / 150)
        optimizer.step()
        losses.append(loss.item())
    return losses[-1] / losses[0]


def _check_no_gradient_between_lanes(case: Case, adapters: Adapters) -> None:
    if case.is_language_model:  # token ids have no gradient
        return
    lanes = adapters.lanes
    x = lane_inputs(case, lanes).requires_grad_()
    with adapters.activate_lanes(lanes, [0] * len(lanes), rows_per_lane=ROWS):
        outputs = model_output(adapters.model, x).chunk(len(lanes))
    for lane, output in enumerate(outputs):
        (gradient,) = torch.autograd.grad(output.sum(), x, retain_graph=True)
        others = [part for other, part in enumerate(gradient.chunk(len(lanes))) if other != lane]
        assert not any(part.count_nonzero() for part in others), f"lane {lane} depends on another's input"


def _check_merged(case: Case, adapters: Adapters) -> None:
    """Remove all lanes but the first, and check that the merged model computes what that lane computed.

    A language model is saved and loaded again by transformers.
    """
    before = lane_outputs(case, adapters).chunk(len(adapters.lanes))[0]
    for other in adapters.lanes[1:]:
        adapters.remove_lane(other)
    merge_and_detach(adapters, adapters.lanes[0])
    model: Any = adapters.model
    if case.is_language_model:
        from transformers import AutoModelForCausalLM

        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            loaded: Any = AutoModelForCausalLM.from_pretrained(folder)
        model = loaded.to(case.device)
    with torch.no_grad():
        merged = model_output(model, case.rows(0))
    assert relative_error(merged, before) < case.tolerance


def _has_mask(adapters: Adapters) -> bool:
    return any(name.endswith(f".{RANK_MASK}") for name in adapters.frozen("0"))


def _expected_parameter_count(case: Case, adapters: Adapters, ranks: dict[str, int]) -> int | None:
    """Return the number of trainable values; None if it depends on the values of the weights."""
    model, layers = case.build(), {name: layer.frozen_layer for name, layer in adapters.layers.items()}
    if adapters.full_model.tensors:
        return sum(p.numel() for p in model.parameters())
    head = sum(p.numel() for name in adapters.heads for p in model.get_submodule(name).parameters())
    if not layers:
        return head
    has_bias = any(layer.bias is not None for layer in layers.values())
    count = partial(count_parameters, adapters.variant, adapters.settings, has_bias=has_bias)
    whole = count({name: layer.shape for name, layer in layers.items()})
    if whole is None or not _has_mask(adapters):
        return None if whole is None else head + whole
    alone = {name: count({name: layer.shape}) or 0 for name, layer in layers.items()}
    return head + sum(ranks[name] * size // adapters.settings.rank for name, size in alone.items())


def _immutable_buffers(adapters: Adapters, lane: str) -> dict[str, Tensor]:
    variant = adapters.variant
    mutable = variant.mutable_buffers if isinstance(variant, StepHooks) else frozenset()
    return {n: t.clone() for n, t in adapters.frozen(lane).items() if n.rpartition(".")[2] not in mutable}


def _add_lane(case: Case, adapters: Adapters, lane: str, steps: int) -> LaneOptimizer:
    number = int(lane)
    settings = replace(adapters.settings, alpha=4.0 * (number + 1))
    adapters.add_lane(lane, settings, number, calibrate_lane(case, adapters, number))
    return LaneOptimizer(adapters, lane, 0.003 * (number + 1), steps)
