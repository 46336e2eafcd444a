"""Initializations of the variants that differ from LoRA in how its factors begin."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.corda import collect_eigens, crop_corda_eigens
from rule import Change, check_update, start_of
from torch import Tensor, nn

from variants import catalogue
from variants.api import FrozenLayer, InitialTensors, Params, UnsupportedError, VariantSettings
from variants.initialization.sorsa import _orthonormality_gradient
from variants.testing import Case
from variants.testing.rig import (
    LaneOptimizer,
    attach_lanes,
    base_outputs,
    lane_outputs,
    model_output,
    perturb_lanes,
)

# The updates, in float64. s is alpha / rank where a rule takes it from its arguments.


def product(params: Params, kind: str = "") -> Tensor:
    return params[f"B{kind}"] @ params[f"A{kind}"]


UPDATES: dict[str, Change] = {
    "corda": lambda p, weight, settings, s: s * (product(p) - product(p, "0")),
    "lora_ga": lambda p, weight, settings, s: 8 / math.sqrt(4) * (product(p) - product(p, "0")),
    "lora_one": lambda p, weight, settings, s: 8 / math.sqrt(4) * product(p),
    "lora_sb": lambda p, weight, settings, s: p["B"] @ p["R"] @ p["A"],
    "lora_xs": lambda p, weight, settings, s: s * p["B"] @ p["R"] @ p["A"],
    "milora": lambda p, weight, settings, s: s * (product(p) - product(p, "0")),
    # NoRA counts the rank of its frozen factors, `outer` times the rank, as both codes do.
    "nora": lambda p, weight, settings, s: (
        8 / (4 * 4) * (p["B"] @ p["inner_B"] @ p["inner_A"] @ p["A"] - product(p, "0"))
    ),
    "olora": lambda p, weight, settings, s: s * (product(p) - product(p, "0")),
    "sorsa": lambda p, weight, settings, s: (p["B"] * p["S"]) @ p["A"] - product(p, "0"),
}


@pytest.mark.parametrize("name", UPDATES)
def test_the_update_is_that_of_the_paper(name: str) -> None:
    check_update(name, UPDATES[name], VariantSettings(4, 8.0))


# CorDA's initialization, computed in float64.


CORDA_RANK, CORDA_ALPHA, CORDA_OUT, CORDA_IN = 3, 12.0, 12, 16


def inputs(positions: int = 200) -> Tensor:
    """Return inputs with a mean other than zero and very unequal directions."""
    noise = torch.Generator().manual_seed(1)
    x = torch.randn(positions, CORDA_IN, generator=noise, dtype=torch.float64)
    return x * torch.logspace(0, -2, CORDA_IN, dtype=torch.float64) + 0.5


def start(mode: str, moment: Tensor, weight: Tensor) -> InitialTensors:
    settings = VariantSettings(CORDA_RANK, CORDA_ALPHA, extra={"mode": mode})
    return start_of("corda", weight, settings, statistic=moment)


def random_weight() -> Tensor:
    return torch.randn(CORDA_OUT, CORDA_IN, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("mode", ["instruction", "knowledge"])
def test_corda_start_is_a_part_of_the_decomposition_of_the_weighted_weight(mode: str) -> None:
    weight, x = random_weight(), inputs()
    moment = x.t() @ x / len(x)
    initial = start(mode, moment, weight)
    damped = moment + 0.01 * moment.trace() / CORDA_IN * torch.eye(CORDA_IN, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(weight @ damped, full_matrices=False)
    used = slice(0, CORDA_RANK) if mode == "instruction" else slice(CORDA_OUT - CORDA_RANK, CORDA_OUT)
    expected = torch.linalg.solve(damped, ((u[:, used] * s[used]) @ vh[used]).t()).t()
    a, b = initial.trainable["A"], initial.trainable["B"]
    torch.testing.assert_close(CORDA_ALPHA / CORDA_RANK * b @ a, expected)
    torch.testing.assert_close(b.norm(dim=0), (s[used] * CORDA_RANK / CORDA_ALPHA).sqrt())
    assert torch.equal(initial.frozen["A0"], a)
    assert torch.equal(initial.frozen["B0"], b)


@pytest.mark.parametrize(("mode", "peft_mode"), [("instruction", "ipm"), ("knowledge", "kpm")])
def test_corda_both_modes_take_the_part_that_peft_takes(mode: str, peft_mode: str) -> None:
    weight, x = random_weight(), inputs()
    moment = x.t() @ x / len(x)
    layer = nn.Linear(CORDA_IN, CORDA_OUT, bias=False)
    layer.weight.data.copy_(weight)
    layer.covariance_matrix, layer.rank, layer.corda_method = moment, CORDA_RANK, peft_mode
    layers, config = nn.ModuleDict({"layer": layer}), LoraConfig(r=CORDA_RANK, target_modules=["layer"])
    collect_eigens(layers, config, verbose=False)
    crop_corda_eigens(layers, config)
    expected = (layer.eigens.U_WC * layer.eigens.S_WC) @ layer.eigens.V_WC.t()
    initial = start(mode, moment, weight)
    found = CORDA_ALPHA / CORDA_RANK * initial.trainable["B"] @ initial.trainable["A"]
    torch.testing.assert_close(found.float(), expected, rtol=1e-4, atol=1e-4)


def test_corda_instruction_mode_takes_what_the_inputs_use_and_knowledge_mode_spares_it() -> None:
    weight, x = random_weight(), inputs()
    moment = x.t() @ x / len(x)
    outputs = {}
    for mode in ("instruction", "knowledge"):
        initial = start(mode, moment, weight)
        part = CORDA_ALPHA / CORDA_RANK * initial.trainable["B"] @ initial.trainable["A"]
        outputs[mode] = ((x @ part.t()).norm() / (x @ weight.t()).norm()).item()
    assert outputs["instruction"] > 0.9
    assert outputs["knowledge"] < 0.05


def test_corda_a_singular_moment_is_damped_until_its_inverse_is_accurate() -> None:
    x = inputs(positions=2).float()
    initial = start("instruction", x.t() @ x / len(x), random_weight().float())
    assert all(tensor.isfinite().all() for tensor in initial.trainable.values())


def test_corda_the_damping_doubles_until_the_inverse_is_accurate(monkeypatch: pytest.MonkeyPatch) -> None:
    x, inverse, dampings = inputs(), torch.linalg.inv_ex, []
    moment = x.t() @ x / len(x)

    def inaccurate_at_first(matrix: Tensor) -> tuple[Tensor, Tensor]:
        dampings.append(((matrix - moment).trace() / moment.trace()).item())
        found, failure = inverse(matrix)
        return (found if len(dampings) > 2 else 2 * found), failure

    monkeypatch.setattr(torch.linalg, "inv_ex", inaccurate_at_first)
    start("instruction", moment, random_weight())
    assert dampings == pytest.approx([0.01, 0.02, 0.04])


def test_corda_a_moment_of_zero_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="layer: the second moment of its inputs cannot be inverted"):
        start("instruction", torch.zeros(CORDA_IN, CORDA_IN, dtype=torch.float64), random_weight())


# LoRA-GA's initialization from the gradient's singular vectors.


@pytest.mark.parametrize("gamma", [16.0, 64.0])
def test_lora_ga_start_has_the_singular_vectors_of_a_slowly_decaying_gradient(gamma: float) -> None:
    """The authors' SVD with 4 r columns reaches 0.9998 for B; one with 2 r + 10 columns reaches 0.88."""
    rank, out_features, in_features = 32, 512, 768
    noise = torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn(out_features, out_features, generator=noise))[0]
    v = torch.linalg.qr(torch.randn(in_features, out_features, generator=noise))[0]
    gradient = u * torch.arange(1.0, out_features + 1) ** -0.5 @ v.T
    variant = catalogue.get("lora_ga")
    settings = variant.validate_settings(VariantSettings(rank, 8.0, extra={"gamma": gamma}))
    layer = FrozenLayer("layer", torch.zeros(out_features, in_features), None)
    found = variant.reduce_calibration(layer.with_settings(settings), gradient)
    c = out_features**0.25 / gamma**0.5
    for name, exact, columns in (
        ("A0", v[:, :rank], found["A0"].T),
        ("B0", u[:, rank : 2 * rank], found["B0"]),
    ):
        torch.testing.assert_close(columns.norm(dim=0), torch.full((rank,), c))
        cosines = torch.nn.functional.cosine_similarity(columns, exact, dim=0).abs()
        assert cosines.mean() > 0.999, name


# LoRA-One against the rule of the authors' code, computed in float64.


LORA_ONE_RANK, LORA_ONE_ALPHA, GAMMA = 3, 6.0, 128.0


def test_lora_one_start_is_a_normalized_gradient_step_of_the_given_rank() -> None:
    noise = torch.Generator().manual_seed(0)
    weight, gradient = torch.randn(2, 20, 14, generator=noise, dtype=torch.float64)
    settings = VariantSettings(LORA_ONE_RANK, LORA_ONE_ALPHA)
    initial = start_of("lora_one", weight, settings, statistic=gradient)
    assert not initial.frozen
    a, b = initial.trainable["A"], initial.trainable["B"]
    u, s, vh = torch.linalg.svd(gradient)
    best = (u[:, :LORA_ONE_RANK] * s[:LORA_ONE_RANK]) @ vh[:LORA_ONE_RANK]
    torch.testing.assert_close(b @ a, -best / (s[0] * GAMMA))
    share = (s[:LORA_ONE_RANK] / (s[0] * GAMMA)).diag()
    torch.testing.assert_close(b.t() @ b, share)
    torch.testing.assert_close(a @ a.t(), share)
    # A start from G in place of -G would increase the loss.
    assert (gradient * (b @ a)).sum() < 0


def test_lora_one_a_layer_without_gradient_starts_at_zero() -> None:
    variant = catalogue.get("lora_one")
    settings = variant.validate_settings(VariantSettings(LORA_ONE_RANK, LORA_ONE_ALPHA))
    layer = FrozenLayer("layer", torch.randn(20, 14), None, settings=settings)
    found = variant.reduce_calibration(layer, torch.zeros(20, 14))
    assert torch.equal(found["A"], torch.zeros(LORA_ONE_RANK, 14))
    assert torch.equal(found["B"], torch.zeros(20, LORA_ONE_RANK))


# LoRA-SB against the rule of the authors' code, computed in float64.


LORA_SB_RANK, STEP_SIZE = 4, 0.01


def test_lora_sb_start_is_the_best_approximation_of_a_sign_step() -> None:
    noise = torch.Generator().manual_seed(0)
    # Sides of more than RANK + 10, so that the randomized SVD is not exact without its iterations.
    left, right = (torch.randn(side, LORA_SB_RANK, generator=noise, dtype=torch.float64) for side in (60, 50))
    gradient = left @ right.t() + 0.1 * torch.randn(60, 50, generator=noise, dtype=torch.float64)
    weight = torch.randn(60, 50, generator=noise, dtype=torch.float64)
    settings = VariantSettings(LORA_SB_RANK, extra={"step_size": STEP_SIZE})
    start = start_of("lora_sb", weight, settings, statistic=gradient)
    a, b, r = start.frozen["A"], start.frozen["B"], start.trainable["R"]
    u, s, vh = torch.linalg.svd(-STEP_SIZE * gradient.sign())
    torch.testing.assert_close(
        b @ r @ a, (u[:, :LORA_SB_RANK] * s[:LORA_SB_RANK]) @ vh[:LORA_SB_RANK], rtol=1e-5, atol=1e-8
    )
    identity = torch.eye(LORA_SB_RANK, dtype=torch.float64)
    torch.testing.assert_close(a @ a.t(), identity)
    torch.testing.assert_close(b.t() @ b, identity)
    assert torch.equal(r, r.diagonal().diag())
    # The published study's code starts from W + B diag(S) A of the gradient itself.
    assert (gradient * (b @ r @ a)).sum() < 0


# LoRA-XS: the rule of the authors' code, computed in float64.


LORA_XS_RANK = 5


def test_lora_xs_factors_are_the_largest_triplets_with_the_singular_values_in_a() -> None:
    weight = torch.randn(20, 14, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start = start_of("lora_xs", weight, VariantSettings(LORA_XS_RANK, 6.0), seed=1)
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    a, b = start.frozen["A"], start.frozen["B"]
    torch.testing.assert_close(b @ a, (u[:, :LORA_XS_RANK] * s[:LORA_XS_RANK]) @ vh[:LORA_XS_RANK])
    torch.testing.assert_close(b.t() @ b, torch.eye(LORA_XS_RANK, dtype=torch.float64))
    torch.testing.assert_close(a.norm(dim=1), s[:LORA_XS_RANK])
    assert start.trainable.keys() == {"R"}
    assert start.trainable["R"].shape == (LORA_XS_RANK, LORA_XS_RANK)


def test_lora_xs_the_matrix_starts_from_a_narrow_normal_distribution() -> None:
    r = start_of(
        "lora_xs",
        torch.randn(80, 90, generator=torch.Generator().manual_seed(0)),
        VariantSettings(64, 64.0),
        seed=1,
    ).trainable["R"]
    assert r.std().item() == pytest.approx(1e-5, rel=0.05)
    assert abs(r.mean().item()) < 1e-6


def test_lora_xs_a_standard_deviation_of_zero_starts_at_the_base() -> None:
    case = Case("tall", out_features=40, in_features=24)
    settings = VariantSettings(4, 8.0, extra={"init_std": 0.0})
    adapters = attach_lanes(case, catalogue.get("lora_xs"), 1, settings)
    assert torch.equal(lane_outputs(case, adapters), base_outputs(case, adapters))


# MiLoRA: the initialization from the smallest singular triplets, in float64.


MILORA_RANK, MILORA_ALPHA = 3, 12.0


@pytest.mark.parametrize("shape", [(16, 16), (20, 14), (14, 20)])
def test_milora_start_has_the_smallest_triplets(shape: tuple[int, int]) -> None:
    """The published study's code takes the largest, with U and V exchanged, if its SVD is randomized."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start = start_of("milora", weight, VariantSettings(MILORA_RANK, MILORA_ALPHA))
    a, b = start.trainable["A"], start.trainable["B"]
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    scale = MILORA_ALPHA / MILORA_RANK
    smallest = (u[:, -MILORA_RANK:] * s[-MILORA_RANK:]) @ vh[-MILORA_RANK:]
    torch.testing.assert_close(scale * b @ a, smallest)
    torch.testing.assert_close(a.norm(dim=1), (s[-MILORA_RANK:] / scale).sqrt())
    torch.testing.assert_close(b.norm(dim=0), a.norm(dim=1))
    # What stays frozen is the best approximation of W of its rank.
    assert torch.linalg.matrix_norm(weight - scale * b @ a, 2).item() == pytest.approx(s[0].item())
    assert torch.equal(start.frozen["A0"], a)
    assert torch.equal(start.frozen["B0"], b)


def test_milora_a_randomized_svd_is_refused() -> None:
    variant = catalogue.get("milora")
    with pytest.raises(UnsupportedError, match="svd"):
        variant.validate_settings(VariantSettings(MILORA_RANK, MILORA_ALPHA, extra={"svd": "16"}))


# NoRA's initialization, computed in float64.


NORA_RANK, NORA_ALPHA = 3, 6.0


@pytest.mark.parametrize("outer", [1, 2, 40])
def test_nora_start_has_the_largest_triplets_at_the_full_rank(outer: int) -> None:
    """The published study's code starts from one triplet, the second, whatever the rank is."""
    weight = torch.randn(20, 14, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start = start_of("nora", weight, VariantSettings(NORA_RANK, NORA_ALPHA, extra={"outer": outer}))
    a, b = start.frozen["A"], start.frozen["B"]
    assert len(a) == min(outer * NORA_RANK, 14)
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(b @ s[: len(a)].diag() @ a, (u[:, : len(a)] * s[: len(a)]) @ vh[: len(a)])
    update = b @ start.trainable["inner_B"] @ start.trainable["inner_A"] @ a
    torch.testing.assert_close(update, (u[:, :NORA_RANK] * s[:NORA_RANK]) @ vh[:NORA_RANK])
    assert torch.linalg.matrix_rank(update) == NORA_RANK
    torch.testing.assert_close(start.frozen["B0"] @ start.frozen["A0"], update)
    assert start.trainable.keys() == {"inner_A", "inner_B"}


# NZLoRA: the distributions of the initial A and B, and the optional subtraction of their product.


NZLORA_OUT, NZLORA_IN, NZLORA_RANK = 400, 900, 8


def initial(**extra: float | str | bool) -> InitialTensors:
    return start_of("nzlora", torch.zeros(NZLORA_OUT, NZLORA_IN), VariantSettings(NZLORA_RANK, extra=extra))


def assert_uniform(tensor: Tensor, bound: float) -> None:
    assert 0.99 * bound < tensor.abs().max() <= bound
    assert tensor.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)


@pytest.mark.parametrize(
    ("bound", "a", "b"),
    [
        ("sqrt", math.sqrt(16 / NZLORA_IN), math.sqrt(4 / NZLORA_IN)),
        ("linear", 16 / math.sqrt(NZLORA_IN), 4 / math.sqrt(NZLORA_IN)),
    ],
)
def test_nzlora_both_factors_are_uniform_with_bounds_from_the_inputs(bound: str, a: float, b: float) -> None:
    start = initial(gamma_a=16.0, gamma_b=4.0, bound=bound)
    assert not start.frozen
    assert_uniform(start.trainable["A"], a)
    assert_uniform(start.trainable["B"], b)
    assert start.trainable["B"].shape == (NZLORA_OUT, NZLORA_RANK)


def test_nzlora_factors_do_not_share_their_noise() -> None:
    start = initial()
    a, b = start.trainable["A"].flatten(), start.trainable["B"].flatten()
    assert not torch.equal(a[: len(b)], b)


def nzlora_change(params: Params, weight: Tensor, settings: VariantSettings, s: float) -> Tensor:
    product = params["B"] @ params["A"]
    return s * (product - params["B0"] @ params["A0"]) if "B0" in params else s * product


@pytest.mark.parametrize("subtract", [False, True])
def test_nzlora_update(subtract: bool) -> None:
    check_update("nzlora", nzlora_change, VariantSettings(3, 6.0, extra={"subtract": subtract}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nzlora_subtraction_gives_the_base_models_outputs(dtype: torch.dtype) -> None:
    case = Case("wide", out_features=24, in_features=40, dtype=dtype)
    settings = VariantSettings(4, 8.0, extra={"subtract": True})
    adapters = attach_lanes(case, catalogue.get("nzlora"), 2, settings)
    assert torch.equal(lane_outputs(case, adapters), base_outputs(case, adapters))
    plain = attach_lanes(case, catalogue.get("nzlora"), 2, VariantSettings(4, 8.0))
    assert not torch.equal(lane_outputs(case, plain), base_outputs(case, plain))


# OLoRA: the initialization from the QR decomposition, in float64.


OLORA_RANK, OLORA_ALPHA = 3, 12.0


@pytest.mark.parametrize("shape", [(20, 14), (14, 20)])
def test_olora_start_is_the_first_part_of_the_qr_decomposition(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start = start_of("olora", weight, VariantSettings(OLORA_RANK, OLORA_ALPHA))
    a, b = start.trainable["A"], start.trainable["B"]
    torch.testing.assert_close(b.t() @ b, torch.eye(OLORA_RANK, dtype=torch.float64))
    # The first columns of W are products of the first columns of Q alone.
    torch.testing.assert_close(b @ a[:, :OLORA_RANK], weight[:, :OLORA_RANK])
    torch.testing.assert_close(a, b.t() @ weight)
    assert a[:, :OLORA_RANK].tril(-1).abs().max() < 1e-12
    assert torch.equal(start.frozen["A0"], a)
    assert torch.equal(start.frozen["B0"], b)


# SORSA against the rule of the authors' code: update, initialization and the orthonormality loss.


SORSA_RANK = 3


def test_sorsa_start_has_the_largest_triplets_in_three_tensors() -> None:
    weight = torch.randn(20, 14, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start = start_of("sorsa", weight, VariantSettings(SORSA_RANK))
    a, b, s = (start.trainable[name] for name in "ABS")
    u, values, vh = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(s, values[:SORSA_RANK])
    torch.testing.assert_close((b * s) @ a, (u[:, :SORSA_RANK] * values[:SORSA_RANK]) @ vh[:SORSA_RANK])
    identity = torch.eye(SORSA_RANK, dtype=torch.float64)
    torch.testing.assert_close(a @ a.t(), identity)
    torch.testing.assert_close(b.t() @ b, identity)


def orthonormality(parameters: dict[str, Tensor]) -> Tensor:
    """Return the mean over all A and B of the norm of the error, as the authors compute it."""
    norms = []
    for name, parameter in parameters.items():
        if name.endswith((".A", ".B")):
            gram = parameter @ parameter.T if name.endswith(".A") else parameter.T @ parameter
            norms.append(torch.norm(gram - torch.eye(len(gram), dtype=gram.dtype)))
    return torch.stack(norms).mean()


# The authors' script sets 4e-4, and `accelerator.backward` divides by the 64 accumulated batches.
@pytest.mark.parametrize(("extra", "gamma"), [({"gamma": 0.004}, 0.004), ({}, 4e-4 / 64)])
def test_sorsa_a_step_adds_the_orthonormality_gradient(extra: dict[str, float], gamma: float) -> None:
    case = Case("tall", out_features=40, in_features=24, dtype=torch.float64)
    rate = 0.01
    settings = VariantSettings(SORSA_RANK, extra=extra)
    adapters = attach_lanes(case, catalogue.get("sorsa"), 1, settings)
    perturb_lanes(case, adapters)
    mine = adapters.trainable("0")
    copies = {name: value.detach().clone().requires_grad_() for name, value in mine.items()}
    optimizer = LaneOptimizer(adapters, "0", rate, 1)
    optimizer.learning_rate = rate / 2  # a later step: the term's weight keeps the highest rate
    expected = torch.optim.AdamW(copies.values(), lr=rate / 2)
    with adapters.activate_lanes(["0"], 0):
        case.loss(model_output(adapters.model, case.rows(0)), case.rows(0)).backward()
    (gamma / rate * orthonormality(copies)).backward()
    for name, copy in copies.items():
        task = mine[name].grad.clone()
        copy.grad = task if copy.grad is None else copy.grad + task
    optimizer.step()
    expected.step()
    for name, copy in copies.items():
        torch.testing.assert_close(mine[name].grad, copy.grad, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(mine[name].detach(), copy.detach(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("features", "rank"), [(24, 3), (1024, 64)])
def test_sorsa_the_term_has_no_gradient_while_a_and_b_are_orthonormal_up_to_rounding(
    features: int, rank: int
) -> None:
    random = torch.Generator().manual_seed(0)
    rows = torch.linalg.svd(torch.randn(rank, features, generator=random), full_matrices=False).Vh
    assert (rows @ rows.t() - torch.eye(rank)).norm() > 0
    assert not _orthonormality_gradient(rows).any()
    moved = rows + 1e-5 * torch.randn(rows.shape, generator=random).sign()
    assert abs(_orthonormality_gradient(moved).norm().item() / 2 - 1) < 0.1
