"""Synthetic records of a star design with a known response surface."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from configurations import template

from orchestrator.analyze.analysis import analyze
from orchestrator.analyze.results import Results
from orchestrator.record.schema import Evaluation, Record
from orchestrator.record.study_file import AnalysisSettings, StudyFile
from orchestrator.study.configuration import Configuration
from orchestrator.study.factors import Factor, alias_decades, factor_levels, load_factors, resweep_rates
from orchestrator.study.grids import round_rate
from orchestrator.study.space import apply_values, get_value

RATES = tuple(float(f"{10 ** (k / 4):.3g}") for k in range(-14, -3))  # 3.16e-4 to 1e-1, 4 a decade
FACTORS = ("alpha", "rank", "batch_size", "dropout", "schedule")
COMMAND = "python experiments/hyperparameter_sensitivity.py --task letters --factors alpha rank --seeds 5"


@dataclass(frozen=True)
class Surface:
    """A response surface: the score over log10 rate is a bell whose top and place depend on the factors.

    The score is (top - costs) x exp(-(distance / width)^2), with the distance in decades from the optimum,
    which the `aliases` shift. More than `cliff` decades above the optimum, the score is 0 (collapse).
    """

    top: float = 0.9
    optimum: float = -2.0
    width: float = 0.8
    cliff: float = 0.8
    costs: Mapping[tuple[str, object], float] = field(default_factory=dict)
    """(factor, level) -> how much lower the top is."""
    aliases: Sequence[str] = ("alpha",)
    """Factors that act as a learning rate: one decade more moves the optimum one decade down."""

    def score(self, configuration: Configuration, default: Configuration) -> float:
        """Return the true score."""
        top, optimum = self.top, self.optimum
        for name in {*FACTORS, *self.aliases}:
            value = get_value(configuration, name)
            top -= self.costs.get((name, value), 0.0)
            if name in self.aliases and value is not None:
                optimum -= math.log10(float(value) / float(get_value(default, name) or 1))
        distance = math.log10(configuration.optimizer.learning_rate) - optimum
        return 0.0 if distance > self.cliff else top * math.exp(-((distance / self.width) ** 2))


SURFACE = Surface(
    costs={
        ("batch_size", 64): 0.15,
        ("batch_size", 4): 0.05,
        ("rank", 2): 0.05,
        ("schedule", "constant"): 0.06,
    }
)
"""The learning rate matters most."""
ALIAS = replace(SURFACE, width=2.0, cliff=9.0)
"""The learning rate could replace alpha: the curve is so flat that its grid hides less than the margin."""


def star_configurations(
    default: Configuration, factors: Sequence[Factor], rates: Sequence[float], center: float, count: int = 2
) -> Iterator[Configuration]:
    """Yield the configurations of a star, with seed 0.

    Args:
        default: The configuration that the factors change.
        factors: The factors besides the learning rate.
        rates: The learning rates of the curve.
        center: The best rate of the curve.
        count: Number of further levels of each factor.
    """
    for rate in rates:
        yield apply_values(default, {"learning_rate": rate})
    for factor in factors:
        for level in factor_levels(factor, default, count):
            swept = {*resweep_rates(rates, center)}
            if (decades := alias_decades(apply_values(default, {factor.name: level}), default)) is not None:
                swept |= {round_rate(center / 10 ** (decades + k / 4)) for k in range(-2, 3)}
            for rate in sorted(swept):
                yield apply_values(default, {factor.name: level, "learning_rate": rate})


def make_record(configuration: Configuration, validation: float | None, test: float | None = None) -> Record:
    """Return a finished record, or a diverged one if `validation` is None. By default, `test` equals it."""
    test = validation if test is None else test
    evaluations = () if validation is None else (
        Evaluation(60, "validation", {"exact_match": validation, "loss": 1.0}),
        Evaluation(60, "test", {"exact_match": float(test or 0.0), "loss": 1.0}),
    )  # fmt: skip
    untrained = {"exact_match": 0.0, "loss": 3.0}
    return Record(
        configuration.fingerprint,
        configuration,
        "diverged" if validation is None else "finished",
        60,
        evaluations=evaluations,
        baseline_scores={"validation": untrained, "test": untrained},
    )


def star_records(
    surface: Surface,
    default: Configuration | None = None,
    names: Sequence[str] = FACTORS,
    seeds: int = 5,
    noise: float = 0.01,
    rates: Sequence[float] = RATES,
    center: float = 1e-2,
) -> list[Record]:
    """Return the records of one variant's star, with noise per run and per seed."""
    base = default or template()
    factors = [load_factors()[name] for name in names]
    draw = np.random.default_rng(7)
    shared = noise * draw.standard_normal(seeds)
    records = []
    for configuration in star_configurations(base, factors, rates, center):
        truth = surface.score(configuration, base)
        for seed in range(seeds):
            run = shared[seed] + noise * draw.standard_normal()
            split = noise / 2 * draw.standard_normal(2)
            scores = [min(1.0, max(0.0, truth + run + s)) if truth > 0.02 else 0.0 for s in split]
            records.append(make_record(replace(configuration, seed=seed), *scores))
    return records


def star_study(records: Sequence[Record], **settings: Any) -> StudyFile:
    """Return a sensitivity study that has requested these records in this order."""
    names = tuple(dict.fromkeys(r.fingerprint for r in records))
    chosen = AnalysisSettings(kind="factors", **settings)
    return StudyFile("s", "?", COMMAND, names, settings=chosen, experiment="sensitivity")


def analyze_star(records: Sequence[Record], **settings: Any) -> Results:
    """Analyze a sensitivity study that has all its records."""
    return analyze(star_study(records, **settings), records)
