"""Update rules of the variants that choose ranks while they train."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from rule import BIASED, TALL, adapt, check_output, check_update, record_step, start_of
from torch import Tensor

from variants import catalogue
from variants.adapters import Adapters, init_layers
from variants.api import FrozenLayer, Params, VariantSettings
from variants.rank.salora import _gate
from variants.storage import load_lane, save_lane
from variants.testing.rig import LaneOptimizer, attach_lanes, model_output, perturb_lanes, train_step

# GoRA: ranks by importance, and the initial update as a projected step of gradient descent.


SHAPES = {"a": (40, 24), "b": (24, 40), "c": (32, 32), "d": (64, 16)}
GORA = catalogue.get("gora")


def make_layers(settings: VariantSettings) -> tuple[dict[str, FrozenLayer], dict[str, Tensor]]:
    """Return layers with calibration, and their gradients, which differ in size by a factor of 8."""
    noise = torch.Generator().manual_seed(5)
    layers, gradients = {}, {}
    for number, (name, shape) in enumerate(SHAPES.items()):
        weight = torch.randn(shape, generator=noise, dtype=torch.float64)
        gradients[name] = 2**number * torch.randn(shape, generator=noise, dtype=torch.float64)
        bare = FrozenLayer(name, weight, None)
        calibration = GORA.reduce_calibration(bare.with_settings(settings), gradients[name])
        layers[name] = FrozenLayer(name, weight, None, settings=settings, calibration=calibration)
    return layers, gradients


def test_gora_the_update_divides_by_the_root_of_each_layers_rank() -> None:
    def change(p, weight, settings, s):  # type: ignore[no-untyped-def]
        rank = int(p["mask"].sum())
        return s * math.sqrt(settings.rank / rank) * p["B"][:, :rank] @ p["A"][:rank]

    check_update("gora", change)


@pytest.mark.parametrize(("rank", "extra"), [(4, {}), (2, {"smallest": 1.0, "largest": 2.0})])
def test_gora_ranks_are_proportional_to_importance_within_their_bounds(
    rank: int, extra: dict[str, float]
) -> None:
    settings = GORA.validate_settings(VariantSettings(rank, 8.0, extra=extra))
    layers, gradients = make_layers(settings)
    initial = init_layers(GORA, layers, seed=0)
    importance = {n: float((layers[n].weight * g).abs().mean()) for n, g in gradients.items()}
    budget = rank * sum(math.sqrt(sum(shape)) for shape in SHAPES.values())
    low, high = rank * extra.get("smallest", 0.5), rank * extra.get("largest", 4.0)
    found, unbounded = {}, {}
    for name, tensors in initial.items():
        found[name] = int(tensors.frozen["mask"].sum())
        share = importance[name] / sum(importance.values())
        unbounded[name] = budget * share / math.sqrt(sum(SHAPES[name]))
        assert found[name] == max(low, min(high, round(unbounded[name])))
        assert not tensors.trainable["B"][:, found[name] :].any()
    assert min(unbounded.values()) < low
    assert len(set(found.values())) > 1


def test_gora_the_initial_update_is_a_projected_step_of_gradient_descent() -> None:
    """The published code adds the gradient; here the first-order change of the loss is negative."""
    settings = GORA.validate_settings(VariantSettings(4, 8.0))
    layers, gradients = make_layers(settings)
    initial = init_layers(GORA, layers, seed=0)
    for name, tensors in initial.items():
        rank = int(tensors.frozen["mask"].sum())
        a, b = tensors.trainable["A"][:rank], tensors.trainable["B"][:, :rank]
        in_features = SHAPES[name][1]
        assert a.abs().max() <= 1 / math.sqrt(in_features)
        assert a.std().item() == pytest.approx(1 / math.sqrt(3 * in_features), rel=0.2)
        change = 8.0 / math.sqrt(rank) * b @ a
        projected = gradients[name] @ torch.linalg.pinv(a) @ a
        torch.testing.assert_close(change, -0.05 * math.sqrt(in_features / rank) * projected)
        assert (change * gradients[name]).sum() < 0
        assert 0.03 < (change.norm() / gradients[name].norm()).item() < 0.08


# IncreLoRA: importance, rounds, reserves, loss and the steps of added triplets, followed in float64.


EXTRA = {"top": 0.5, "growth": 0.5, "warmup": 0.1, "orthogonality": 0.0}
SETTINGS, INCRE_LORA_STEPS, RATE = VariantSettings(3, 6.0, extra=EXTRA), 40, 0.01


def test_incre_lora_the_update_divides_by_the_present_rank() -> None:
    def change(p, weight, settings, s):  # type: ignore[no-untyped-def]
        rank, live = int(p["mask"].sum()), int(p["live"].sum())
        product = p["B"][:, :live] @ torch.diag(p["E"][:live, 0]) @ p["A"][:live]
        return s * settings.rank / (rank + 1e-5) * product

    check_update("incre_lora", change, SETTINGS)


def test_incre_lora_a_and_b_start_with_a_deviation_of_0_02() -> None:
    initial = start_of("incre_lora", torch.zeros(200, 300), VariantSettings(8, 16.0))
    assert not initial.trainable["E"].any()
    assert initial.frozen["mask"].sum() == 1
    for name in "AB":
        assert abs(initial.trainable[name].std().item() / 0.02 - 1) < 0.03
        kurtosis = (initial.trainable[name] / 0.02).pow(4).mean().item()
        assert abs(kurtosis - 3) < 0.3  # a uniform distribution has 1.8


def test_incre_lora_the_loss_takes_all_triplets_of_a_layer_as_one_matrix() -> None:
    """The loss is that of `compute_svd_orth_regu` in the authors' trainer, with the reserve."""
    settings = VariantSettings(3, 6.0, extra={**EXTRA, "orthogonality": 0.7})
    adapters = attach_lanes(TALL, catalogue.get("incre_lora"), 1, settings)
    optimizer, lane = LaneOptimizer(adapters, "0", RATE, INCRE_LORA_STEPS), adapters.lane_settings("0")
    counts = set()
    for _ in range(18):
        for name, layer in adapters.layers.items():
            tensors = {key: tensor.detach().clone() for key, tensor in layer.lane_tensors("0").items()}
            live = adapters.ranks_in_use("0")[name] + (optimizer.steps_taken > 0)
            counts.add(live)
            norms = []
            for wide in (tensors["A"][:live], tensors["B"][:, :live].T):
                norms.append(torch.linalg.matrix_norm(wide @ wide.T - torch.eye(live, dtype=torch.float64)))
            params = {key: tensor.unsqueeze(0).requires_grad_() for key, tensor in tensors.items()}
            x = torch.zeros(1, 1, 1, layer.frozen_layer.shape[1], dtype=torch.float64)
            loss = adapters.variant.auxiliary_loss(
                x, x[..., 0], params, layer.frozen_layer.with_settings(lane)
            )
            torch.testing.assert_close(loss, 0.7 * torch.stack(norms).mean().view(1), msg=name)
            loss.sum().backward()
            assert params["A"].grad is not None
            assert not params["A"].grad[0, live:].any()
        record_step(TALL, adapters, optimizer)
    assert counts >= {1, 2, 3}


def test_incre_lora_the_rounds_are_those_of_the_authors_script() -> None:
    """At each step the rank is increased if `RankAllocator.update_and_increase` would do so."""
    variant, total_rank = catalogue.get("incre_lora"), 72
    settings = variant.validate_settings(VariantSettings(8, 16.0, extra={"growth": 29000 / 85904}))
    for step in range(31000):
        if total_rank < 72 * 8 and step > 1000 and step % 1000 == 0:
            total_rank += min(18, 72 * 8 - total_rank)
        assert variant.rank_budget(72, settings, step, 85904) == total_rank
    default = catalogue.get("incre_lora").validate_settings(VariantSettings(8, 16.0))
    assert abs(float(default["growth"]) - 29000 / 85904) < 0.005


def test_incre_lora_the_most_important_layers_gain_triplets_in_each_round() -> None:
    """Of 4 layers, 2 gain a triplet in each of 4 rounds, in the step after 8, 12, 16 and 20 of 40 steps."""
    adapters = attach_lanes(TALL, catalogue.get("incre_lora"), 1, SETTINGS)
    optimizer = LaneOptimizer(adapters, "0", RATE, INCRE_LORA_STEPS)
    names = list(adapters.layers)
    importance, uncertainty = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    for step in range(1, INCRE_LORA_STEPS + 1):
        ranks = adapters.ranks_in_use("0")
        before, gradients = record_step(TALL, adapters, optimizer)
        for name, layer in adapters.layers.items():
            used = slice(0, ranks[name])
            products = (before[f"{name}.E"] * gradients[f"{name}.E"])[used].abs().sum()
            now = float(products) / math.sqrt(math.prod(layer.frozen_layer.shape))
            importance[name] = 0.85 * importance[name] + 0.15 * now
            uncertainty[name] = 0.85 * uncertainty[name] + 0.15 * abs(now - importance[name])
        scores = {name: importance[name] * uncertainty[name] for name in names}
        gaining = (
            sorted(names, key=lambda name: scores[name], reverse=True)[:2] if step in (9, 13, 17, 21) else []
        )
        expected = {name: ranks[name] + (name in gaining) for name in names}
        assert adapters.ranks_in_use("0") == expected, f"step {step}"
        assert adapters.variant.rank_budget(4, adapters.settings, step - 1, INCRE_LORA_STEPS) == sum(
            expected.values()
        )
        for name, rank in expected.items():
            e = adapters.trainable("0")[f"{name}.E"].detach()[:, 0]
            assert not e[rank + 1 :].any()
            assert e[rank].item() == (1e-5 if step < 21 else 0.0)
            assert not gradients[f"{name}.E"][ranks[name] :].any()  # so that clipping does not contain it
            assert step in (9, 13, 17, 21) or e[:rank].abs().min() > 1e-5
    assert sum(adapters.ranks_in_use("0").values()) == 12


def follow_adam(gradients: list[Tensor], start: Tensor, warmup: int, decay: float) -> Tensor:
    """Return a value after AdamW's steps from its first one, with a linear warm-up of the update."""
    value, first, second = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    for step, gradient in enumerate(gradients, 1):
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        update = first / (1 - 0.9**step) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        value = value - RATE * min(1, step / warmup) * (update + decay * value)
    return value


def test_incre_lora_added_triplets_take_steps_of_an_adam_of_their_own() -> None:
    """A and B of a reserve count from when it became one, and its E from when it came into use."""
    adapters = attach_lanes(TALL, catalogue.get("incre_lora"), 1, SETTINGS)
    optimizer = LaneOptimizer(adapters, "0", RATE, INCRE_LORA_STEPS)
    history = []
    for step in range(1, 15):
        values, gradients = record_step(TALL, adapters, optimizer)
        history.append((values, gradients))
        if step == 9:
            name = max(adapters.ranks_in_use("0"), key=lambda n: adapters.ranks_in_use("0")[n])
            a, e = (adapters.trainable("0")[f"{name}.{key}"].detach().clone() for key in "AE")
    a_start = history[0][0][f"{name}.A"][1]
    a_gradients = [gradients[f"{name}.A"][1] for _, gradients in history[1:9]]
    expected = follow_adam(a_gradients, a_start, 4, 0.01)
    assert e[1].item() == 1e-5
    torch.testing.assert_close(a[1], expected, rtol=1e-4, atol=1e-7)
    e_gradients = [gradients[f"{name}.E"][1] for _, gradients in history[9:13]]
    expected = follow_adam(e_gradients, torch.full((1,), 1e-5, dtype=torch.float64), 4, 0.01)
    torch.testing.assert_close(history[13][0][f"{name}.E"][1], expected, rtol=1e-4, atol=1e-7)


# SaLoRA: gates for given noise, the probability of an open gate, both penalties, and the draws of noise.


NAME = "salora"
TAU, GAMMA, ZETA = 1.0, -0.1, 1.1
SALORA_STEPS = 20


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


def test_salora_training_uses_the_gates_of_the_stored_noise() -> None:
    def update(x, params, weight, settings, s):  # type: ignore[no-untyped-def]
        return x @ change(params, torch.sigmoid(params["noise"]), s).T

    adapters = check_output(NAME, update, VariantSettings(4, 8.0))
    noise = [layer.lane_tensors("0")["noise"] for layer in adapters.layers.values()]
    assert all(each.shape == (6, 1) for each in noise)


def test_salora_evaluation_and_the_merged_weight_use_the_median_gates() -> None:
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


def test_salora_ranks_in_use_are_those_whose_median_gate_is_open() -> None:
    adapters = adapt(NAME, VariantSettings(4, 8.0))
    spread_gates(adapters)  # -3, -1.6, -0.2, 1.2, 2.6, 4; a gate opens above -log(11) = -2.398
    assert set(adapters.ranks_in_use("0").values()) == {5}
    assert adapters.variant.rank_budget(4, adapters.settings, 0, SALORA_STEPS) is None


def test_salora_the_probability_of_an_open_gate_is_equation_48() -> None:
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
    target = 1 + (settings.rank / len(gates[0]) - 1) * min(1, step / (0.5 * SALORA_STEPS))
    total = extra["budget"] * (share - target) ** 2
    for name, parameter in parameters.items():
        if name.endswith((".A", ".B")):
            gram = parameter @ parameter.T if name.endswith(".A") else parameter.T @ parameter
            error = gram - torch.eye(len(gram), dtype=gram.dtype)
            total = total + extra["orthogonality"] * torch.sum(error**2)
    return total


def backward(adapters: Adapters, step: int) -> None:
    with adapters.activate_lanes(["0"], step):
        TALL.loss(model_output(adapters.model, TALL.rows(0, step)), TALL.rows(0, step)).backward()


def test_salora_a_step_adds_the_gradients_of_both_penalties() -> None:
    settings = VariantSettings(4, 8.0, extra={"budget": 7.0, "orthogonality": 0.3, "warmup": 0.5})
    adapters = attach_lanes(TALL, catalogue.get(NAME), 1, settings)
    perturb_lanes(TALL, adapters)
    mine, optimizer = adapters.trainable("0"), LaneOptimizer(adapters, "0", 0.01, SALORA_STEPS)
    for step in range(SALORA_STEPS):
        optimizer.zero_grad()
        backward(adapters, step)
        task = {name: parameter.grad.clone() for name, parameter in mine.items()}
        copies = {name: value.detach().clone().requires_grad_() for name, value in mine.items()}
        penalties(copies, adapters.lane_settings("0"), step).backward()
        optimizer.step()
        for name, copy in copies.items():
            assert copy.grad is not None
            torch.testing.assert_close(mine[name].grad, task[name] + copy.grad, rtol=1e-9, atol=1e-12)


def test_salora_a_large_weight_of_the_budget_term_shuts_gates_until_the_budget_is_met() -> None:
    settings = VariantSettings(4, 8.0, extra={"gate_lr": 30.0, "budget": 100.0})
    adapters = attach_lanes(TALL, catalogue.get(NAME), 1, settings)
    optimizer = {"0": LaneOptimizer(adapters, "0", 0.003, 300)}
    for _ in range(300):
        train_step(TALL, adapters, optimizer)
    log_d = torch.cat([p.detach() for n, p in adapters.trainable("0").items() if n.endswith(".log_d")])
    assert abs(float(open_probability(log_d).sum()) - 4 * 4) < 0.1
    ranks = adapters.ranks_in_use("0").values()
    assert abs(sum(ranks) - 4 * 4) <= 2
    assert min(ranks) < 4 < max(ranks)


def test_salora_the_noise_is_uniform_before_the_logit_and_new_in_each_step_layer_and_lane() -> None:
    adapters = attach_lanes(TALL, catalogue.get(NAME), 2, VariantSettings(20, 8.0))
    optimizers = {lane: LaneOptimizer(adapters, lane, 0.01, SALORA_STEPS) for lane in adapters.lanes}
    drawn = []
    for _ in range(SALORA_STEPS):
        drawn += [
            t.clone() for lane in "01" for n, t in adapters.frozen(lane).items() if n.endswith(".noise")
        ]
        train_step(TALL, adapters, optimizers)
    noise = torch.cat(drawn)
    assert len(drawn) == 2 * 4 * SALORA_STEPS
    assert len(noise) == 30 * len(drawn)
    assert len(noise.unique()) > 0.999 * len(noise)
    u = noise.sigmoid().flatten().sort().values
    uniform = (torch.arange(len(u)) + 0.5) / len(u)
    assert (u - uniform).abs().max() < 1.63 / math.sqrt(len(u))  # Kolmogorov and Smirnov's test at 1 %


def test_salora_a_restored_lane_draws_the_noise_of_one_that_went_on(tmp_path: Path) -> None:
    """The noise of the next step is in the saved lane, and later draws depend on the seed and the step."""
    adapters = attach_lanes(TALL, catalogue.get(NAME), 1)
    optimizer = LaneOptimizer(adapters, "0", 0.0, SALORA_STEPS)
    for step in range(3):
        backward(adapters, step)
        optimizer.step()
    save_lane(adapters, "0", tmp_path / "lane.safetensors")
    restored = attach_lanes(TALL, catalogue.get(NAME), 0)
    load_lane(restored, "0", tmp_path / "lane.safetensors")
    again = LaneOptimizer(restored, "0", 0.0, SALORA_STEPS)
    again.steps_taken = 3
    for step in range(3, 6):
        for name, tensor in adapters.frozen("0").items():
            assert torch.equal(restored.frozen("0")[name], tensor), f"{name} in step {step}"
        for each, own in ((adapters, optimizer), (restored, again)):
            backward(each, step)
            own.step()


def test_salora_the_start_has_log_d_of_one_and_more_ranks_than_the_budget() -> None:
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
def test_salora_log_d_has_a_higher_learning_rate(parameter: str, scale: float) -> None:
    variant = catalogue.get(NAME)
    assert variant.parameter_lr_scale(parameter, variant.validate_settings(VariantSettings())) == scale


# AdaLoRA: the budget of its ranks, its averages and its loss; tests/contract compares its steps with PEFT's.


def test_adalora_the_ranks_follow_the_budget() -> None:
    """Of 4 layers with 6 triplets each, 16 triplets are kept. t_i is 3 and T - t_f is 17 of 40 steps."""
    adapters = attach_lanes(BIASED, catalogue.get("adalora"), 2)
    optimizers = {lane: LaneOptimizer(adapters, lane, 0.01, 40) for lane in adapters.lanes}
    for step in range(1, 41):
        train_step(BIASED, adapters, optimizers)
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


def test_adalora_the_averages_stay_where_a_layer_has_no_gradient() -> None:
    adapters = attach_lanes(BIASED, catalogue.get("adalora"), 1)
    optimizer = LaneOptimizer(adapters, "0", 0.01, 40)
    train_step(BIASED, adapters, {"0": optimizer})
    before = {name: tensor.clone() for name, tensor in adapters.frozen("0").items()}
    for name, parameter in adapters.trainable("0").items():
        if name.startswith("there.1."):
            parameter.grad = None
    adapters.after_step("0", 2, 40, optimizer.optimizer)
    after = adapters.frozen("0")
    changed = {name.rpartition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {*adapters.layers} - {"there.1"}


def test_adalora_the_gradient_of_the_loss_equals_a_numerical_one() -> None:
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
