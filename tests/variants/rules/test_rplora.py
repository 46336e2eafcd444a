"""RPLoRA: the preconditioned gradients reach the optimizer."""

from __future__ import annotations

import torch
from recorded_step import record_step
from rule import check_update

from variants import catalogue
from variants.api import VariantSettings
from variants.testing.cases import Case
from variants.testing.rig import LaneOptimizer, attach_lanes


def test_the_update_is_that_of_lora() -> None:
    check_update("rplora", lambda p, weight, settings, s: s * p["B"] @ p["A"])


def test_gradients_are_preconditioned() -> None:
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


def test_a_singular_matrix_makes_the_lane_diverge() -> None:
    """An error would end all lanes of the group."""
    case = Case("wide", out_features=24, in_features=40, dtype=torch.float32)
    settings = VariantSettings(4, 8.0, extra={"delta": 1e-12})
    adapters = attach_lanes(case, catalogue.get("rplora"), 1, settings)
    for name, parameter in adapters.trainable("0").items():
        if name.endswith(".B"):
            parameter.detach().fill_(1)
    record_step(case, adapters, LaneOptimizer(adapters, "0", 0.01, 3))
    assert not all(parameter.isfinite().all() for parameter in adapters.trainable("0").values())
