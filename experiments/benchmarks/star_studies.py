"""Synthetic studies of factors with known truth, for `coverage.py`.

The studies are star designs. A is the score that is lost if a factor is set blindly. B is the score that is
lost if the learning rate is then tuned again. The functions of the report (`effects`) compute both.

The true score over the logarithm of the rate is a bell of height 0.9. Above a certain rate, the cliff, runs
collapse to a score of 0. A factor lowers the top, shifts the bell, or does nothing. The score of a run has
noise of its seed (shared by all runs of the seed), of the run, and of the 200 items of each split.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from scipy import special

from orchestrator.analyze import effects
from orchestrator.analyze.effects import (
    RANGE_SCALES,
    ClaimOutcome,
    Contrast,
    contrast,
    find_center,
    judge_claim,
)
from orchestrator.analyze.stats import mean_interval

Array = NDArray[np.float64]
GRID = np.arange(-6, 7) / 4.0  # log10 rate around its optimum: 3 decades, 4 rates a decade
MARGIN = 0.01
ITEMS = 200
"""Number of items in each split."""


@dataclass(frozen=True)
class PlantedFactor:
    """The levels of a factor and their effects, in three sequences of one length."""

    positions: Sequence[float]
    """log10 of the level divided by the default; the default itself, 0, must be among them."""
    costs: Sequence[float]
    """By how much each level lowers the top."""
    shifts: Sequence[float]
    """Decades by which each level shifts the best rate."""

    @property
    def default(self) -> int:
        """The index of the default level."""
        return list(self.positions).index(0.0)

    @property
    def weights(self) -> Array:
        """The weights of the levels under the prior."""
        return effects.prior_weights(self.positions, self.positions[0], self.positions[-1])


ENDS = (-0.6, 0.0, 0.6)
"""Positions of the levels: the default, and two levels at a factor of 4 from it."""
PLANTED: Mapping[str, PlantedFactor] = {
    "steps": PlantedFactor(ENDS, (0.16, 0.0, 0.04), (0.2, 0.0, -0.2)),
    "batch size": PlantedFactor(ENDS, (0.02, 0.0, 0.08), (-0.25, 0.0, 0.25)),
    "rank": PlantedFactor(ENDS, (0.03, 0.0, 0.0), (0.05, 0.0, -0.05)),
    "dropout": PlantedFactor(ENDS, (0.0, 0.0, 0.0), (0.0, 0.0, 0.0)),
    "alpha": PlantedFactor(ENDS, (0.0, 0.0, 0.0), (0.6, 0.0, -0.6)),
}
"""Name -> factor. Alpha has the effect of another learning rate."""


@dataclass(frozen=True)
class Noise:
    """The noise of scores: standard deviations between seeds and between runs of one seed, and collapses."""

    seed: float
    run: float
    heavy: bool = False
    """True if the noise of runs has a t distribution with 3 degrees of freedom, of the same variance."""
    broken: float = 0.0
    """Probability that a run collapses at any rate, besides the cliff."""


@dataclass
class Surface:
    """The true scores, and random draws of runs."""

    noise: Noise
    width: float = 0.9
    """Decades from the best rate at which the bell has fallen to 1/e."""
    cliff: float = 0.8
    """Decades above the best rate at which half of the runs collapse."""
    top: float = 0.9
    draw: np.random.Generator = field(default_factory=lambda: np.random.default_rng(5))

    def collapse(self, distance: Array) -> Array:
        """Return the probability that a run collapses, at signed distances from the best rate in decades."""
        at_cliff = special.expit((distance - self.cliff) / 0.04)
        return 1 - (1 - at_cliff) * (1 - self.noise.broken)

    def mean(self, distance: Array, cost: Array) -> Array:
        """Return the expected score, including collapsed runs; `cost` lowers the top."""
        return (1 - self.collapse(distance)) * self.bell(distance, cost)

    def bell(self, distance: Array, cost: Array) -> Array:
        """Return the expected score of runs that do not collapse; `cost` lowers the top."""
        return (self.top - cost) * np.exp(-((distance / self.width) ** 2))

    def sample(self, distance: Array, cost: Array, seed_noise: Array) -> tuple[Array, Array]:
        """Draw the validation and test scores of one run for each point and seed.

        Args:
            distance: Signed distance from the best rate in decades, any shape.
            cost: By how much the top is lowered, same shape.
            seed_noise: The noise of each seed, shape (seeds,).

        Returns:
            Two arrays of shape (*distance.shape, seeds).
        """
        shape = (*distance.shape, len(seed_noise))
        draw = self.draw
        own = draw.standard_t(3, shape) / np.sqrt(3) if self.noise.heavy else draw.standard_normal(shape)
        true = self.bell(distance, cost)[..., None] + seed_noise + self.noise.run * own
        usable = draw.random(shape) >= self.collapse(distance)[..., None]
        true = np.clip(np.where(usable, true, 0.0), 0.0, 1.0)
        validation, test = (draw.binomial(ITEMS, true) / ITEMS for _ in range(2))
        return validation, test


@dataclass(frozen=True)
class Study:
    """The analysis of one study: losses per seed, their true values, and the tests of claim 1."""

    losses: Mapping[str, Mapping[str, Array]]
    """Factor -> entry of `FIGURES` -> losses, shape (seeds,)."""
    truth: Mapping[str, Mapping[str, float]]
    """Factor -> entry of `FIGURES` -> true loss."""
    contrasts: Mapping[float, Sequence[Contrast]]
    """Scale of the rate's range -> differences of the rate's losses from those of the factors."""


def simulate(
    surface: Surface,
    factors: Mapping[str, PlantedFactor],
    seeds: int,
    scales: Sequence[float] = (1.0,),
) -> Study:
    """Draw one study, and analyze it as the report does.

    Args:
        surface: The true scores and the noise.
        factors: The factors besides the learning rate.
        seeds: Number of seeds.
        scales: Scales of the rate's range at which claim 1 is tested. The losses are those at the first one.
    """
    seed_noise = surface.noise.seed * surface.draw.standard_normal(seeds)
    choices, values = surface.sample(GRID, np.zeros(len(GRID)), seed_noise)
    _, center = find_center(10.0**GRID, choices.mean(axis=1), np.full(len(GRID), seeds))
    middle = int(np.argmin(np.abs(GRID - np.log10(center))))
    sweep = [i for i in range(middle - 4, middle + 5, 2) if 0 <= i < len(GRID)]
    x = GRID[sweep]
    losses: dict[str, dict[str, Array]] = {}
    truth: dict[str, dict[str, float]] = {}
    contrasts: dict[float, list[Contrast]] = {scale: [] for scale in scales}
    for name, factor in factors.items():
        distance = x[None, :] - np.array(factor.shifts)[:, None]
        cost = np.broadcast_to(np.array(factor.costs)[:, None], distance.shape)
        own_choices, own_values = surface.sample(distance, cost, seed_noise)
        own_choices[factor.default], own_values[factor.default] = choices[sweep], values[sweep]
        arrays = own_values, own_choices, factor.default
        a, b = effects.misset(*arrays, factor.weights), effects.retuned(*arrays, factor.weights)
        for scale in scales:
            whole = effects.prior_weights(GRID, *effects.scaled_ends(GRID, GRID[middle], scale))
            low, high = effects.scaled_ends(GRID, GRID[middle], scale)
            near = effects.prior_weights(x, max(low, x[0]), min(high, x[-1]))
            rate_a = effects.misset_rate(values, choices, sweep, whole)
            rate_b = effects.retuned_rate(*arrays, near)
            if name != "alpha":
                by_a, by_b = contrast(rate_a - a, MARGIN), contrast(rate_b - b, MARGIN)
                # B refutes nothing where the sweep is narrower than the range.
                contrasts[scale] += [by_a, by_b if x[0] <= low else replace(by_b, p_less=1.0)]
            if scale == scales[0]:
                losses[name] = {"A": a, "B": b, "A(rate)": rate_a, "B(rate)": rate_b}
                losses[name] |= {"A(rate) - A": rate_a - a, "B(rate) - B": rate_b - b}
                truth[name] = _true_losses(surface, factor, surface.mean(distance, cost), whole, near)
    return Study(losses, truth, contrasts)


def _true_losses(
    surface: Surface, factor: PlantedFactor, means: Array, whole: Array, near: Array
) -> dict[str, float]:
    """Return the true losses, given the best rate among those of the sweep.

    Args:
        surface: The true scores.
        factor: The factor.
        means: Expected scores of its levels at the rates of the sweep, shape (levels, rates).
        whole: Weights of the rates of the curve under the prior.
        near: Weights of the rates of the sweep under the prior.

    Returns:
        Entry of `FIGURES` -> true loss.
    """
    best = int(np.argmax(means[factor.default]))
    top = float(means[factor.default, best])
    a, b = top - float(factor.weights @ means[:, best]), top - float(factor.weights @ means.max(axis=1))
    rate_a = top - float(whole @ surface.mean(GRID, np.zeros(len(GRID))))
    rate_b = top - float(near @ means.max(axis=0))
    found = {"A": a, "B": b, "A(rate)": rate_a, "B(rate)": rate_b}
    return found | {"A(rate) - A": rate_a - a, "B(rate) - B": rate_b - b}


FIGURES = ("A", "B", "A(rate)", "B(rate)", "A(rate) - A", "B(rate) - B")
"""The losses of a factor, those of the learning rate in the same study, and their differences."""
ROWS: Mapping[str, Noise] = {
    "2 points": Noise(0.014, 0.014),
    "2 points, heavy tails": Noise(0.014, 0.014, heavy=True),
    "2 points, 3 % collapse": Noise(0.014, 0.014, broken=0.03),
}


def interval_shares(noise: Noise, seeds: int, studies: int, draw: np.random.Generator) -> dict[str, float]:
    """Return for each of `FIGURES` the share (0 to 1) of all intervals that contain the true loss."""
    surface = Surface(noise, draw=draw)
    covered: dict[str, list[bool]] = {figure: [] for figure in FIGURES}
    for _ in range(studies):
        study = simulate(surface, PLANTED, seeds)
        for factor, own in study.losses.items():
            for figure in FIGURES:
                found = mean_interval(own[figure])
                covered[figure].append(found.low <= study.truth[factor][figure] <= found.high)
    return {figure: float(np.mean(each)) for figure, each in covered.items()}


@dataclass(frozen=True)
class ClaimCase:
    """A true surface on which the right outcome of claim 1 is known."""

    name: str
    factors: Mapping[str, PlantedFactor]
    counted: ClaimOutcome
    """The outcome whose share of the studies is shown."""
    bounds: tuple[float, float]
    """The least and the largest share that is ok."""
    width: float = 0.9
    cliff: float = 0.8
    broken: float = 0.0
    """See `Noise.broken`."""


def _top(cost: float) -> PlantedFactor:
    """Return a factor whose A and B are half of `cost`: its two further levels lower the top by `cost`."""
    return PlantedFactor(ENDS, (cost, 0.0, cost), (0.0, 0.0, 0.0))


def _just_false() -> PlantedFactor:
    """Return a factor for which claim 1 is just false at half of the learning rate's range.

    There, the smaller of A(rate) - A and B(rate) - B is `MARGIN`. The cost of a level is found by bisection.
    """
    low, high = 0.0, 0.9
    for _ in range(40):
        cost = (low + high) / 2
        truth = simulate(Surface(Noise(0.0, 0.0)), {"x": _top(cost)}, 5, (0.5,)).truth["x"]
        smaller = min(truth["A(rate) - A"], truth["B(rate) - B"])
        low, high = (cost, high) if smaller > MARGIN else (low, cost)
    return _top(low)


def claim_cases() -> list[ClaimCase]:
    """Return the cases."""
    flat = {"width": 30.0, "cliff": 30.0}  # the rate does not matter
    equal = {f"factor {i}": _top(2 * MARGIN) for i in range(8)}
    broken = {"": 0.0, ", 3 % collapse": 0.03}
    planted = {name: factor for name, factor in PLANTED.items() if name != "alpha"}
    just_false = {"x": _just_false()}
    return [
        ClaimCase("planted order", planted, "supported", (0.95, 1.0)),
        *(
            ClaimCase(
                f"rate only the margin above one factor{more}", just_false, "supported", (0.0, 0.06), broken=p
            )
            for more, p in broken.items()
        ),
        ClaimCase("eight factors the margin above the rate", equal, "refuted", (0.0, 0.06), **flat),
        ClaimCase("one factor far above the rate", {"x": _top(0.3)}, "refuted", (0.95, 1.0), **flat),
        ClaimCase(
            "the answer turns with the range",
            {"x": _top(0.26)},
            "undecided (range)",
            (0.95, 1.0),
            width=1.2,
            cliff=30.0,
        ),
    ]


def claim_share(case: ClaimCase, seeds: int, studies: int, draw: np.random.Generator) -> float:
    """Return the share (0 to 1) of studies with the outcome that a case counts.

    Args:
        case: The case.
        seeds: Number of seeds of a study.
        studies: Number of studies.
        draw: The source of random numbers.
    """
    surface = Surface(Noise(0.014, 0.014, broken=case.broken), width=case.width, cliff=case.cliff, draw=draw)
    outcomes = [
        judge_claim(simulate(surface, case.factors, seeds, RANGE_SCALES).contrasts).outcome
        for _ in range(studies)
    ]
    return outcomes.count(case.counted) / studies
