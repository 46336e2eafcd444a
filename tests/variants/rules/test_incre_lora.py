"""IncreLoRA: importance, rounds, reserves, loss and the steps of added triplets, followed in float64."""

from __future__ import annotations

import math

import pytest
import torch
from recorded_step import record_step
from rule import check_update, initial_tensors
from torch import Tensor

from variants import catalogue
from variants.api import FrozenLayer, UnsupportedError, VariantSettings
from variants.testing.cases import Case
from variants.testing.rig import LaneOptimizer, attach_lanes

CASE = Case("tall", out_features=40, in_features=24, dtype=torch.float64)
EXTRA = {"top": 0.5, "growth": 0.5, "warmup": 0.1, "orthogonality": 0.0}
SETTINGS, STEPS, RATE = VariantSettings(3, 6.0, extra=EXTRA), 40, 0.01


def test_the_update_divides_by_the_present_rank() -> None:
    def change(p, weight, settings, s):  # type: ignore[no-untyped-def]
        rank, live = int(p["mask"].sum()), int(p["live"].sum())
        product = p["B"][:, :live] @ torch.diag(p["E"][:live, 0]) @ p["A"][:live]
        return s * settings.rank / (rank + 1e-5) * product

    check_update("incre_lora", change, SETTINGS)


def test_a_and_b_start_with_a_deviation_of_0_02() -> None:
    variant, layer = catalogue.get("incre_lora"), FrozenLayer("layer", torch.zeros(200, 300), None)
    initial = initial_tensors(variant, layer, variant.validate_settings(VariantSettings(8, 16.0)))
    assert not initial.trainable["E"].any()
    assert initial.frozen["mask"].sum() == 1
    for name in "AB":
        assert abs(initial.trainable[name].std().item() / 0.02 - 1) < 0.03
        kurtosis = (initial.trainable[name] / 0.02).pow(4).mean().item()
        assert abs(kurtosis - 3) < 0.3  # a uniform distribution has 1.8


def test_the_loss_takes_all_triplets_of_a_layer_as_one_matrix() -> None:
    """The loss is that of `compute_svd_orth_regu` in the authors' trainer, with the reserve."""
    settings = VariantSettings(3, 6.0, extra={**EXTRA, "orthogonality": 0.7})
    adapters = attach_lanes(CASE, catalogue.get("incre_lora"), 1, settings)
    optimizer, lane = LaneOptimizer(adapters, "0", RATE, STEPS), adapters.lane_settings("0")
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
        record_step(CASE, adapters, optimizer)
    assert counts >= {1, 2, 3}


def test_the_rounds_are_those_of_the_authors_script() -> None:
    """At each step the rank is increased if `RankAllocator.update_and_increase` would do so."""
    variant, total_rank = catalogue.get("incre_lora"), 72
    settings = variant.validate_settings(VariantSettings(8, 16.0, extra={"growth": 29000 / 85904}))
    for step in range(31000):
        if total_rank < 72 * 8 and step > 1000 and step % 1000 == 0:
            total_rank += min(18, 72 * 8 - total_rank)
        assert variant.rank_budget(72, settings, step, 85904) == total_rank
    default = catalogue.get("incre_lora").validate_settings(VariantSettings(8, 16.0))
    assert abs(float(default["growth"]) - 29000 / 85904) < 0.005


def test_the_most_important_layers_gain_triplets_in_each_round() -> None:
    """Of 4 layers, 2 gain a triplet in each of 4 rounds, in the step after 8, 12, 16 and 20 of 40 steps."""
    adapters = attach_lanes(CASE, catalogue.get("incre_lora"), 1, SETTINGS)
    optimizer = LaneOptimizer(adapters, "0", RATE, STEPS)
    names = list(adapters.layers)
    importance, uncertainty = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    for step in range(1, STEPS + 1):
        ranks = adapters.ranks_in_use("0")
        before, gradients = record_step(CASE, adapters, optimizer)
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
        assert adapters.variant.rank_budget(4, adapters.settings, step - 1, STEPS) == sum(expected.values())
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


def test_added_triplets_take_steps_of_an_adam_of_their_own() -> None:
    """A and B of a reserve count from when it became one, and its E from when it came into use."""
    adapters = attach_lanes(CASE, catalogue.get("incre_lora"), 1, SETTINGS)
    optimizer = LaneOptimizer(adapters, "0", RATE, STEPS)
    history = []
    for step in range(1, 15):
        values, gradients = record_step(CASE, adapters, optimizer)
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


def test_the_initial_rank_must_not_exceed_the_rank() -> None:
    with pytest.raises(UnsupportedError, match="initial 5"):
        catalogue.get("incre_lora").validate_settings(VariantSettings(4, 8.0, extra={"initial": 5}))
