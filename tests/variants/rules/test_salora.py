"""SaLoRA: gates for given noise, the probability of an open gate, both penalties, and the draws of noise."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from rule import adapt, check_output
from torch import Tensor

from variants import catalogue
from variants.adapters import Adapters
from variants.api import Params, VariantSettings
from variants.rank.salora import _gate
from variants.storage import load_lane, save_lane
from variants.testing.cases import Case
from variants.testing.rig import LaneOptimizer, attach_lanes, model_output, perturb_lanes, train_step

NAME = "salora"
CASE = Case("tall", out_features=40, in_features=24, dtype=torch.float64)
TAU, GAMMA, ZETA = 1.0, -0.1, 1.1
STEPS = 20


def gate(d: Tensor, u: Tensor) -> Tensor:
    """Return the gate of equations 46 and 47."""
    stretched = torch.sigmoid((torch.log(u / (1 - u)) + torch.log(d)) / TAU) * (ZETA - GAMMA) + GAMMA
    return torch.minimum(torch.ones_like(d), torch.maximum(torch.zeros_like(d), stretched))


def open_probability(log_d: Tensor) -> Tensor:
    """Return the terms of equation 48."""
    return torch.sigmoid(log_d - TAU * math.log(-GAMMA / ZETA))


def change(params: Params, u: Tensor, s: float) -> Tensor:
    gates = gate(params["log_d"].exp(), u)[:, 0]
    return s * sum(g * torch.outer(b, a) for g, a, b in zip(gates, params["A"], params["B"].T, strict=True))


def spread_gates(adapters: Adapters) -> None:
    """Give every layer gates that are shut, partly open and fully open in evaluation."""
    for layer in adapters.layers.values():
        log_d = layer.lane_tensors("0")["log_d"]
        with torch.no_grad():
            log_d.copy_(torch.linspace(-3, 4, len(log_d)).unsqueeze(1))


def test_training_uses_the_gates_of_the_stored_noise() -> None:
    def update(x, params, weight, settings, s):  # type: ignore[no-untyped-def]
        return x @ change(params, torch.sigmoid(params["noise"]), s).T

    adapters = check_output(NAME, update, VariantSettings(4, 8.0))
    noise = [layer.lane_tensors("0")["noise"] for layer in adapters.layers.values()]
    assert all(each.shape == (6, 1) for each in noise)


def test_evaluation_and_the_merged_weight_use_the_median_gates() -> None:
    adapters = adapt(NAME, VariantSettings(4, 8.0))
    spread_gates(adapters)
    settings = adapters.lane_settings("0")
    for layer in adapters.layers.values():
        params, frozen = layer.lane_tensors("0"), layer.frozen_layer
        expected = change(params, torch.full((6, 1), 0.5, dtype=torch.float64), 2.0).detach()
        x = torch.randn(8, frozen.shape[1], dtype=torch.float64)
        with torch.no_grad(), adapters.activate_lanes(["0"], None):
            torch.testing.assert_close(layer(x), x @ (frozen.weight + expected).T + frozen.bias)
        for is_enabled in (False, True):
            with torch.set_grad_enabled(is_enabled):
                merged = adapters.variant.delta_weight(params, frozen.with_settings(settings, 2.0))
            torch.testing.assert_close(merged.detach(), expected)


def test_ranks_in_use_are_those_whose_median_gate_is_open() -> None:
    adapters = adapt(NAME, VariantSettings(4, 8.0))
    spread_gates(adapters)  # -3, -1.6, -0.2, 1.2, 2.6, 4; a gate opens above -log(11) = -2.398
    assert set(adapters.ranks_in_use("0").values()) == {5}
    assert adapters.variant.rank_budget(4, adapters.settings, 0, STEPS) is None


def test_the_probability_of_an_open_gate_is_equation_48() -> None:
    """The equation is compared with the share of values of u for which the variant's gate is open."""
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    for log_d in (-4.0, -1.0, 0.0, 1.0, 3.0):
        share = (_gate(log_d + torch.logit(u)) > 0).double().mean()
        torch.testing.assert_close(share, open_probability(torch.tensor(log_d).double()), rtol=0, atol=1e-5)


def penalties(parameters: dict[str, Tensor], settings: VariantSettings, step: int) -> Tensor:
    """Return both terms of the loss, before step `step` of `STEPS`; the target falls in half of the steps."""
    extra = settings.extra
    gates = [open_probability(p) for name, p in parameters.items() if name.endswith(".log_d")]
    share = torch.cat(gates).mean()
    target = 1 + (settings.rank / len(gates[0]) - 1) * min(1, step / (0.5 * STEPS))
    total = extra["budget"] * (share - target) ** 2
    for name, parameter in parameters.items():
        if name.endswith((".A", ".B")):
            gram = parameter @ parameter.T if name.endswith(".A") else parameter.T @ parameter
            error = gram - torch.eye(len(gram), dtype=gram.dtype)
            total = total + extra["orthogonality"] * torch.sum(error**2)
    return total


def backward(adapters: Adapters, step: int) -> None:
    with adapters.activate_lanes(["0"], step):
        CASE.loss(model_output(adapters.model, CASE.rows(0, step)), CASE.rows(0, step)).backward()


def test_a_step_adds_the_gradients_of_both_penalties() -> None:
    settings = VariantSettings(4, 8.0, extra={"budget": 7.0, "orthogonality": 0.3, "warmup": 0.5})
    adapters = attach_lanes(CASE, catalogue.get(NAME), 1, settings)
    perturb_lanes(CASE, adapters)
    mine, optimizer = adapters.trainable("0"), LaneOptimizer(adapters, "0", 0.01, STEPS)
    for step in range(STEPS):
        optimizer.zero_grad()
        backward(adapters, step)
        task = {name: parameter.grad.clone() for name, parameter in mine.items()}
        copies = {name: value.detach().clone().requires_grad_() for name, value in mine.items()}
        penalties(copies, adapters.lane_settings("0"), step).backward()
        optimizer.step()
        for name, copy in copies.items():
            assert copy.grad is not None
            torch.testing.assert_close(mine[name].grad, task[name] + copy.grad, rtol=1e-9, atol=1e-12)


def test_a_large_weight_of_the_budget_term_shuts_gates_until_the_budget_is_met() -> None:
    settings = VariantSettings(4, 8.0, extra={"gate_lr": 30.0, "budget": 100.0})
    adapters = attach_lanes(CASE, catalogue.get(NAME), 1, settings)
    optimizer = {"0": LaneOptimizer(adapters, "0", 0.003, 300)}
    for _ in range(300):
        train_step(CASE, adapters, optimizer)
    log_d = torch.cat([p.detach() for n, p in adapters.trainable("0").items() if n.endswith(".log_d")])
    assert abs(float(open_probability(log_d).sum()) - 4 * 4) < 0.1
    ranks = adapters.ranks_in_use("0").values()
    assert abs(sum(ranks) - 4 * 4) <= 2
    assert min(ranks) < 4 < max(ranks)


def test_the_noise_is_uniform_before_the_logit_and_new_in_each_step_layer_and_lane() -> None:
    case = Case("tall", out_features=40, in_features=24)
    adapters = attach_lanes(case, catalogue.get(NAME), 2, VariantSettings(20, 8.0))
    optimizers = {lane: LaneOptimizer(adapters, lane, 0.01, STEPS) for lane in adapters.lanes}
    drawn = []
    for _ in range(STEPS):
        drawn += [
            t.clone() for lane in "01" for n, t in adapters.frozen(lane).items() if n.endswith(".noise")
        ]
        train_step(case, adapters, optimizers)
    noise = torch.cat(drawn)
    assert len(drawn) == 2 * 4 * STEPS
    assert len(noise) == 30 * len(drawn)
    assert len(noise.unique()) > 0.999 * len(noise)
    u = noise.sigmoid().flatten().sort().values
    uniform = (torch.arange(len(u)) + 0.5) / len(u)
    assert (u - uniform).abs().max() < 1.63 / math.sqrt(len(u))  # Kolmogorov and Smirnov's test at 1 %


def test_a_restored_lane_draws_the_noise_of_one_that_went_on(tmp_path: Path) -> None:
    """The noise of the next step is in the saved lane, and later draws depend on the seed and the step."""
    adapters = attach_lanes(CASE, catalogue.get(NAME), 1)
    optimizer = LaneOptimizer(adapters, "0", 0.0, STEPS)
    for step in range(3):
        backward(adapters, step)
        optimizer.step()
    save_lane(adapters, "0", tmp_path / "lane.safetensors")
    restored = attach_lanes(CASE, catalogue.get(NAME), 0)
    load_lane(restored, "0", tmp_path / "lane.safetensors")
    again = LaneOptimizer(restored, "0", 0.0, STEPS)
    again.steps_taken = 3
    for step in range(3, 6):
        for name, tensor in adapters.frozen("0").items():
            assert torch.equal(restored.frozen("0")[name], tensor), f"{name} in step {step}"
        for each, own in ((adapters, optimizer), (restored, again)):
            backward(each, step)
            own.step()


def test_the_start_has_log_d_of_one_and_more_ranks_than_the_budget() -> None:
    variant = catalogue.get(NAME)
    for rank, initial, expected in ((8, 1.5, 12), (5, 1.5, 8), (4, 1.0, 4), (10, 1.1, 11)):
        settings = variant.validate_settings(VariantSettings(rank, 8.0, extra={"initial": initial}))
        adapters = adapt(NAME, settings, perturb=False)
        for layer in adapters.layers.values():
            tensors = layer.lane_tensors("0")
            assert torch.equal(tensors["log_d"].detach(), torch.ones(expected, 1, dtype=torch.float64))
            assert tensors["A"].shape[0] == tensors["B"].shape[1] == expected
            assert not tensors["B"].any()


@pytest.mark.parametrize(("parameter", "scale"), [("log_d", 30.0), ("A", 1.0), ("B", 1.0)])
def test_log_d_has_a_higher_learning_rate(parameter: str, scale: float) -> None:
    variant = catalogue.get(NAME)
    assert variant.parameter_lr_scale(parameter, variant.validate_settings(VariantSettings())) == scale
