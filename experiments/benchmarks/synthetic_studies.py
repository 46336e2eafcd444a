"""Synthetic studies with known truth, for the coverage benchmark. All scores are in points (0.01)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Noise = Literal["equal", "unequal", "heavy tails", "near ceiling"]
NOISES: tuple[Noise, ...] = ("equal", "unequal", "heavy tails", "near ceiling")
FLOOR = -50.0
"""The score of a collapsed run, relative to that of the best rate."""


def score_noise(noise: Noise, shape: tuple[int, int, int], generator: np.random.Generator) -> Floats:
    """Draw the noise of scores, with mean 0; the first variant is the baseline.

    Args:
        noise: "equal": normal with standard deviation 1. "unequal": normal, with standard deviation 2 for one
            variant, 3 for two and 1 for the others. "heavy tails": t with 3 degrees of freedom. "near
            ceiling": the distance below a ceiling is exponential with mean 1.
        shape: (studies, replicates, variants with the baseline).
        generator: The source of random numbers.

    Returns:
        The noise, of the given shape.
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
    """Return the differences from the baseline.

    Args:
        scores: Scores, shape (..., K + 1), with the baseline first.

    Returns:
        Shape (..., K).
    """
    return scores[..., 1:] - scores[..., :1]


def tuned_scores(
    studies: int, replicates: int, variants: int, rates_per_decade: int, generator: np.random.Generator
) -> Floats:
    """Draw the test scores of replicated tuning, for variants that are equal when tuned.

    Every variant has a best rate of its own, and loses 30 points one decade away from it (quadratically). The
    probability that a run collapses is logistic in the rate: one half at 0.7 decades above the best rate. A
    run has noise with a standard deviation of 0.7 points that validation and test score share, and 0.5 points
    in each score alone. The grid spans three decades. Every replicate shifts it by a random offset, the same
    for all variants.

    Args:
        studies: Number of studies.
        replicates: Number of replicates of each study.
        variants: Number of variants, including the baseline.
        rates_per_decade: Number of learning rates per decade.
        generator: The source of random numbers.

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
    """Draw the scores of every test item, for variants that are equal over the population of questions.

    Each variant has an advantage of its own on each question, normal with a standard deviation of 15 points,
    which the items of the question share. Every run adds noise of 20 points to each item.

    Args:
        items_per_question: Number of items of each question.
        questions: Number of questions.
        replicates: Number of replicates.
        variants: Number of variants, including the baseline.
        generator: The source of random numbers.

    Returns:
        Shape (replicates, items, variants), the items of a question one after another.
    """
    own = 15 * generator.standard_normal((questions, variants)).repeat(items_per_question, axis=0)
    noise = 20 * generator.standard_normal((replicates, questions * items_per_question, variants))
    return own + noise


@dataclass(frozen=True)
class PlantedFactor:
    """A hyperparameter with known effects. Its levels are `LEVELS`."""

    name: str
    loss: float
    """Points lost at the levels farthest from the default, at any learning rate."""
    shift: float = 0.0
    """Decades by which the best learning rate shifts at the highest level."""


LEVELS = np.array([-1.0, -0.5, 0.0, 0.5, 1.0])
"""Levels of a factor; 0 is its default."""
RATES = np.arange(13) * 0.25
"""log10 of the rates of the curve: four rates a decade over three decades."""
CENTER, SWEEP = 6, np.array([2, 4, 6, 8, 10])
"""Indices in `RATES`: the best rate at the default, and the five rates, half a decade apart, at which factors
are varied."""


@dataclass(frozen=True)
class StarStudy:
    """The scores of one star design. Rates are chosen by validation scores and compared by test scores."""

    curve: Floats
    """Test scores of the curve, at the default of all factors, shape (rates, seeds)."""
    curve_choices: Floats
    """Validation scores of the curve, shape (rates, seeds)."""
    arms: dict[str, tuple[Floats, Floats]]
    """Factor -> test and validation scores, each of shape (levels, rates of the sweep, seeds)."""


def star_study(
    factors: tuple[PlantedFactor, ...],
    curvature: float,
    cliff: bool,
    seeds: int,
    noise: float,
    generator: np.random.Generator,
) -> StarStudy:
    """Draw the scores of a star design with planted effects.

    Args:
        factors: The factors other than the rate; their losses grow with the square of the level.
        curvature: Points that the score loses one decade away from the best rate (quadratically).
        cliff: Whether all runs collapse that are more than 0.6 decades above the best rate.
        seeds: Number of seeds. All runs of a seed share noise with a standard deviation of 1 point.
        noise: Standard deviation of the noise of a run, in points. Validation and test score each have
            further noise of half of it.
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
        # The runs of the default level are those of the curve.
        default = int(np.flatnonzero(LEVELS == 0)[0])
        test[default], validation[default] = curve[0][SWEEP], curve[1][SWEEP]
        arms[factor.name] = (test, validation)
    return StarStudy(*curve, arms)
