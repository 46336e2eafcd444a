"""LoRA-FA: A is frozen, and the optimizer's gradient of B gives the projected full-size gradient."""

from __future__ import annotations

import torch
from recorded_step import record_step
from rule import check_update

from variants import catalogue
from variants.testing.cases import Case
from variants.testing.rig import LaneOptimizer, attach_lanes

CASE = Case("tall", out_features=40, in_features=24, dtype=torch.float64)


def test_the_update_is_that_of_lora() -> None:
    check_update("lora_fa", lambda p, weight, settings, s: s * p["B"] @ p["A"])


def test_only_b_is_trained() -> None:
    adapters = attach_lanes(CASE, catalogue.get("lora_fa"), 1)
    assert {name.rpartition(".")[2] for name in adapters.trainable("0")} == {"B"}
    assert adapters.parameter_count("0") == 4 * sum(
        layer.frozen_layer.shape[0] for layer in adapters.layers.values()
    )


def test_a_step_of_gradient_descent_projects_the_full_gradient() -> None:
    """s times the optimizer's gradient times A is G A^T (A A^T)^-1 A, with s G A^T = the gradient of B."""
    adapters = attach_lanes(CASE, catalogue.get("lora_fa"), 1)
    optimizer, scaling = LaneOptimizer(adapters, "0", 0.01, 3), 2.0
    for _ in range(3):
        _, gradients = record_step(CASE, adapters, optimizer)
        for layer in adapters.layers:
            a = adapters.frozen("0")[f"{layer}.A"]
            used = adapters.trainable("0")[f"{layer}.B"].grad
            assert used is not None
            projector = torch.linalg.pinv(a) @ a
            full = gradients[f"{layer}.B"] / scaling @ torch.linalg.pinv(a).T  # G, up to its part beside A
            difference = scaling * used @ a - full @ projector
            assert difference.norm() < 1e-6 * full.norm()  # the damping of 1e-8 is relative to about 0.3
