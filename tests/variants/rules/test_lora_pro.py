"""LoRA-Pro: the adjusted gradients and the optimizer step, computed with generic solvers in float64."""

from __future__ import annotations

import pytest
import torch
from recorded_step import record_step
from rule import check_update
from torch import Tensor

from variants import catalogue
from variants.api import VariantSettings
from variants.optimization.lora_pro import _projected_pair, _solve_sylvester
from variants.testing.cases import Case
from variants.testing.rig import LaneOptimizer, attach_lanes

BETAS, EPSILON, DECAY, RATE, SCALING = (0.9, 0.999), 1e-8, 0.01, 0.001, 2.0


def test_the_update_is_that_of_lora() -> None:
    check_update("lora_pro", lambda p, weight, settings, s: s * p["B"] @ p["A"])


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


def test_steps_follow_adam_on_the_full_size_gradient() -> None:
    case = Case("tall", out_features=40, in_features=24, dtype=torch.float64)
    adapters = attach_lanes(case, catalogue.get("lora_pro"), 1)
    optimizer = LaneOptimizer(adapters, "0", RATE, 6)
    moments: dict[str, tuple[Tensor, Tensor]] = {}
    for step in range(1, 7):
        before, gradients = record_step(case, adapters, optimizer)
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


def test_the_product_is_the_closest_one_to_the_full_gradient() -> None:
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
def test_steps_stay_finite_from_b_zero(dtype: torch.dtype) -> None:
    """With B = 0, and B^T B far below 1 in the next steps, the inverses are ill-conditioned."""
    case = Case("wide", out_features=24, in_features=40, dtype=dtype)
    adapters = attach_lanes(case, catalogue.get("lora_pro"), 1, VariantSettings(8, 16.0))
    optimizer = LaneOptimizer(adapters, "0", RATE, 20)
    for _ in range(20):
        record_step(case, adapters, optimizer)
        for parameter in adapters.trainable("0").values():
            assert parameter.detach().abs().max() < 1
