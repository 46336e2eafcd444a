"""LoRA-SB against the rule of the authors' code, computed in float64."""

from __future__ import annotations

import torch
from rule import check_update, initial_tensors

from variants import catalogue
from variants.api import FrozenLayer, VariantSettings

RANK, STEP_SIZE = 4, 0.01


def test_update_has_a_trainable_matrix_and_no_scale() -> None:
    check_update(
        "lora_sb",
        lambda params, weight, settings, s: params["B"] @ params["R"] @ params["A"],
        VariantSettings(3),
    )


def test_start_is_the_best_approximation_of_a_sign_step() -> None:
    noise = torch.Generator().manual_seed(0)
    # Sides of more than RANK + 10, so that the randomized SVD is not exact without its iterations.
    left, right = (torch.randn(side, RANK, generator=noise, dtype=torch.float64) for side in (60, 50))
    gradient = left @ right.t() + 0.1 * torch.randn(60, 50, generator=noise, dtype=torch.float64)
    weight = torch.randn(60, 50, generator=noise, dtype=torch.float64)
    variant = catalogue.get("lora_sb")
    settings = variant.validate_settings(VariantSettings(RANK, extra={"step_size": STEP_SIZE}))
    found = variant.reduce_calibration(FrozenLayer("layer", weight, None).with_settings(settings), gradient)
    start = initial_tensors(variant, FrozenLayer("layer", weight, None, calibration=found), settings)
    a, b, r = start.frozen["A"], start.frozen["B"], start.trainable["R"]
    u, s, vh = torch.linalg.svd(-STEP_SIZE * gradient.sign())
    torch.testing.assert_close(b @ r @ a, (u[:, :RANK] * s[:RANK]) @ vh[:RANK], rtol=1e-5, atol=1e-8)
    identity = torch.eye(RANK, dtype=torch.float64)
    torch.testing.assert_close(a @ a.t(), identity)
    torch.testing.assert_close(b.t() @ b, identity)
    assert torch.equal(r, r.diagonal().diag())
    # The published study's code starts from W + B diag(S) A of the gradient itself.
    assert (gradient * (b @ r @ a)).sum() < 0
