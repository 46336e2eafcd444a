"""AuroRA's nonlinear layer, with splines in closed form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from rule import adapt, check_output, initial_tensors
from scipy.interpolate import BSpline
from torch import Tensor

from variants import catalogue
from variants.api import FrozenLayer, MergeError, Params, VariantSettings
from variants.merging import merge_and_detach
from variants.optimization.aurora import spline_basis

VARIANT = catalogue.get("aurora")


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


def test_the_update_is_the_papers_equation() -> None:
    check_output("aurora", update, settings=VariantSettings(4, 8.0))


@pytest.mark.parametrize(("intervals", "degree"), [(5, 3), (5, 1), (3, 2), (8, 4), (1, 1), (1, 3)])
def test_the_splines_are_those_of_scipy(intervals: int, degree: int) -> None:
    z = np.linspace(-2.7, 2.7, 997)
    knots = np.arange(-degree, intervals + degree + 1) * 2 / intervals - 1
    expected = [
        np.nan_to_num(BSpline.basis_element(knots[i : i + degree + 2], extrapolate=False)(z))
        for i in range(intervals + degree)
    ]
    found = spline_basis(torch.from_numpy(z), intervals, degree)
    torch.testing.assert_close(found, torch.from_numpy(np.stack(expected, axis=1)), rtol=0, atol=1e-12)


def test_entries_far_outside_the_grid_have_no_spline() -> None:
    x = torch.full((1, 3, 6), 10.0, dtype=torch.float64)
    eye = torch.eye(6, dtype=torch.float64).unsqueeze(0)
    params = {"A": eye, "B": eye, "H": torch.zeros_like(eye), "C": torch.ones(1, 6, 8).double()}
    layer, one = FrozenLayer("layer", torch.zeros(6, 6).double(), None), torch.ones(1, 1, 1).double()
    settings = VARIANT.validate_settings(VariantSettings(6, 6.0))
    prepared = VARIANT.prepare(params, layer.with_settings(settings, one))
    assert not VARIANT.forward(x, torch.zeros_like(x), prepared, layer.with_settings(settings, one)).any()
    inside = VARIANT.forward(x / 100, torch.zeros_like(x), prepared, layer.with_settings(settings, one))
    torch.testing.assert_close(inside, torch.full_like(x, 6.0))  # the splines of an entry sum to 1


def test_the_nonlinear_layer_starts_as_in_the_studys_code() -> None:
    layer, settings = FrozenLayer("layer", torch.zeros(20, 30), None), VariantSettings(16, 16.0)
    settings = VARIANT.validate_settings(settings)
    starts = [initial_tensors(VARIANT, layer, settings, seed=seed) for seed in range(40)]
    h = torch.stack([start.trainable["H"] for start in starts])
    c = torch.stack([start.trainable["C"] for start in starts])
    torch.testing.assert_close(h.std(), torch.tensor(0.25), rtol=0.05, atol=0)
    assert h.abs().max() > 0.6  # a normal distribution and not a uniform one
    assert c.shape == (40, 16, 8)
    assert 0.099 < c.abs().max() < 0.1
    assert not any(start.trainable["B"].any() for start in starts)


def test_merging_is_refused() -> None:
    """The paper and the published study's code merge B f(A), which is another function than B f(A x)."""
    adapters = adapt("aurora", VariantSettings(4, 8.0))
    with pytest.raises(MergeError, match="aurora cannot be merged"):
        merge_and_detach(adapters, "0")
