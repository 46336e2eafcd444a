"""SORSA against the rule of the authors' code: update, initialization and the orthonormality loss."""

from __future__ import annotations

import pytest
import torch
from rule import check_update, initial_tensors
from torch import Tensor

from variants import catalogue
from variants.api import FrozenLayer, Params, VariantSettings
from variants.initialization.sorsa import _orthonormality_gradient
from variants.testing import Case
from variants.testing.rig import LaneOptimizer, attach_lanes, model_output, perturb_lanes

RANK = 3


def change(params: Params, weight: Tensor, settings: VariantSettings, s: float) -> Tensor:
    return (params["B"] * params["S"]) @ params["A"] - params["B0"] @ params["A0"]


def test_update_is_relative_to_the_initial_product() -> None:
    check_update("sorsa", change, VariantSettings(RANK))


def test_start_has_the_largest_triplets_in_three_tensors() -> None:
    weight = torch.randn(20, 14, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    variant = catalogue.get("sorsa")
    settings = variant.validate_settings(VariantSettings(RANK))
    start = initial_tensors(variant, FrozenLayer("layer", weight, None), settings)
    a, b, s = (start.trainable[name] for name in "ABS")
    u, values, vh = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(s, values[:RANK])
    torch.testing.assert_close((b * s) @ a, (u[:, :RANK] * values[:RANK]) @ vh[:RANK])
    identity = torch.eye(RANK, dtype=torch.float64)
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
def test_a_step_adds_the_orthonormality_gradient(extra: dict[str, float], gamma: float) -> None:
    case = Case("tall", out_features=40, in_features=24, dtype=torch.float64)
    rate = 0.01
    settings = VariantSettings(RANK, extra=extra)
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
def test_the_term_has_no_gradient_while_a_and_b_are_orthonormal_up_to_rounding(
    features: int, rank: int
) -> None:
    random = torch.Generator().manual_seed(0)
    rows = torch.linalg.svd(torch.randn(rank, features, generator=random), full_matrices=False).Vh
    assert (rows @ rows.t() - torch.eye(rank)).norm() > 0
    assert not _orthonormality_gradient(rows).any()
    moved = rows + 1e-5 * torch.randn(rows.shape, generator=random).sign()
    assert abs(_orthonormality_gradient(moved).norm().item() / 2 - 1) < 0.1
