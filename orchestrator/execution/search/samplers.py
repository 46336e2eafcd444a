"""Optuna's samplers over our spaces, and whole designs drawn by them where results play no role."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from orchestrator.study.configuration import Configuration
from orchestrator.study.space import Dimension, Space, Value

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial

NON_ADAPTIVE_SAMPLERS = ("random", "qmc")
"""Samplers that learn nothing: all their points can be drawn beforehand."""
SEED = 0
MAX_REJECTED_SUGGESTIONS = (
    8  # suggestions in a row that are known or refused, before others are looked for without the sampler
)
MAX_ENUMERATED_POINTS = 10_000  # points of a space that are looked through one by one
MAX_RANDOM_DRAWS = 1000  # the same of a larger one, at random
MAX_IDLE_DRAWS = 100  # draws in a row that bring a design nothing new
MIN_WARM_START_TRIALS = 10  # CMA-ES takes the best tenth of what is known: one at least

BuildConfiguration = Callable[[str, Mapping[str, Value]], Configuration | None]
"""A variant's configuration with these values; None for one that the variant refuses."""


def distributions(dimensions: Sequence[Dimension]) -> dict[str, BaseDistribution]:
    """Optuna's, by key. A choice of numbers is an index: its order means something."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    made: dict[str, BaseDistribution] = {}
    for d in dimensions:
        if d.choices and d.is_numeric:
            made[d.key] = IntDistribution(0, len(d.choices) - 1)
        elif d.choices:
            made[d.key] = CategoricalDistribution(list(d.choices))
        elif d.has_integer_steps:
            made[d.key] = IntDistribution(int(d.low), int(d.high), log=d.log)
        else:
            made[d.key] = FloatDistribution(d.low, d.high, log=d.log)
    return made


def from_optuna_params(dimensions: Sequence[Dimension], params: Mapping[str, Any]) -> dict[str, Value]:
    """What Optuna has drawn, as configurations get it."""
    found: dict[str, Value] = {}
    for d in dimensions:
        if d.choices:
            found[d.key] = d.choices[params[d.key]] if d.is_numeric else params[d.key]
        else:
            found[d.key] = d.to_value(params[d.key])
    return found


def to_optuna_params(dimensions: Sequence[Dimension], found: Mapping[str, Value]) -> dict[str, Any]:
    """The inverse of `values`, up to rounding."""
    return {
        d.key: d.choices.index(found[d.key]) if d.choices and d.is_numeric else found[d.key]
        for d in dimensions
    }


def random_points(dimensions: Sequence[Dimension], seed: int) -> Iterator[dict[str, Value]]:
    """Points to take where a sampler comes back to known ones: each of a small space once, in random order;
    of a larger one DRAWS at random, some of them twice perhaps. The order comes from `seed` and the sizes."""
    size = math.prod(d.size or math.inf for d in dimensions)
    if size <= MAX_ENUMERATED_POINTS:
        for number in random.Random(seed).sample(range(int(size)), int(size)):
            found: dict[str, Value] = {}
            for d in dimensions:
                number, at = divmod(number, d.size or 1)
                found[d.key] = d.choices[at] if d.choices else d.to_value(d.low + at)
            yield found
        return
    from optuna import create_study, logging
    from optuna.samplers import RandomSampler

    logging.set_verbosity(logging.WARNING)  # a line about each study otherwise
    study, made_of = create_study(sampler=RandomSampler(seed=seed)), distributions(dimensions)
    for _ in range(MAX_RANDOM_DRAWS):
        yield from_optuna_params(dimensions, study.ask(fixed_distributions=made_of).params)


def make_sampler(
    sampler_name: str, points: int, num_asked: int, completed: Sequence[FrozenTrial] = ()
) -> BaseSampler:
    """A fresh sampler for a group that has asked for `asked` points of `points`, whose complete ones are
    `known`. After a restart it does not repeat its draws: they come from SEED and `asked`."""
    from optuna import samplers
    from optuna.exceptions import ExperimentalWarning

    seed = random.Random(f"{SEED}/{num_asked}").getrandbits(31)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        if sampler_name == "random":
            return samplers.RandomSampler(seed=seed)
        if sampler_name == "qmc":
            return samplers.QMCSampler(scramble=True, seed=seed, warn_independent_sampling=False)
        if sampler_name == "cma-es":
            warm = list(completed) if len(completed) >= MIN_WARM_START_TRIALS else None
            return samplers.CmaEsSampler(seed=seed, source_trials=warm, warn_independent_sampling=False)
        return samplers.TPESampler(
            seed=seed,
            n_startup_trials=min(10, max(4, points // 4)),  # of few points most should learn from the others
            multivariate=True,
            constant_liar=True,  # lanes in training keep the next suggestions away from themselves
        )


def draw_design(
    sampler_name: str, space: Space, points: int, build: BuildConfiguration
) -> dict[str, list[dict[str, Value]]]:
    """`points` different ones of each variant, fewer where there are no more. All variants take theirs from
    one sequence over the whole space, each what it has, so that what they share is alike; more points begin
    with the same ones. Once that sequence only repeats itself, the rest comes from `others`."""
    from optuna import create_study, logging
    from optuna.trial import create_trial

    dimensions = space.dimensions
    made_of = distributions(dimensions)
    logging.set_verbosity(logging.WARNING)  # a line about each study otherwise
    study = create_study(sampler=make_sampler(sampler_name, points, 0))
    ends = {key: each.to_external_repr(float(getattr(each, "low", 0))) for key, each in made_of.items()}
    # QMC learns the space from the first point; of its own it would draw that one at random.
    study.add_trial(create_trial(params=ends, distributions=made_of, value=0.0))
    found: dict[str, dict[str, dict[str, Value]]] = {variant: {} for variant in space.variants}

    def add_point(variant: str, mine: dict[str, Value]) -> bool:
        configuration = build(variant, mine)
        if configuration is None or configuration.fingerprint in found[variant]:
            return False
        found[variant][configuration.fingerprint] = mine
        return True

    def lacks(variant: str) -> bool:
        return len(found[variant]) < min(points, space.size(variant))

    idle = 0
    while idle < MAX_IDLE_DRAWS and any(map(lacks, found)):
        drawn_now = from_optuna_params(dimensions, study.ask(fixed_distributions=made_of).params)
        idle += 1
        for variant in filter(lacks, found):
            if add_point(variant, {d.key: drawn_now[d.key] for d in space.variants[variant]}):
                idle = 0
    for variant in filter(lacks, found):
        rest = random_points(space.variants[variant], SEED)
        while lacks(variant) and (mine := next(rest, None)) is not None:
            add_point(variant, mine)
    return {variant: list(of.values()) for variant, of in found.items()}
