"""The errors of mean differences from one baseline, with a variance that is pooled over the variants.

The pooling, its degrees of freedom and the critical values are explained in `significance`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.analyze.power import dunnett_critical_value, sidak_critical_value

VARIANCE_TEST_LEVEL = 0.05
"""The significance level of the F test that excludes a variant from the pool."""


@dataclass(frozen=True)
class DifferenceError:
    """The error of a variant's mean difference."""

    standard_error: float
    """The standard error of the mean difference."""
    std: float
    """The standard deviation of a difference."""
    degrees: float
    """The degrees of freedom of the standard deviation."""
    critical_value: float
    """Half of the interval's width in standard errors."""
    pooled: bool
    """True if the standard deviation is the pooled one."""


def estimate_errors(d: Mapping[str, Sequence[float]]) -> dict[str, DifferenceError]:
    """Estimate the error of every variant's mean difference, from the pooled variance where possible.

    Args:
        d: Variant -> its differences from the baseline, one per seed.
    """
    squares = {v: math.fsum((x - math.fsum(own) / len(own)) ** 2 for x in own) for v, own in d.items()}
    degrees = {v: len(own) - 1 for v, own in d.items()}
    pool = _poolable_variants(squares, degrees)
    errors = {}
    total = sum(degrees[v] for v in pool)
    if pool:
        std = math.sqrt(math.fsum(squares[v] for v in pool) / total)
        pooled_degrees = total * 4 / (len(pool) + 3)
        critical = dunnett_critical_value(len(d), pooled_degrees)
        for v in pool:
            errors[v] = DifferenceError(std / math.sqrt(len(d[v])), std, pooled_degrees, critical, True)
    for v in set(d) - set(pool):
        std = math.sqrt(squares[v] / degrees[v])
        critical = sidak_critical_value(len(d), degrees[v])
        errors[v] = DifferenceError(std / math.sqrt(len(d[v])), std, degrees[v], critical, False)
    return errors


def _poolable_variants(squares: Mapping[str, float], degrees: Mapping[str, int]) -> list[str]:
    """Return the variants whose variances may be pooled.

    The variant with the largest variance is excluded, again and again, while its variance is significantly
    larger than that of the others.
    """
    from scipy import stats

    pool = sorted(squares)
    while len(pool) > 1:
        widest = max(pool, key=lambda v: (squares[v] / degrees[v], v))
        rest = [v for v in pool if v != widest]
        total = sum(degrees[v] for v in rest)
        others, own = math.fsum(squares[v] for v in rest) / total, squares[widest] / degrees[widest]
        rest_degrees = total * 4 / (len(rest) + 3)
        if own <= 0 or (
            others > 0
            and stats.f.sf(own / others, degrees[widest], rest_degrees) >= VARIANCE_TEST_LEVEL / len(squares)
        ):
            break
        pool = rest
    return pool
