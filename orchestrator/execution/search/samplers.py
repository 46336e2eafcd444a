"""Optuna's samplers, and the points that a sampler that uses no results draws ahead."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from optuna import create_study, logging, samplers
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.trial import FrozenTrial, create_trial

from orchestrator.execution.search.groups import SearchGroup
from orchestrator.study.configuration import Value
from orchestrator.study.space import Dimension

logging.set_verbosity(logging.WARNING)  # otherwise Optuna logs a line for each study

NON_ADAPTIVE_SAMPLERS = ("random", "qmc")
"""Samplers that do not use results, so that all their points can be drawn in advance."""
MAX_REJECTED_SUGGESTIONS = 8
"""After this many known or refused suggestions in a row, the point comes from `random_points`."""
MAX_ENUMERATED_POINTS = 10_000
"""Spaces of at most this many points are enumerated to find a new point."""
MAX_RANDOM_DRAWS = 1000
"""Number of points that are drawn at random in larger spaces."""
MAX_IDLE_DRAWS = 100
"""Drawing ahead ends after this many draws in a row without a new point."""
MIN_WARM_START_TRIALS = 10
"""CMA-ES starts from the best tenth of the complete trials if there are at least this many."""


def distributions(dimensions: Sequence[Dimension]) -> dict[str, BaseDistribution]:
    """Return Optuna's distributions by name.

    A choice of numbers becomes an integer distribution over the index, so that samplers know the order.
    """
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
    """Convert Optuna's parameters to values of a configuration."""
    found: dict[str, Value] = {}
    for d in dimensions:
        if d.choices:
            found[d.key] = d.choices[params[d.key]] if d.is_numeric else params[d.key]
        else:
            found[d.key] = d.to_value(params[d.key])
    return found


def to_optuna_params(dimensions: Sequence[Dimension], found: Mapping[str, Value]) -> dict[str, Any]:
    """Convert values of a configuration to Optuna's parameters, the inverse of `from_optuna_params`."""
    return {
        d.key: d.choices.index(found[d.key]) if d.choices and d.is_numeric else found[d.key]
        for d in dimensions
    }


def random_points(dimensions: Sequence[Dimension], seed: int) -> Iterator[dict[str, Value]]:
    """Yield random points, for a sampler that suggests only known points.

    Args:
        dimensions: The space. Each point of a small space comes once, in random order. In a larger space
            MAX_RANDOM_DRAWS points are drawn, and a point may come twice.
        seed: Seed of the order. The order also depends on the sizes of the dimensions.
    """
    size = math.prod(d.size or math.inf for d in dimensions)
    if size <= MAX_ENUMERATED_POINTS:
        for number in random.Random(seed).sample(range(int(size)), int(size)):
            found: dict[str, Value] = {}
            for d in dimensions:
                number, at = divmod(number, d.size or 1)
                found[d.key] = d.choices[at] if d.choices else d.to_value(d.low + at)
            yield found
        return
    study, made_of = create_study(sampler=samplers.RandomSampler(seed=seed)), distributions(dimensions)
    for _ in range(MAX_RANDOM_DRAWS):
        yield from_optuna_params(dimensions, study.ask(fixed_distributions=made_of).params)


def make_sampler(
    sampler_name: str,
    points: int,
    num_asked: int,
    completed: Sequence[FrozenTrial] = (),
    replicate: int = 0,
) -> samplers.BaseSampler:
    """Make the sampler of one group's search.

    Args:
        sampler_name: `tpe`, `cma-es`, `qmc` or `random`.
        points: Number of points that the group may have.
        num_asked: Number of points that were asked for. The seed is derived from this number and the
            replicate, so that a sampler does not repeat its draws after a restart.
        completed: The complete trials, from which CMA-ES starts if there are enough of them.
        replicate: The group's replicate.
    """
    seed = random.Random(f"{replicate}/{num_asked}").getrandbits(31)
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
            n_startup_trials=min(10, max(4, points // 4)),  # with few points, most should use results
            multivariate=True,
            constant_liar=True,  # suggestions keep a distance from points in training
        )


def draw_points(
    sampler_name: str, groups: Sequence[SearchGroup], points: int
) -> dict[str, list[dict[str, Value]]]:
    """Draw the points of a sampler that does not use results, for the groups of one task and replicate.

    All variants take their values from one sequence over the whole space, so that variants have equal values
    of the dimensions that they share. More points begin with the same points as fewer. Once the
    sequence only repeats itself, the remaining points come from `random_points`.

    Args:
        sampler_name: `qmc` or `random`.
        groups: The groups of one task and one replicate, at least one.
        points: Number of points for each group. A smaller space gives fewer points.

    Returns:
        The points of each group, by its name.
    """
    replicate = groups[0].replicate
    distinct = {d.key: d for group in groups for d in group.dimensions}
    dimensions = sorted(distinct.values(), key=lambda d: d.variant != "")  # those of all variants first
    made_of = distributions(dimensions)
    study = create_study(sampler=make_sampler(sampler_name, points, 0, replicate=replicate))
    ends = {key: each.to_external_repr(float(getattr(each, "low", 0))) for key, each in made_of.items()}
    # QMC infers the space from the first trial, and would draw a first trial of its own at random.
    study.add_trial(create_trial(params=ends, distributions=made_of, value=0.0))
    found: dict[str, dict[str, dict[str, Value]]] = {group.name: {} for group in groups}

    def add_point(group: SearchGroup, mine: dict[str, Value]) -> bool:
        configuration = group.build(mine)
        if configuration is None or configuration.fingerprint in found[group.name]:
            return False
        found[group.name][configuration.fingerprint] = mine
        return True

    def lacks(group: SearchGroup) -> bool:
        return len(found[group.name]) < min(points, group.size)

    idle = 0
    while idle < MAX_IDLE_DRAWS and any(map(lacks, groups)):
        drawn_now = from_optuna_params(dimensions, study.ask(fixed_distributions=made_of).params)
        idle += 1
        for group in filter(lacks, groups):
            if add_point(group, {d.key: drawn_now[d.key] for d in group.dimensions}):
                idle = 0
    for group in filter(lacks, groups):
        rest = random_points(group.dimensions, replicate)
        while lacks(group) and (mine := next(rest, None)) is not None:
            add_point(group, mine)
    return {name: list(of.values()) for name, of in found.items()}
