"""Synthetic studies with known truth, for the coverage benchmark. All scores are in points (0.01)."""

from __future__ import annotations

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
