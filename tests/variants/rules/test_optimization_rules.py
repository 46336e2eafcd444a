"""Update rules and steps of the variants that change how LoRA's factors are optimized."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rule import (
    TALL,
    adapt,
    check_output,
    check_update,
    initial_tensors,
    record_step,
    start_of,
    weight_change,
)
from scipy.interpolate import BSpline
from torch import Tensor, nn

from variants import catalogue
from variants.api import FrozenLayer, Params, VariantSettings
from variants.forward_context import draw_dropout_masks
from variants.optimization.aurora import spline_basis
from variants.optimization.lora_pro import _projected_pair, _solve_sylvester
from variants.storage import load_peft, save_peft
from variants.testing.rig import Case, LaneOptimizer, attach_lanes, lane_outputs, model_output, perturb_lanes


@pytest.mark.parametrize("name", ["loft", "lora_fa", "lora_plus", "lora_pro", "rplora"])
def test_the_update_is_that_of_lora(name: str) -> None:
    check_update(name, lambda p, weight, settings, s: s * p["B"] @ p["A"])


# AuroRA's nonlinear layer, with splines in closed form.


def cubic_splines(z: Tensor) -> Tensor:
    """Return the 8 cubic B-splines on the intervals [-1, -0.6], ..., [0.6, 1] of each entry of z."""
    centers = torch.tensor([-1.4, -1.0, -0.6, -0.2, 0.2, 0.6, 1.0, 1.4], dtype=z.dtype)
    distance = ((z.unsqueeze(-1) - centers) / 0.4).abs()
    near = 2 / 3 - distance**2 + distance**3 / 2
    far = (2 - distance).clamp(min=0) ** 3 / 6
    return torch.where(distance < 1, near, far)


def update(x: Tensor, params: Params, weight: Tensor, settings: VariantSettings, s: float) -> Tensor:
    z = x @ params["A"].T
    fixed = torch.tanh(torch.tanh(z) @ params["H"].T)
    learned = cubic_splines(z).sum(1) @ params["C"].T
    return s * (fixed + learned) @ params["B"].T


def test_aurora_the_update_is_the_papers_equation() -> None:
    check_output("aurora", update, settings=VariantSettings(4, 8.0))


@pytest.mark.parametrize(("intervals", "degree"), [(5, 3), (5, 1), (3, 2), (8, 4), (1, 1), (1, 3)])
def test_aurora_the_splines_are_those_of_scipy(intervals: int, degree: int) -> None:
    z = np.linspace(-2.7, 2.7, 997)
    knots = np.arange(-degree, intervals + degree + 1) * 2 / intervals - 1
    expected = [
        np.nan_to_num(BSpline.basis_element(knots[i : i + degree + 2], extrapolate=False)(z))
        for i in range(intervals + degree)
    ]
    found = spline_basis(torch.from_numpy(z), intervals, degree)
    torch.testing.assert_close(found, torch.from_numpy(np.stack(expected, axis=1)), rtol=0, atol=1e-12)


def test_aurora_the_nonlinear_layer_starts_as_in_the_studys_code() -> None:
    settings = VariantSettings(16, 16.0)
    starts = [start_of("aurora", torch.zeros(20, 30), settings, seed) for seed in range(40)]
    h = torch.stack([start.trainable["H"] for start in starts])
    c = torch.stack([start.trainable["C"] for start in starts])
    torch.testing.assert_close(h.std(), torch.tensor(0.25), rtol=0.05, atol=0)
    assert h.abs().max() > 0.6  # a normal distribution and not a uniform one
    assert c.shape == (40, 16, 8)
    assert 0.099 < c.abs().max() < 0.1
    assert not any(start.trainable["B"].any() for start in starts)


# DeLoRA against the rule of the authors' code, computed in float64.


def bounded(a: Tensor, b: Tensor, strength: Tensor) -> Tensor:
    diagonal = torch.diag(strength / len(a) / (a.norm(dim=1) * b.norm(dim=0)))
    return b @ diagonal @ a


def delora_change(params: Params, weight: Tensor, settings: VariantSettings, s: float) -> Tensor:
    update = bounded(params["A"], params["B"], params["lambda"])
    if "A0" in params:
        update = update - bounded(params["A0"], params["B0"], params["lambda"])
    return update * weight.norm(dim=0).unsqueeze(0)


@pytest.mark.parametrize("initial", ["kaiming", "zero"])
def test_delora_update(initial: str) -> None:
    check_update("delora", delora_change, VariantSettings(3, extra={"initial": initial, "lambda": 20.0}))


def test_delora_both_factors_start_kaiming_uniform() -> None:
    start = start_of("delora", torch.zeros(400, 900), VariantSettings(16))
    for name, bound in (("A", 1 / 30), ("B", 1 / 4)):
        tensor = start.trainable[name]
        assert 0.99 * bound < tensor.abs().max() <= bound
        assert tensor.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
        assert torch.equal(start.frozen[f"{name}0"], tensor)
    assert start.trainable["lambda"].tolist() == [8.0]


@pytest.mark.parametrize("bound", [1.0, 2.0])
def test_delora_the_bound_on_the_norm_of_the_change_is_reached(bound: float) -> None:
    """It is |lambda| max(w), and twice as large with frozen copies, which the change may point away from."""
    weight = torch.randn(20, 14, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    variant = catalogue.get("delora")
    extra = {"initial": "kaiming" if bound == 2.0 else "zero", "lambda": 3.0}
    settings = variant.validate_settings(VariantSettings(4, extra=extra))
    layer = FrozenLayer("layer", weight, None).with_settings(settings, 1.0)
    start = initial_tensors(variant, layer, settings)
    params, norms = {**start.trainable, **start.frozen}, weight.norm(dim=0)
    # All ranks have one direction: that of the input whose column of the weight is longest.
    params["A"], params["B"] = torch.zeros(4, 14).double(), torch.ones(20, 4).double()
    params["A"][:, norms.argmax()] = 5.0
    if "A0" in params:
        params["A0"], params["B0"] = -params["A"], params["B"]
    largest = bound * 3.0 * norms.max()
    torch.testing.assert_close(variant.delta_weight(params, layer).norm(), largest)
    for seed in range(20):
        noise = torch.Generator().manual_seed(seed)
        for name in params.keys() - {"lambda"}:
            params[name] = torch.randn(params[name].shape, generator=noise, dtype=torch.float64)
        assert variant.delta_weight(params, layer).norm() <= largest


@pytest.mark.parametrize(("initial", "rank"), [("kaiming", 8), ("zero", 4)])
def test_delora_frozen_copies_are_exported_as_ranks(initial: str, rank: int, tmp_path: Path) -> None:
    case = Case("llama", model="llama")
    settings = VariantSettings(4, extra={"initial": initial})
    adapters = attach_lanes(case, catalogue.get("delora"), 1, settings)
    perturb_lanes(case, adapters)
    save_peft(adapters, "0", tmp_path, "base")
    loaded = load_peft(case.build(), tmp_path, lane="0")
    assert loaded.settings.rank == rank
    assert loaded.settings["initial"] == "zero"
    torch.testing.assert_close(lane_outputs(case, loaded), lane_outputs(case, adapters))


# Delta-LoRA's update: the paper's equations 8 to 10, summed over the steps.


def delta_lora_change(
    params: Mapping[str, Tensor], weight: Tensor, settings: VariantSettings, s: float
) -> Tensor:
    product = params["B"] @ params["A"]
    moved = product.detach() - params["before B"] @ params["before A"]
    return s * (product + settings.extra["ratio"] * moved)


def test_delta_lora_the_frozen_weight_gains_the_change_of_the_product() -> None:
    check_update("delta_lora", delta_lora_change)


@pytest.mark.parametrize("model", ["rectangles", "llama"])
def test_delta_lora_equals_the_papers_stepwise_accumulation(model: str) -> None:
    """The reference is LoRA with base weights that change after each step t > K (algorithm 1)."""
    case, steps = Case(model, model=model, out_features=40, in_features=24, dtype=torch.float64), 12
    adapters, reference = (attach_lanes(case, catalogue.get(name), 1) for name in ("delta_lora", "lora"))
    initial_weights = {name: layer.frozen_layer.weight.clone() for name, layer in adapters.layers.items()}
    k = round(500 / 1562 * steps)
    own, plain = (LaneOptimizer(each, "0", 0.01, steps) for each in (adapters, reference))
    product = {name: weight_change(reference, name) for name in initial_weights}
    for t in range(steps):
        record_step(case, adapters, own)
        record_step(case, reference, plain)
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


# DuDe: DoRA's rule over PiSSA's factors, computed in float64.


RANK, ALPHA, DROPOUT = 3, 12.0, 0.25


def dude_change(params: Params, weight: Tensor, settings: VariantSettings, s: float) -> Tensor:
    direction = weight + s * (params["B"] @ params["A"] - params["B0"] @ params["A0"])
    norms = direction.norm(dim=1).detach()
    return (params["m"] / norms).unsqueeze(1) * direction - weight


def test_dude_update_normalizes_the_weight_with_the_residual() -> None:
    check_update("dude", dude_change, VariantSettings(RANK, ALPHA))


def test_dude_start_is_that_of_pissa_with_the_norms_of_the_weight() -> None:
    weight = torch.randn(20, 14, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start = start_of("dude", weight, VariantSettings(RANK, ALPHA))
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    product = start.trainable["B"] @ start.trainable["A"]
    torch.testing.assert_close(ALPHA / RANK * product, (u[:, :RANK] * s[:RANK]) @ vh[:RANK])
    # Both factors contain the square roots of the singular values.
    a, b = start.trainable["A"], start.trainable["B"]
    torch.testing.assert_close(a @ a.T, b.T @ b)
    torch.testing.assert_close(start.trainable["m"], weight.norm(dim=1))
    assert torch.equal(start.frozen["A0"], start.trainable["A"])


class FixedDropout(nn.Module):
    """Dropout with a given mask, whose values are 0 or 1 / (1 - p)."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mask


def test_dude_dropout_is_that_of_peft() -> None:
    """In PEFT the frozen weight is the residual W - s B0 A0, so dropout also applies to s B0 A0."""
    adapters = adapt("dude", VariantSettings(RANK, ALPHA, dropout=DROPOUT))
    config = LoraConfig(
        r=RANK,
        lora_alpha=int(ALPHA),
        lora_dropout=DROPOUT,
        target_modules=["0"],
        init_lora_weights="pissa",
        use_dora=True,
    )
    noise, s = torch.Generator().manual_seed(0), ALPHA / RANK
    for layer in adapters.layers.values():
        frozen, tensors = layer.frozen_layer, layer.lane_tensors("0")
        x = torch.randn(8, frozen.shape[1], generator=noise, dtype=torch.float64, requires_grad=True)
        own_x = x.detach().clone().requires_grad_()
        direction = torch.randn(8, frozen.shape[0], generator=noise, dtype=torch.float64)
        with adapters.activate_lanes(["0"], 3, rows_per_lane=8) as context:
            found = layer(own_x)
            context.mask_draws.clear()  # This makes the next draw repeat the same mask.
            masks = draw_dropout_masks(
                x.unsqueeze(0), DROPOUT, layer.name, context, layer.adapter_state.seeds
            )
        assert 0.1 < (masks == 0).double().mean() < 0.4
        reference = nn.Sequential(nn.Linear(frozen.shape[1], frozen.shape[0]))
        with torch.no_grad():
            reference[0].weight.copy_(frozen.weight)
            reference[0].bias.copy_(frozen.bias)
        peft_layer = get_peft_model(reference, config).double().train().base_model.model[0]
        residual = frozen.weight - s * tensors["B0"] @ tensors["A0"]
        torch.testing.assert_close(peft_layer.base_layer.weight, residual, rtol=0, atol=1e-5)
        peft_layer.lora_dropout["default"] = FixedDropout(masks[0])
        own = {
            "A": peft_layer.lora_A["default"].weight,
            "B": peft_layer.lora_B["default"].weight,
            "m": peft_layer.lora_magnitude_vector["default"].weight,
        }
        with torch.no_grad():
            peft_layer.base_layer.weight.copy_(residual)
            for name, parameter in own.items():
                parameter.copy_(tensors[name])
        expected = peft_layer(x)
        torch.testing.assert_close(found, expected)
        (found * direction).sum().backward()
        (expected * direction).sum().backward()
        torch.testing.assert_close(own_x.grad, x.grad)
        for name, parameter in own.items():
            torch.testing.assert_close(tensors[name].grad, parameter.grad)


# LoFT: Adam's moments of full size, projected at each step, in float64.


def test_loft_steps_are_adams_on_the_projected_gradient() -> None:
    case = Case("tall", out_features=12, in_features=10, dtype=torch.float64)
    adapters = attach_lanes(case, catalogue.get("loft"), 1, VariantSettings(3))
    optimizer = LaneOptimizer(adapters, "0", RATE, 6)
    moments: dict[str, tuple[Tensor, Tensor]] = {}
    for step in range(1, 7):
        before, gradients = record_step(case, adapters, optimizer)
        for layer, factor in product(adapters.layers, "AB"):
            name, other = f"{layer}.{factor}", f"{layer}.{'BA'['AB'.index(factor)]}"
            turned = [t.T if factor == "A" else t for t in (before[name], gradients[name])]
            basis = before[other].T if factor == "A" else before[other]
            damping = {"A": 1e-6, "B": 1e-8}[factor] * torch.eye(3, dtype=basis.dtype)
            lift = torch.linalg.inv(basis @ basis.T + damping)
            onto, full = basis.T @ lift @ basis, turned[1] @ lift @ basis  # full is G projected
            first, second = moments.get(
                name, (torch.zeros_like(full), full.new_zeros(*full.shape, len(onto)))
            )
            first = BETAS[0] * first @ onto + (1 - BETAS[0]) * full
            rows = torch.einsum("ni,nj->nij", full, full)
            second = BETAS[1] * onto @ second @ onto + (1 - BETAS[1]) * rows
            moments[name] = first, second
            unbiased = (second.diagonal(dim1=1, dim2=2) / (1 - BETAS[1] ** step)).clamp(
                min=0
            ).sqrt() + EPSILON
            move = first / (1 - BETAS[0] ** step) / unbiased @ basis.T @ lift
            expected = turned[0] * (1 - RATE * DECAY) - RATE * move if factor == "AB"[step % 2] else turned[0]
            found = adapters.trainable("0")[name]
            torch.testing.assert_close(found.T if factor == "A" else found, expected, rtol=1e-7, atol=1e-10)


def test_loft_at_full_rank_is_adam_on_the_weight() -> None:
    case = Case("square", out_features=8, in_features=8, dtype=torch.float64)
    adapters = attach_lanes(case, catalogue.get("loft"), 1, VariantSettings(8))
    noise = torch.Generator().manual_seed(3)
    for parameter in adapters.trainable("0").values():
        parameter.data = torch.linalg.qr(torch.randn(8, 8, generator=noise, dtype=torch.float64)).Q
    model = case.build()
    for name, layer in adapters.layers.items():
        lane = layer.lane_tensors("0")
        model.get_submodule(name).weight.data += (lane["B"] @ lane["A"]).detach()
    start = model_output(model, case.rows(0)).detach()
    optimizer = LaneOptimizer(adapters, "0", 0.01, 10)
    optimizer.optimizer.param_groups[0]["weight_decay"] = 0.0
    adam = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(10):
        record_step(case, adapters, optimizer)
        adam.zero_grad()
        case.loss(model_output(model, case.rows(0, step)), case.rows(0, step)).backward()
        adam.step()
    expected = model_output(model, case.rows(0)).detach()
    change = lane_outputs(case, adapters) - start
    torch.testing.assert_close(change, expected - start, rtol=1e-4, atol=1e-4)
    assert change.abs().max() > 0.1


# LoRA-Dash: the selected directions, their update, and the steps in which they learn.


SETTINGS = VariantSettings(4, 8.0, extra={"directions": 5, "warmup": 0.5})


def test_lora_dash_the_update_adds_the_scaled_directions() -> None:
    adapters = attach_lanes(TALL, catalogue.get("lora_dash"), 1, SETTINGS)
    optimizer = LaneOptimizer(adapters, "0", 0.01, 8)
    for _ in range(8):
        record_step(TALL, adapters, optimizer)
    settings, noise = adapters.lane_settings("0"), torch.Generator().manual_seed(0)
    for layer in adapters.layers.values():
        p, frozen = layer.lane_tensors("0"), layer.frozen_layer
        # The frozen U contains 1 / s, since s = 2 multiplies the whole update.
        change = 2.0 * p["B"] @ p["A"] + (2.0 * p["U"]) @ torch.diag(p["d"]) @ p["V"]
        assert ((2.0 * p["U"]) @ torch.diag(p["d"]) @ p["V"]).norm() > 0.01
        merged = adapters.variant.delta_weight(p, frozen.with_settings(settings, 2.0))
        torch.testing.assert_close(merged, change)
        x = torch.randn(8, frozen.shape[1], generator=noise, dtype=torch.float64)
        optimizer.zero_grad()
        with adapters.activate_lanes(["0"], 0, rows_per_lane=8):
            output = layer(x)
            output.square().sum().backward()
        torch.testing.assert_close(output, x @ (frozen.weight + change).T)
        # d L / d d_i = u_i^T (d L / d W') v_i
        gradient = (2.0 * p["U"]).T @ (2 * output.detach()).T @ x @ p["V"].T
        torch.testing.assert_close(p["d"].grad, gradient.diagonal())


def test_lora_dash_directions_are_those_that_change_most_relative_to_their_singular_value() -> None:
    adapters = attach_lanes(TALL, catalogue.get("lora_dash"), 1, SETTINGS)
    optimizer = LaneOptimizer(adapters, "0", 0.01, 8)
    for step in range(1, 9):
        record_step(TALL, adapters, optimizer)
        frozen, trainable = adapters.frozen("0"), adapters.trainable("0")
        for name, layer in adapters.layers.items():
            u, v, d = frozen[f"{name}.U"], frozen[f"{name}.V"], trainable[f"{name}.d"]
            assert bool(u.any()) == bool(v.any()) == (step >= 4)
            assert bool(d.any()) == (step > 4)
            if step == 4:
                weight = layer.frozen_layer.weight
                change = 2.0 * trainable[f"{name}.B"] @ trainable[f"{name}.A"]
                left, sigma, right = torch.linalg.svd(weight, full_matrices=False)
                rates = (left.T @ change @ right.T).diagonal().abs() / sigma
                chosen = {int((right @ row).abs().argmax()) for row in v}
                assert chosen == set(rates.argsort(descending=True)[:5].tolist())
                # u^T W v is the singular value, so the pairs belong together and have the right sign.
                values = (2.0 * u.T @ weight @ v.T).diagonal()
                assert sorted(values.tolist()) == pytest.approx(sorted(sigma[sorted(chosen)].tolist()))


def test_lora_dash_the_first_step_of_d_is_a_first_step_of_adam() -> None:
    """Its size is the learning rate, although A and B took steps before. Their counter would triple it."""
    adapters = attach_lanes(TALL, catalogue.get("lora_dash"), 1, SETTINGS)
    optimizer = LaneOptimizer(adapters, "0", 0.01, 8)
    for _ in range(5):
        record_step(TALL, adapters, optimizer)
    for name, parameter in adapters.trainable("0").items():
        if name.endswith(".d"):
            torch.testing.assert_close(parameter.abs(), torch.full_like(parameter, 0.01), rtol=1e-4, atol=0)


def test_lora_dash_a_small_layer_keeps_all_of_its_directions() -> None:
    case = Case("small", out_features=6, in_features=24)
    adapters = attach_lanes(case, catalogue.get("lora_dash"), 1)
    assert adapters.trainable("0")["there.0.d"].shape == (6,)


def test_lora_dash_peft_loads_a_model_with_a_small_layer(tmp_path: Path) -> None:
    """PEFT gives all layers one rank, but a layer of 6 outputs has fewer directions than one of 24."""
    case = Case("small", out_features=6, in_features=24)
    adapters = attach_lanes(case, catalogue.get("lora_dash"), 1)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in adapters.layers.values():
            for tensor in layer.lane_tensors("0").values():
                tensor.normal_(generator=noise)
    save_peft(adapters, "0", tmp_path, "base")
    with torch.no_grad():
        found = PeftModel.from_pretrained(case.build(), tmp_path)(case.rows(0))
    torch.testing.assert_close(found, lane_outputs(case, adapters), rtol=1e-4, atol=1e-4)


# LoRA-FA: A is frozen, and the optimizer's gradient of B gives the projected full-size gradient.


def test_lora_fa_a_step_of_gradient_descent_projects_the_full_gradient() -> None:
    """s times the optimizer's gradient times A is G A^T (A A^T)^-1 A, with s G A^T = the gradient of B."""
    adapters = attach_lanes(TALL, catalogue.get("lora_fa"), 1)
    optimizer, scaling = LaneOptimizer(adapters, "0", 0.01, 3), 2.0
    for _ in range(3):
        _, gradients = record_step(TALL, adapters, optimizer)
        for layer in adapters.layers:
            a = adapters.frozen("0")[f"{layer}.A"]
            used = adapters.trainable("0")[f"{layer}.B"].grad
            assert used is not None
            projector = torch.linalg.pinv(a) @ a
            full = gradients[f"{layer}.B"] / scaling @ torch.linalg.pinv(a).T  # G, up to its part beside A
            difference = scaling * used @ a - full @ projector
            assert difference.norm() < 1e-6 * full.norm()  # the damping of 1e-8 is relative to about 0.3


# LoRAN's update, computed independently.


@pytest.mark.parametrize(("amplitude", "frequency"), [(None, None), (0.4, 2.5)])
def test_lora_n_the_update_is_a_function_of_the_low_rank_product(
    amplitude: float | None, frequency: float | None
) -> None:
    """The defaults are the `mlora_af_sin_A` and `mlora_af_sin_omega` of the authors' adapters."""
    size, omega = amplitude or 5e-5, frequency or 1e4

    def change(params: Params, weight: Tensor, settings: VariantSettings, s: float) -> Tensor:
        z = torch.einsum("or,ri->oi", params["B"], params["A"])
        return (size * torch.sin(omega * z) * z + z) * s

    extra = {} if amplitude is None else {"amplitude": amplitude, "frequency": frequency}
    check_update("lora_n", change, settings=VariantSettings(4, 8.0, extra=extra))


# LoRA-Pro: the adjusted gradients and the optimizer step, computed with generic solvers in float64.


BETAS, EPSILON, DECAY, RATE, SCALING = (0.9, 0.999), 1e-8, 0.01, 0.001, 2.0


def solve_pair(a: Tensor, b: Tensor, grad_a: Tensor, grad_b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the pair of theorem 2.1 with the X of theorem 2.3, by a linear system of the vectorized X."""
    rank, s = len(a), SCALING
    damping = 1e-8 * torch.eye(rank, dtype=a.dtype)
    inverse_a, inverse_b = torch.linalg.inv(a @ a.T + damping), torch.linalg.inv(b.T @ b + damping)
    d_a = inverse_b @ grad_a / s**2
    projector = torch.eye(len(b), dtype=b.dtype) - b @ inverse_b @ b.T
    d_b = projector @ grad_b @ inverse_a / s**2
    eye = torch.eye(rank, dtype=a.dtype)
    system = torch.kron(b.T @ b, eye) + torch.kron(eye, a @ a.T)
    x = torch.linalg.solve(system, (-d_a @ a.T).flatten()).view(rank, rank)
    return d_a + x @ a, d_b - b @ x


def test_lora_pro_steps_follow_adam_on_the_full_size_gradient() -> None:
    adapters = attach_lanes(TALL, catalogue.get("lora_pro"), 1)
    optimizer = LaneOptimizer(adapters, "0", RATE, 6)
    moments: dict[str, tuple[Tensor, Tensor]] = {}
    for step in range(1, 7):
        before, gradients = record_step(TALL, adapters, optimizer)
        after = adapters.trainable("0")
        for layer in adapters.layers:
            a, b = before[f"{layer}.A"], before[f"{layer}.B"]
            d_a, d_b = solve_pair(a, b, gradients[f"{layer}.A"], gradients[f"{layer}.B"])
            full = SCALING * (b @ d_a + d_b @ a)
            first, second = moments.get(layer, (torch.zeros_like(full), torch.zeros_like(full)))
            first = BETAS[0] * first + (1 - BETAS[0]) * full
            second = BETAS[1] * second + (1 - BETAS[1]) * full**2
            moments[layer] = first, second
            unbiased = (second / (1 - BETAS[1] ** step)).sqrt() + EPSILON
            direction = first / (1 - BETAS[0] ** step) / unbiased
            expected = solve_pair(a, b, SCALING * b.T @ direction, SCALING * direction @ a.T)
            for name, old, move in zip("AB", (a, b), expected, strict=True):
                torch.testing.assert_close(
                    after[f"{layer}.{name}"], old * (1 - RATE * DECAY) - RATE * move, rtol=1e-6, atol=1e-10
                )
    assert all(first.abs().max() > 0 for first, _ in moments.values())


def test_lora_pro_the_product_is_the_closest_one_to_the_full_gradient() -> None:
    """No other (d_A, d_B) gives a product closer to the gradient, by least squares over all pairs."""
    noise = torch.Generator().manual_seed(1)
    a, b, full = (
        torch.randn(shape, generator=noise, dtype=torch.float64) for shape in ((3, 7), (6, 3), (6, 7))
    )
    d_a, d_b = _projected_pair(a, b, SCALING * b.T @ full, SCALING * full @ a.T, SCALING)
    of_a = torch.kron(b, torch.eye(7, dtype=b.dtype))
    of_b = torch.kron(torch.eye(6, dtype=a.dtype), a.T.contiguous())
    design = SCALING * torch.cat(
        [of_a, of_b], dim=1
    )  # a row per entry of the product, a column per entry of the pair
    best = (design @ torch.linalg.pinv(design) @ full.flatten()).view(6, 7)
    torch.testing.assert_close(SCALING * (b @ d_a + d_b @ a), best, rtol=1e-6, atol=1e-6)
    x = _solve_sylvester(a, b, -d_a @ a.T)
    torch.testing.assert_close(b.T @ b @ x + x @ a @ a.T, -d_a @ a.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_pro_steps_stay_finite_from_b_zero(dtype: torch.dtype) -> None:
    """With B = 0, and B^T B far below 1 in the next steps, the inverses are ill-conditioned."""
    case = Case("wide", out_features=24, in_features=40, dtype=dtype)
    adapters = attach_lanes(case, catalogue.get("lora_pro"), 1, VariantSettings(8, 16.0))
    optimizer = LaneOptimizer(adapters, "0", RATE, 20)
    for _ in range(20):
        record_step(case, adapters, optimizer)
        for parameter in adapters.trainable("0").values():
            assert parameter.detach().abs().max() < 1


# MoSLoRA's update and initialization, computed independently.


def test_moslora_the_update_is_the_product_of_three_matrices() -> None:
    def change(params: Params, weight: Tensor, settings: VariantSettings, s: float) -> Tensor:
        return torch.einsum("or,rq,qi->oi", params["B"], params["M"], params["A"]) * s

    check_update("moslora", change, settings=VariantSettings(4, 8.0))


def test_moslora_the_mixer_starts_as_kaiming_uniform() -> None:
    mixers = []
    for seed in range(50):
        initial = start_of("moslora", torch.zeros(20, 30), VariantSettings(16, 16.0), seed).trainable
        mixers.append(initial["M"])
        assert not initial["B"].any()
    values, bound = torch.stack(mixers), 1 / math.sqrt(16)
    assert mixers[0].shape == (16, 16)
    assert values.abs().max() < bound
    assert values.abs().max() > 0.99 * bound
    torch.testing.assert_close(values.var(), torch.tensor(bound**2 / 3), rtol=0.05, atol=0)


# MultiLoRA's update and initialization, computed independently.


def test_multi_lora_the_update_is_the_scaled_sum_of_the_modules() -> None:
    def change(params: Params, weight: Tensor, settings: VariantSettings, s: float) -> Tensor:
        total = torch.zeros_like(weight)
        for module in range(3):
            ranks = slice(module * 4, module * 4 + 4)
            product = params["B"][:, ranks] @ params["A"][ranks]
            total = total + torch.diag(params["g"][module]) @ product
        return s * total

    check_update("multi_lora", change, settings=VariantSettings(4, 8.0))


def test_multi_lora_only_the_scales_start_at_zero() -> None:
    initial = start_of("multi_lora", torch.zeros(200, 300), VariantSettings(4, 8.0)).trainable
    assert not initial["g"].any()
    assert 0.99 * 300**-0.5 < initial["A"].abs().max() < 300**-0.5
    assert 0.49 < initial["B"].abs().max() < 0.5


# RPLoRA: the preconditioned gradients reach the optimizer.


def test_rplora_gradients_are_preconditioned() -> None:
    case = Case("wide", out_features=24, in_features=40, dtype=torch.float64)
    settings = VariantSettings(4, 8.0, extra={"delta": 0.1})
    adapters = attach_lanes(case, catalogue.get("rplora"), 1, settings)
    optimizer, identity = LaneOptimizer(adapters, "0", 0.01, 3), torch.eye(4, dtype=torch.float64)
    for _ in range(3):
        before, gradients = record_step(case, adapters, optimizer)
        after = adapters.trainable("0")
        for layer in adapters.layers:
            a, b = before[f"{layer}.A"], before[f"{layer}.B"]
            left, right = (torch.linalg.inv(m + 0.1 * identity) for m in (b.T @ b, a @ a.T))
            torch.testing.assert_close(after[f"{layer}.A"].grad, left @ gradients[f"{layer}.A"])
            torch.testing.assert_close(after[f"{layer}.B"].grad, gradients[f"{layer}.B"] @ right)


def test_rplora_a_singular_matrix_makes_the_lane_diverge() -> None:
    """An error would end all lanes of the group."""
    case = Case("wide", out_features=24, in_features=40, dtype=torch.float32)
    settings = VariantSettings(4, 8.0, extra={"delta": 1e-12})
    adapters = attach_lanes(case, catalogue.get("rplora"), 1, settings)
    for name, parameter in adapters.trainable("0").items():
        if name.endswith(".B"):
            parameter.detach().fill_(1)
    record_step(case, adapters, LaneOptimizer(adapters, "0", 0.01, 3))
    assert not all(parameter.isfinite().all() for parameter in adapters.trainable("0").values())


# SineLoRA's update, computed independently.


FREQUENCY = 200.0


def test_sine_lora_the_sine_applies_to_the_weights() -> None:
    def change(params: Params, weight: Tensor, settings: VariantSettings, s: float) -> Tensor:
        product = torch.einsum("or,ri->oi", params["B"], params["A"])
        return torch.sin(FREQUENCY * product) / weight.shape[1] ** 0.5 * s

    check_update("sine_lora", change, settings=VariantSettings(4, 8.0, extra={"frequency": FREQUENCY}))


def test_sine_lora_the_update_is_linear_in_the_input_and_has_a_higher_rank() -> None:
    """The published study's code applies the sine to B A x, which is not linear in x."""
    variant = catalogue.get("sine_lora")
    noise, weight = torch.Generator().manual_seed(0), torch.zeros(20, 30, dtype=torch.float64)
    layer = FrozenLayer("layer", weight, None)
    settings = variant.validate_settings(VariantSettings(2, 4.0, extra={"frequency": 20.0}))
    params = dict(initial_tensors(variant, layer, settings).trainable)
    params["B"] = torch.randn(params["B"].shape, generator=noise, dtype=torch.float64)
    stacked = {name: tensor.unsqueeze(0) for name, tensor in params.items()}
    scaling = torch.full((1, 1, 1), variant.scaling(settings), dtype=torch.float64)
    prepared = variant.prepare(stacked, layer.with_settings(settings, scaling))

    def output(x: Tensor) -> Tensor:
        return variant.forward(
            x, torch.zeros(1, len(x[0]), 20).double(), prepared, layer.with_settings(settings, scaling)
        )

    x, y = torch.randn(2, 1, 7, 30, generator=noise, dtype=torch.float64)
    torch.testing.assert_close(output(x + 2 * y), output(x) + 2 * output(y))
    delta = variant.delta_weight(params, layer.with_settings(settings, variant.scaling(settings)))
    torch.testing.assert_close(output(x)[0], x[0] @ delta.T)
    assert torch.linalg.matrix_rank(delta) > 2 * settings.rank
    output_side = torch.sin(20.0 * x[0] @ params["A"].T @ params["B"].T) * 2.0 / math.sqrt(20)
    assert (output_side - output(x)[0]).norm() > 0.1 * output_side.norm()
