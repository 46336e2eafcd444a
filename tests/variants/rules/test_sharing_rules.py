"""Update rules of the variants that add up, mask or share factors."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from rule import BIASED, TALL, adapt, check_update, record_step, start_of, weight_change
from torch import Tensor

from variants import catalogue
from variants.api import FrozenLayer, InitialTensors, Params, VariantSettings
from variants.merging import merge_and_detach
from variants.storage import load_lane, load_peft, save_lane, save_peft
from variants.testing.rig import (
    Case,
    LaneOptimizer,
    attach_lanes,
    lane_outputs,
    model_output,
    perturb_lanes,
    relative_error,
    train,
    train_step,
)


@pytest.mark.parametrize("name", ["cola", "periodic_lora", "relora"])
def test_the_update_is_the_sum_of_the_present_and_the_merged_product(name: str) -> None:
    check_update(name, lambda p, weight, settings, s: s * (p["B"] @ p["A"] + p["merged B"] @ p["merged A"]))


# COLA: each LoRA of the chain is trained by a new AdamW on the weight with the earlier LoRAs merged in.


def test_cola_a_chain_equals_loras_that_are_trained_one_after_the_other() -> None:
    """The reference trains plain LoRA with AdamW, writes it into the weight, and starts again."""
    settings, steps = VariantSettings(3, 6.0), 12
    adapters = attach_lanes(BIASED, catalogue.get("cola"), 1, settings)
    optimizer = LaneOptimizer(adapters, "0", 0.01, steps)
    model, total = BIASED.build(), {}
    layers = {name: model.get_submodule(name) for name in adapters.layers}
    for link in range(3):
        reference = attach_lanes(BIASED, catalogue.get("lora"), 1, settings, model=model)
        own, theirs = adapters.trainable("0"), reference.trainable("0")
        with torch.no_grad():
            for name, parameter in theirs.items():
                parameter.copy_(own[name])
        assert not any(tensor.any() for name, tensor in own.items() if name.endswith(".B"))
        reference_optimizer = LaneOptimizer(reference, "0", 0.01, steps)
        reference_optimizer.steps_taken = 4 * link  # selects the rows
        for step in range(4):
            record_step(BIASED, adapters, optimizer)
            record_step(BIASED, reference, reference_optimizer)
            if step < 3:
                for name, parameter in theirs.items():
                    torch.testing.assert_close(own[name], parameter, rtol=1e-6, atol=1e-9)
        changes = {
            name: 2.0 * (theirs[f"{name}.B"] @ theirs[f"{name}.A"]).detach() for name in reference.layers
        }
        reference.detach()
        with torch.no_grad():
            for name, change in changes.items():
                layers[name].weight.add_(change)
                total[name] = total.get(name, 0) + change
        for name, layer in adapters.layers.items():
            merged = adapters.variant.delta_weight(
                layer.lane_tensors("0"), layer.frozen_layer.with_settings(adapters.lane_settings("0"), 2.0)
            )
            torch.testing.assert_close(merged, total[name], rtol=1e-6, atol=1e-9)


def test_cola_the_learning_rate_has_no_further_warm_up() -> None:
    cola = catalogue.get("cola")
    settings = cola.validate_settings(VariantSettings(4, 8.0))
    assert {cola.schedule_lr_scale(step, 12, settings) for step in range(12)} == {1.0}


# MELoRA's rule and initialization.


WIDE = Case("wide", out_features=24, in_features=96)


def side_by_side(params: Params, weight: Tensor, settings: VariantSettings, s: float) -> Tensor:
    """Apply each small LoRA to its own part of the inputs (`Linear.forward` of the authors' code)."""
    parts = torch.eye(weight.shape[1], dtype=weight.dtype).chunk(settings["blocks"], dim=1)
    outputs = [s * part @ a.T @ b.T for part, a, b in zip(parts, params["A"], params["B"], strict=True)]
    return torch.cat(outputs, dim=1).T


@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_melora_the_update_is_one_small_lora_for_each_part(blocks: int) -> None:
    check_update("melora", side_by_side, settings=VariantSettings(3, 6.0, extra={"blocks": blocks}))


def test_melora_the_overall_rank_is_the_number_of_blocks_times_the_rank() -> None:
    settings = VariantSettings(3, 6.0, extra={"blocks": 4})
    adapters = attach_lanes(WIDE, catalogue.get("melora"), 1, settings)
    for name, parameter in adapters.trainable("0").items():
        if name.endswith(".B"):
            torch.nn.init.normal_(parameter)
    assert torch.linalg.matrix_rank(weight_change(adapters, "there.0")) == 12
    assert sum(p.numel() for p in adapters.trainable("0").values()) == 4 * 3 * (24 + 96)


def test_melora_a_is_kaiming_uniform_for_the_inputs_of_one_block() -> None:
    """The published study's code draws A from N(0, 1) when Kaiming is asked for."""
    case = Case("large", out_features=64, in_features=1024)
    adapters = attach_lanes(case, catalogue.get("melora"), 1, VariantSettings(8, 16.0))
    a = adapters.trainable("0")["there.0.A"]
    expected = torch.nn.init.kaiming_uniform_(torch.empty(1000, 512), a=math.sqrt(5))
    assert a.shape == (2, 8, 512)
    assert a.abs().max() <= 1 / math.sqrt(512)
    torch.testing.assert_close(a.std(), expected.std(), rtol=0.03, atol=0)
    assert not adapters.trainable("0")["there.0.B"].any()


# PeriodicLoRA: a merge takes a part of the product, which decides what remains of the update.


@pytest.mark.parametrize("momentum", [0.1, 0.75, 1.0])
def test_periodic_lora_a_merge_takes_a_part_of_the_product(momentum: float) -> None:
    """A and B are multiplied by 1 - m, so (1 - m)^2 of the product remains beside the merged part."""
    settings = VariantSettings(4, 8.0, extra={"merges": 1, "momentum": momentum})
    adapters = attach_lanes(TALL, catalogue.get("periodic_lora"), 1, settings)
    optimizer = LaneOptimizer(adapters, "0", 0.01, 8)
    for _ in range(3):
        record_step(TALL, adapters, optimizer)
    assert not any(tensor.any() for tensor in adapters.frozen("0").values())
    optimizer.total_steps = 10**6  # without a merge after the fourth step
    record_step(TALL, adapters, optimizer)
    before = {name: weight_change(adapters, name) for name in adapters.layers}
    values = {name: parameter.detach().clone() for name, parameter in adapters.trainable("0").items()}
    adapters.after_step("0", 4, 8, optimizer.optimizer)
    for name, old in before.items():
        remaining = momentum + (1 - momentum) ** 2
        torch.testing.assert_close(weight_change(adapters, name), remaining * old)
        a, b = (adapters.trainable("0")[f"{name}.{key}"] for key in "AB")
        if momentum < 1:
            torch.testing.assert_close(a, (1 - momentum) * values[f"{name}.A"])
            torch.testing.assert_close(b, (1 - momentum) * values[f"{name}.B"])
        else:
            assert not b.any()
            assert a.any()
            assert not torch.equal(a, values[f"{name}.A"])
        assert not optimizer.optimizer.state.get(a)


# PRoLoRA's rule and initialization.


def expand(chunk: Tensor, copies: int, size: int) -> Tensor:
    """Return (ranks, size): value (k, j) is that of rank k + i * stride in the chunk, for copy i of column j.

    This is `de_reduce` of the authors' code, written for single values.
    """
    ranks, width = chunk.shape
    stride = max(ranks // copies, 1)
    rows = [
        torch.stack([chunk[(k + (j // width) * stride) % ranks, j % width] for j in range(size)])
        for k in range(ranks)
    ]
    return torch.stack(rows)


def rotated_copies(params: Params, weight: Tensor, settings: VariantSettings, s: float) -> Tensor:
    shared_a = expand(params["C"], int(settings["in_copies"]), weight.shape[1])
    shared_b = expand(params["D"].T, int(settings["out_copies"]), weight.shape[0])
    return s * (shared_b.T @ shared_a + params["B"] @ params["A"])


@pytest.mark.parametrize(
    ("unshared", "in_copies", "out_copies"),
    [(1, 2, 2), (2, 3, 5), (1, 7, 1), (0, 2, 3)],
    ids=["default", "sizes not divisible", "more copies than ranks", "copies only"],
)
def test_pro_lora_the_update_has_rotated_copies(unshared: int, in_copies: int, out_copies: int) -> None:
    extra = {"unshared": unshared, "in_copies": in_copies, "out_copies": out_copies}
    check_update("pro_lora", rotated_copies, settings=VariantSettings(5, 10.0, extra=extra))


def test_pro_lora_the_update_has_the_full_rank_with_fewer_values() -> None:
    case = Case("square", out_features=64, in_features=64)
    adapters = attach_lanes(case, catalogue.get("pro_lora"), 1, VariantSettings(8, 16.0))
    for parameter in adapters.trainable("0").values():
        torch.nn.init.normal_(parameter)
    assert torch.linalg.matrix_rank(weight_change(adapters, "there.0")) == 8
    count = sum(p.numel() for n, p in adapters.trainable("0").items() if n.startswith("there.0."))
    assert count == 7 * (32 + 32) + 64 + 64


def test_pro_lora_shared_and_other_ranks_start_with_the_bound_of_the_whole_factor() -> None:
    """The bound 1/sqrt(in) instead of 1/sqrt(in / m) is the paper's rectified initialization."""
    case = Case("wide", out_features=32, in_features=512)
    adapters = attach_lanes(case, catalogue.get("pro_lora"), 1, VariantSettings(8, 16.0))
    tensors = adapters.trainable("0")
    for name in ("there.0.A", "there.0.C"):
        assert 0.95 * 512**-0.5 < tensors[name].abs().max() <= 512**-0.5
    assert not tensors["there.0.B"].any()
    assert not tensors["there.0.D"].any()


# RaLoRA: diagonal blocks, whose number follows the effective rank of the gradient.


RALORA = catalogue.get("ra_lora")
SETTINGS = RALORA.validate_settings(VariantSettings(4, 8.0))


def make_gradient(shape: tuple[int, int], rank: int) -> Tensor:
    """Return a matrix with `rank` equal singular values and a tiny one, so that its effective rank is `rank`.

    The tiny one keeps the effective rank from being rounded to below `rank`.
    """
    noise = torch.Generator().manual_seed(rank)
    left, right = (
        torch.linalg.qr(torch.randn(side, rank + 1, generator=noise, dtype=torch.float64)).Q for side in shape
    )
    return left @ torch.tensor([3.0] * rank + [0.001], dtype=torch.float64).diag() @ right.T


def init(shape: tuple[int, int], effective_rank: int, settings: VariantSettings) -> InitialTensors:
    weight = torch.zeros(shape, dtype=torch.float64)
    gradient = make_gradient(shape, effective_rank)
    layer = FrozenLayer("layer", weight, None).with_settings(settings)
    found = RALORA.reduce_calibration(layer, gradient)["effective_rank"]
    assert found.item() == pytest.approx(effective_rank, rel=0.01)
    return start_of("ra_lora", weight, settings, statistic=gradient)


def test_ra_lora_the_update_is_block_diagonal() -> None:
    def change(p, weight, settings, s):  # type: ignore[no-untyped-def]
        blocks = int(p["blocks"])
        parts = zip(p["B"].chunk(blocks, dim=0), p["A"].chunk(blocks, dim=1), strict=True)
        return s * torch.block_diag(*(b @ a for b, a in parts))

    check_update("ra_lora", change)


@pytest.mark.parametrize(
    ("effective_rank", "blocks"), [(3, 1), (7, 1), (8, 2), (15, 2), (16, 4), (31, 4), (32, 8)]
)
def test_ra_lora_the_number_of_blocks_is_a_power_of_two(effective_rank: int, blocks: int) -> None:
    """n = 2^floor(log2(effective rank / rank)), which is what the authors' code computes."""
    initial = init((64, 48), effective_rank, SETTINGS)
    assert initial.frozen["blocks"].tolist() == [blocks]


def test_ra_lora_blocks_divide_both_sides_and_are_limited() -> None:
    assert init((64, 36), 32, SETTINGS).frozen["blocks"].tolist() == [4]
    limited = RALORA.validate_settings(VariantSettings(4, 8.0, extra={"max_power": 1}))
    assert init((64, 48), 32, limited).frozen["blocks"].tolist() == [2]


def test_ra_lora_each_block_starts_as_lora_on_its_own_inputs() -> None:
    """The published code draws A from N(0, 1) when it is asked for Kaiming's distribution."""
    a = init((64, 48), 32, SETTINGS).trainable["A"]
    bound = math.sqrt(8 / 48)
    assert 0.95 * bound < a.abs().max() <= bound
    assert a.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)


# RaSA's rule and initialization.


def weighted_sum_of_ranks(params: Params, weight: Tensor, settings: VariantSettings, s: float) -> Tensor:
    """Add the layer's own ranks and the pool's, each with its weight, as the authors' code does."""
    rows, columns = [*params["A"], *params["sA"]], [*params["B"].T, *params["sB"].T]
    weights = params["E"].flatten()
    assert len(weights) == len(rows) == len(columns)
    return sum(w * torch.outer(b, a) for w, a, b in zip(weights, rows, columns, strict=True))  # type: ignore[return-value]


@pytest.mark.parametrize("shared", [1, 3])
def test_rasa_the_update_is_a_weighted_sum_of_own_and_shared_ranks(shared: int) -> None:
    settings = VariantSettings(4, 6.0, extra={"shared": shared})
    check_update("rasa", weighted_sum_of_ranks, settings=settings)


def test_rasa_shapes_and_initial_values_for_several_layers_of_one_type() -> None:
    settings = VariantSettings(8, 16.0, extra={"shared": 2})
    adapters = attach_lanes(Case("llama", model="llama"), catalogue.get("rasa"), 1, settings)
    tensors = adapters.trainable("0")
    own = "model.layers.1.mlp.down_proj"
    group = "group:model.layers.mlp.down_proj"
    shapes = {
        f"{own}.A": (6, 48), f"{own}.B": (32, 6), f"{own}.E": (6 + 2 * 2, 1),
        f"{group}.sA": (4, 48), f"{group}.sB": (32, 4),
    }  # fmt: skip
    assert {name: tuple(tensors[name].shape) for name in shapes} == shapes
    weights = tensors[f"{own}.E"].flatten()
    torch.testing.assert_close(weights[:6], torch.full((6,), 0.5 * 16 / 6))
    torch.testing.assert_close(weights[6:], torch.full((4,), 0.5 * 16 / 4))
    assert not tensors[f"{own}.B"].any()
    assert not tensors[f"{group}.sB"].any()
    for name in (f"{own}.A", f"{group}.sA"):
        assert 0.8 * 48**-0.5 < tensors[name].abs().max() <= 48**-0.5


def test_rasa_types_are_told_apart_by_the_whole_name_without_indices() -> None:
    """GPT-2 has two layers `c_proj` of different shapes in each block."""
    adapters = attach_lanes(Case("gpt2", model="gpt2"), catalogue.get("rasa"), 1)
    groups = {name.rpartition(".")[0] for name in adapters.trainable("0") if name.startswith("group:")}
    assert {"group:transformer.h.attn.c_proj", "group:transformer.h.mlp.c_proj"} < groups


# ShareLoRA's rule and initialization.


def product(params: Params, weight: Tensor, settings: VariantSettings, s: float) -> Tensor:
    return s * params["B"] @ params["A"]


@pytest.mark.parametrize("part", ["A", "B", "AB"])
def test_share_lora_the_update_is_loras(part: str) -> None:
    check_update("share_lora", product, settings=VariantSettings(3, 6.0, extra={"part": part}))


@pytest.mark.parametrize("part", ["A", "B", "AB"])
def test_share_lora_the_layers_of_one_type_share_the_named_factors(part: str) -> None:
    settings = VariantSettings(3, 6.0, extra={"part": part})
    adapters = attach_lanes(Case("llama", model="llama"), catalogue.get("share_lora"), 1, settings)
    tensors = {name: p for name, p in adapters.trainable("0").items() if "q_proj" in name}
    group = "group:model.layers.self_attn.q_proj"
    own = [f"model.layers.{block}.self_attn.q_proj" for block in (0, 1)]
    expected = {f"{group}.{name}" for name in part}
    expected |= {f"{layer}.{name}" for layer in own for name in "AB" if name not in part}
    assert tensors.keys() == expected
    for name, tensor in tensors.items():
        assert tensor.any() == name.endswith(".A")
        if name.endswith(".A"):
            assert 0.8 * 32**-0.5 < tensor.abs().max() <= 32**-0.5
    assert len({tuple(t.shape) for n, t in tensors.items() if n.endswith(".A")}) == 1


def test_share_lora_a_lane_without_tensors_in_its_layers_is_restored(tmp_path: Path) -> None:
    case = Case("llama", model="llama")
    settings = VariantSettings(3, 6.0, extra={"part": "AB"})
    adapters = attach_lanes(case, catalogue.get("share_lora"), 1, settings)
    perturb_lanes(case, adapters)
    save_lane(adapters, "0", tmp_path / "lane.safetensors")
    restored = attach_lanes(case, catalogue.get("share_lora"), 0, settings)
    load_lane(restored, "0", tmp_path / "lane.safetensors")
    assert torch.equal(lane_outputs(case, restored), lane_outputs(case, adapters))


# Tied-LoRA's rule and initialization.


def scaled_factors(params: Params, weight: Tensor, settings: VariantSettings, s: float) -> Tensor:
    """Return s diag(v) B diag(u) A."""
    v, u = (torch.diag(params[name].flatten()) for name in "vu")
    return s * v @ params["B"] @ u @ params["A"]


def test_tied_lora_the_update_scales_shared_factors() -> None:
    check_update("tied_lora", scaled_factors, settings=VariantSettings(3, 6.0))


def test_tied_lora_layers_of_one_type_share_a_and_b_and_have_their_own_vectors() -> None:
    adapters = attach_lanes(Case("llama", model="llama"), catalogue.get("tied_lora"), 1)
    tensors = adapters.trainable("0")
    group = "group:model.layers.mlp.down_proj"
    assert tensors[f"{group}.A"].shape == (4, 48)
    assert tensors[f"{group}.A"].any()
    assert not tensors[f"{group}.B"].any()
    assert {name for name in tensors if ".down_proj." in name and not name.startswith("group:")} == {
        f"model.layers.{block}.mlp.down_proj.{vector}" for block in (0, 1) for vector in "uv"
    }
    assert (tensors["model.layers.0.mlp.down_proj.u"] == 1).all()
    assert (tensors["model.layers.0.mlp.down_proj.v"] == 1).all()


# Uni-LoRA's places; its rule is compared with PEFT in tests/contract.


def test_uni_lora_the_factors_are_an_isometry_of_one_vector() -> None:
    """The map from theta to all factors keeps lengths, and its places differ between lanes."""
    adapters = attach_lanes(Case("llama", model="llama"), catalogue.get("uni_lora"), 2)
    assert list(adapters.trainable("0")) == ["group:uni_lora.theta"]
    for lane in ("0", "1"):
        theta = adapters.trainable(lane)["group:uni_lora.theta"]
        assert 0.0195 < theta.abs().max() <= 0.02
        pairs = [
            adapters.variant.factors(layer.lane_tensors(lane), layer.lane_layer(lane))
            for layer in adapters.layers.values()
        ]
        size = sum(factor.square().sum() for pair in pairs for factor in pair)
        torch.testing.assert_close(size, theta.square().sum())
    first, second = (adapters.frozen(lane)["model.layers.0.mlp.down_proj.IA"] for lane in ("0", "1"))
    assert (first != second).float().mean() > 0.9


# VeRA's two matrices, which all layers share; tests/contract compares its rule with PEFT's.


def test_vera_the_shared_matrices_fit_the_largest_layer_and_are_kaiming_uniform() -> None:
    adapters = adapt("vera", VariantSettings(8, None), perturb=False)
    frozen = adapters.frozen("0")
    assert set(frozen) == {"group:vera.A", "group:vera.B"}
    for matrix, shape in ((frozen["group:vera.A"], (256, 40)), (frozen["group:vera.B"], (40, 256))):
        assert matrix.shape == shape
        assert matrix.abs().max() <= (6 / shape[1]) ** 0.5
        assert matrix.std().item() == pytest.approx((2 / shape[1]) ** 0.5, rel=0.05)


def test_vera_the_shared_matrices_come_with_a_lane_from_its_seed_and_go_with_it() -> None:
    adapters = adapt("vera", VariantSettings(8, None), perturb=False)
    for lane, seed in (("other", 1), ("again", 0)):
        adapters.add_lane(lane, adapters.settings, seed)
    for name, mine in adapters.frozen("0").items():
        assert torch.equal(mine, adapters.frozen("again")[name])
        assert not torch.equal(mine, adapters.frozen("other")[name])
    adapters.remove_lane("0")
    (group,) = adapters.layer_groups.values()
    assert set(group.frozen) == {"other", "again"}


# ReLoRA: its merges, the moments that it prunes, and the learning rate after a merge.


LLAMA = Case("llama", model="llama", lanes=2)
LOW = Case("low", out_features=24, in_features=40, dtype=torch.bfloat16, lanes=2)


@pytest.mark.parametrize("case", [BIASED, LLAMA, LOW], ids=lambda case: case.name)
def test_relora_a_merge_changes_no_output(case: Case) -> None:
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


def test_relora_it_prunes_adams_moments() -> None:
    adapters = attach_lanes(BIASED, catalogue.get("relora"), 1)
    optimizer = LaneOptimizer(adapters, "0", 0.01, 1000)
    for _ in range(3):
        train_step(BIASED, adapters, {"0": optimizer})
    parameters = adapters.trainable("0").values()
    state, moments = optimizer.optimizer.state, ("exp_avg", "exp_avg_sq")
    before = [{key: state[parameter][key].clone() for key in moments} for parameter in parameters]
    adapters.after_step("0", 250, 1000, optimizer.optimizer)
    for parameter, old in zip(parameters, before, strict=True):
        now = state[parameter]
        kept = now["exp_avg"] != 0
        assert kept.sum() == parameter.numel() - int(0.99 * parameter.numel()) > 0
        assert torch.equal(kept, now["exp_avg_sq"] != 0)
        for key in old:
            assert torch.equal(now[key][kept], old[key][kept])
        assert old["exp_avg"][kept].abs().min() >= old["exp_avg"][~kept].abs().max()


def test_relora_the_rate_warms_up_again_after_each_merge() -> None:
    variant = catalogue.get("relora")
    settings = variant.validate_settings(VariantSettings(4))
    factors = [variant.schedule_lr_scale(step, 1562, settings) for step in range(1562)]
    jagged = [step for step, factor in enumerate(factors) if factor < 1]
    assert jagged == [point + i for point in (390, 781, 1171) for i in range(10)]
    assert factors[390:401] == pytest.approx([i / 11 for i in range(1, 12)])
    assert [s for s in range(20) if variant.schedule_lr_scale(s, 20, settings) < 1] == [5, 10, 15]


@pytest.mark.parametrize("case", [BIASED, LLAMA], ids=lambda case: case.name)
def test_relora_it_reaches_a_higher_rank_and_can_be_merged_and_exported(case: Case, tmp_path: Path) -> None:
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
