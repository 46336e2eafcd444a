"""Synthetic studies with known truth, for the benchmark of coverage. All scores are in points (0.01)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Noise = Literal["equal", "unequal", "heavy tails", "near ceiling"]
NOISES: tuple[Noise, ...] = ("equal", "unequal", "heavy tails", "near ceiling")
FLOOR = -50.0
"""The score of a collapsed run, relative to the best one."""


def score_noise(noise: Noise, shape: tuple[int, int, int], generator: np.random.Generator) -> Floats:
    """Return the noise of scores with mean 0; the first column is the baseline.

    Args:
        noise: "equal": normal with standard deviation 1. "unequal": the same, but one variant's is 2 and two
            variants' are 3. "heavy tails": t with 3 degrees of freedom. "near ceiling": the distance below
            the ceiling is exponential, so that most scores lie near it and some far below.
        shape: (studies, replicates, variants with the baseline).
        generator: The source of random numbers.
    """
    if noise == "heavy tails":
        return generator.standard_t(3, shape)
    if noise == "near ceiling":
        return 1 - generator.exponential(1.0, shape)
    values = generator.standard_normal(shape)
    if noise == "unequal":
        values[:, :, 1] *= 2
        values[:, :, 2:4] *= 3
    return values


def from_baseline(scores: Floats) -> Floats:
    """Return the differences from the first column, shape (..., replicates, K)."""
    return scores[..., 1:] - scores[..., :1]


def tuned_scores(
    studies: int, replicates: int, variants: int, rates_per_decade: int, generator: np.random.Generator
) -> Floats:
    """Return the test scores of replicated tuning, for variants that are equal when tuned.

    Every variant has a best rate of its own and loses 30 points a decade away from it. Above the best rate
    stands a cliff: a growing share of the runs collapses. A run has noise of 0.7 points that validation and
    test score share, and 0.5 points of either one alone. The grid spans three decades; every replicate has
    its own random offset, the same for all variants.

    Returns:
        Shape (studies, replicates, variants).
    """
    spacing = 1 / rates_per_decade
    grid = np.arange(0.0, 3.0, spacing)
    best = generator.uniform(1.0, 2.0, (studies, 1, variants, 1))
    offset = generator.uniform(0.0, spacing, (studies, replicates, 1, 1))
    distance = grid + offset - best
    shape = distance.shape
    collapsed = generator.random(shape) < 1 / (1 + np.exp(-(distance - 0.7) / 0.08))
    score = np.where(collapsed, FLOOR, -30 * distance**2 + 0.7 * generator.standard_normal(shape))
    validation, test = (score + 0.5 * generator.standard_normal(shape) for _ in range(2))
    return np.take_along_axis(test, validation.argmax(axis=3)[..., None], axis=3)[..., 0]


def item_scores(
    items_per_question: int, questions: int, replicates: int, variants: int, generator: np.random.Generator
) -> Floats:
    """Return the scores of every test item, for variants that are equal over all questions there might be.

    Each variant has an advantage of its own on each question, with a standard deviation of 15 points. A
    question's items share it; every run adds noise of 20 points an item.

    Returns:
        Shape (replicates, items, variants), the items of a question one after another.
    """
    own = 15 * generator.standard_normal((questions, variants)).repeat(items_per_question, axis=0)
    noise = 20 * generator.standard_normal((replicates, questions * items_per_question, variants))
    return own + noise


@dataclass(frozen=True)
class PlantedFactor:
    """A hyperparameter of the response surface."""

    name: str
    loss: float
    """Points lost at the levels farthest from the default, whatever the learning rate is."""
    shift: float = 0.0
    """Decades by which the best learning rate moves at the farthest level."""


LEVELS = np.array([-1.0, -0.5, 0.0, 0.5, 1.0])
"""Levels of a factor; 0 is its default."""
RATES = np.arange(13) * 0.25
"""The curve's grid: four rates a decade over three decades."""
CENTER, SWEEP = 6, np.array([2, 4, 6, 8, 10])
"""The best rate of the default, and the rates at which factors are varied: five, half a decade apart."""


@dataclass(frozen=True)
class StarStudy:
    """The scores of one star design: validation scores choose, test scores count."""

    curve: Floats
    """Test scores at the default, shape (rates, seeds)."""
    curve_choices: Floats
    """Validation scores at the default."""
    arms: dict[str, tuple[Floats, Floats]]
    """Factor -> test and validation scores, shape (levels, rates of the sweep, seeds)."""


def star_study(
    factors: tuple[PlantedFactor, ...],
    curvature: float,
    cliff: bool,
    seeds: int,
    noise: float,
    generator: np.random.Generator,
) -> StarStudy:
    """Return the scores of a star design on a response surface with planted effects.

    Args:
        factors: The factors other than the rate; their losses grow with the square of the level.
        curvature: Points that the score loses one decade away from the best rate.
        cliff: Whether runs collapse from 0.6 decades above the best rate on.
        seeds: Number of seeds. A seed has a common effect of 1 point on all its runs.
        noise: Standard deviation of a run, in points; validation and test score add half of it each.
        generator: The source of random numbers.
    """
    common = generator.standard_normal(seeds)

    def run(distance: Floats, loss: Floats) -> tuple[Floats, Floats]:
        score = np.maximum(-curvature * distance**2, FLOOR) - loss
        score = np.where(cliff & (distance > 0.6), FLOOR, score)[..., None] + common
        score = score + noise * generator.standard_normal(score.shape)
        return (
            score + noise / 2 * generator.standard_normal(score.shape),
            score + noise / 2 * generator.standard_normal(score.shape),
        )

    curve = run(RATES - RATES[CENTER], np.zeros(len(RATES)))
    arms = {}
    for factor in factors:
        distance = RATES[SWEEP] - RATES[CENTER] - factor.shift * LEVELS[:, None]
        test, validation = run(distance, np.broadcast_to(factor.loss * LEVELS[:, None] ** 2, distance.shape))
        # The default's runs are those of the curve.
        default = int(np.flatnonzero(LEVELS == 0)[0])
        test[default], validation[default] = curve[0][SWEEP], curve[1][SWEEP]
        arms[factor.name] = (test, validation)
    return StarStudy(*curve, arms)
