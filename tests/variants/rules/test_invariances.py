"""Exact relations between variants, which follow from Adam's step not depending on the gradient's scale.

W' = W + s B A, and G is the gradient with respect to W', so g_A = s B^T G and g_B = s G A^T. Replace s by
s k, A by a A and B by b B with a b k = 1: W' stays, g_A becomes g_A / a, and g_B becomes g_B / b. Adam with
eps 0 divides that factor out, so its direction stays. The steps of a A and b B that keep W' are then the old
steps times a and b: the rates of A and B become a and b times what they were. By induction over the steps
(weight decay and clipping are absent, and moments scale with their gradients), for every k and a:

    LoRA with s k, A0, and one rate r = LoRA+ with s, A0 / a, A's rate r / a, and `ratio` = a^2 k,

because b = 1 / (a k) and B0 = 0 has no scale. With a = 1, alpha times k is `ratio` k; with a = 1 / sqrt(k),
`ratio` is 1 and alpha is one number with the rate and the size of A0 (Schulman et al. 2025, "LoRA Without
Regret"; Hayou et al. 2024, arXiv 2402.12354).
"""

from __future__ import annotations

import math

import pytest
from rule import BIASED
from torch import Tensor

from variants import catalogue
from variants.api import VariantSettings
from variants.testing.rig import LaneOptimizer, attach_lanes, lane_outputs, relative_error, train_step

STEPS, RATE, ALPHA = 20, 0.003, 8.0


def train(name: str, settings: VariantSettings, rate: float, start: float) -> list[Tensor]:
    """Return the lane's outputs before training and after each step; `start` multiplies the initial A."""
    adapters = attach_lanes(BIASED, catalogue.get(name), 1, settings)
    for parameter, tensor in adapters.trainable("0").items():
        if parameter.endswith(".A"):
            tensor.data *= start
    optimizer = LaneOptimizer(adapters, "0", rate, STEPS)
    for group in optimizer.optimizer.param_groups:
        # So small that it changes no sum. At 0 the first step of A would be 0 / 0, because B is 0.
        group.update(eps=1e-200, weight_decay=0.0)
    outputs = [lane_outputs(BIASED, adapters)]
    for _ in range(STEPS):
        train_step(BIASED, adapters, {"0": optimizer})
        outputs.append(lane_outputs(BIASED, adapters))
    return outputs


def lora(k: float) -> list[Tensor]:
    return train("lora", VariantSettings(4, ALPHA * k), RATE, 1.0)


def lora_plus(ratio: float, a: float) -> list[Tensor]:
    return train("lora_plus", VariantSettings(4, ALPHA, extra={"ratio": ratio}), RATE / a, 1 / a)


def largest_error(left: list[Tensor], right: list[Tensor]) -> float:
    return max(relative_error(mine, other) for mine, other in zip(left, right, strict=True))


@pytest.mark.parametrize("k", [1 / 16, 0.3, 2.0, 16.0])
@pytest.mark.parametrize("a", ["1", "1 / sqrt(k)", "3"])
def test_alpha_times_k_is_a_ratio_of_rates(k: float, a: str) -> None:
    factor = {"1": 1.0, "1 / sqrt(k)": 1 / math.sqrt(k), "3": 3.0}[a]
    outputs = lora(k)
    assert relative_error(outputs[-1], outputs[0]) > 0.01
    assert largest_error(lora_plus(factor**2 * k, factor), outputs) < 1e-13


@pytest.mark.parametrize("ratio", [1 / 4, 16.0])
def test_a_ratio_of_rates_is_alpha_times_k(ratio: float) -> None:
    """The same relation from the other side: LoRA+ as it is, and the LoRA that equals it."""
    expected = train("lora_plus", VariantSettings(4, ALPHA, extra={"ratio": ratio}), RATE, 1.0)
    assert largest_error(lora(ratio), expected) < 1e-13


@pytest.mark.parametrize(("ratio", "a"), [(4 * 1.01, 1.0), (4.0, 1.01), (1.0, 1.0), (4 * 0.5, 0.5)])
def test_another_ratio_or_start_is_another_function(ratio: float, a: float) -> None:
    assert largest_error(lora_plus(ratio, a), lora(4.0)) > 1e-4
