"""The null distribution of the largest statistic over variants, from random signs of the replicates.

If the noise of the K differences is jointly symmetric, flipping the signs of whole replicates changes nothing
in its law: the largest |z| over variants, observed and under all sign patterns, are exchangeable, whatever
the variances, tails and correlations are. So the quantile of the flipped values is an exact critical value
for "all variants are equal to the baseline". The limits of intervals need it at the true differences, which
are not known: the variants that this test finds to differ are centered at their means, the others are taken
as equal to the baseline, and the quantile is computed anew.

With n replicates there are 2^(n - 1) patterns (16 for n = 5); a level below 20 of them is not resolved. There
the quantile of the flipped values is multiplied by a factor that simulated studies with normal noise give.
docs/statistics.md has the measured errors of this and of other rules.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_RANDOM_PATTERNS = 1023  # instead of all, from twelve replicates on
_RESOLVED = 20  # patterns above a quantile, from which on it needs no factor
_LEVELS = np.array(
    [1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.25, 0.4, 0.6, 0.8, 1.0]
)
_NORMAL_STUDIES = 20_000  # simulated
_NORMAL_EXCESS = {False: 1.05, True: 1.25}
"""Error under normal noise over the level, where that is not resolved, without and with centered variants.

Other noise errs less, so that all errors lie around the level."""
_BATCH = 500
_SEED = 0


def to_z(t: Floats, degrees: Floats | float) -> Floats:
    """Map t statistics to standard normal ones, with Wallace's approximation (1959), for any sign."""
    with np.errstate(invalid="ignore"):  # infinitely many degrees
        z = np.sqrt(degrees * np.log1p(t**2 / degrees)) * (1 - 2 / (8 * degrees + 3))
    return np.where(np.isinf(degrees), t, np.sign(t) * z)


def from_z(z: Floats | float, degrees: Floats) -> Floats:
    """Return the t statistics at least 0 that `to_z` maps to z."""
    with np.errstate(invalid="ignore"):
        t = np.sqrt(degrees * np.expm1((z / (1 - 2 / (8 * degrees + 3))) ** 2 / degrees))
    return np.where(np.isinf(degrees), z, t)


@dataclass(frozen=True)
class NullDistribution:
    """Critical values of the largest statistic over variants, on the scale of a normal distribution."""

    equality: Floats
    """Critical values of |z| at `_LEVELS`, descending, for the test of "equal to the baseline"."""
    two_sided: Floats
    """Critical values of |z| at `_LEVELS` for intervals."""
    one_sided: Floats
    """Critical values of z at `_LEVELS` for one-sided tests at a margin."""

    def critical_value(self, alpha: float) -> float:
        """Return the critical value of intervals; infinity at level 0."""
        if alpha <= 0:
            return np.inf
        return float(np.exp(np.interp(np.log(alpha), np.log(_LEVELS), np.log(self.two_sided))))

    def equality_p(self, z: Floats) -> Floats:
        """Return the two-sided p values, adjusted for the number of variants, of "equal to the baseline"."""
        return _interpolate_level(self.equality, np.abs(z))

    def one_sided_p(self, z: Floats) -> Floats:
        """Return the adjusted p values of a one-sided test."""
        return _interpolate_level(self.one_sided, z)


def _interpolate_level(critical: Floats, z: Floats) -> Floats:
    return np.asarray(np.exp(np.interp(z, critical[::-1], np.log(_LEVELS)[::-1])))


def null_distribution(differences: Floats, alpha: float) -> NullDistribution:
    """Return the null distribution for one study.

    Args:
        differences: Variant minus baseline in each replicate, shape (n, K), n at least 2; NaN for a missing
            pair, at least two of each variant. If it is empty, all critical values are NaN.
        alpha: The level at which variants are found to differ, and are centered.
    """
    if not differences.size:  # with one replicate nothing can be tested
        unknown = np.full(len(_LEVELS), np.nan)
        return NullDistribution(unknown, unknown, unknown)
    known = np.isfinite(differences)
    return NullDistribution(
        *(q[0] for q in _two_steps(np.where(known, differences, 0.0)[None], known, alpha))
    )


def critical_values(differences: Floats) -> tuple[Floats, Floats]:
    """Return the critical values at level 0.05 of B simulated studies without missing pairs.

    The benchmark of coverage calls it: one call for many studies is faster than `null_distribution` for each.

    Args:
        differences: Variant minus baseline, shape (B studies, n replicates, K variants).

    Returns:
        The critical values of |z| for the test of equality, and for intervals, each of shape (B,).
    """
    level = np.flatnonzero(_LEVELS == 0.05)
    known = np.ones(differences.shape[1:], dtype=bool)
    equality, two_sided, _ = _two_steps(differences, known, 0.05, level)
    return equality[:, 0], two_sided[:, 0]


def _two_steps(
    values: Floats, known: NDArray[np.bool_], alpha: float, at: NDArray[np.int64] | slice = slice(None)
) -> tuple[Floats, Floats, Floats]:
    """Return the three kinds of critical values of `NullDistribution`, each of shape (B, levels).

    Args:
        values: Differences, shape (B, n, K), with 0 for missing pairs.
        known: Which pairs there are, shape (n, K).
        alpha: The level at which variants are found to differ.
        at: Indices of the levels that are wanted.
    """
    n = known.sum(axis=0)
    mean = values.sum(axis=1, keepdims=True) / n
    residuals = np.where(known, values - mean, 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):  # no spread, or no level
        z = to_z(mean * np.sqrt(n) / np.sqrt((residuals**2).sum(axis=1, keepdims=True) / (n - 1)), n - 1.0)
        equality, one_sided = _from_flips(values, n, np.zeros(len(values)), at)
        limit = [np.interp(np.log(alpha), np.log(_LEVELS[at]), np.log(row)) for row in equality]
        differs = np.abs(z) > (np.exp(limit) if alpha > 0 else np.full(len(values), np.inf))[:, None, None]
    two_sided = equality.copy()
    again = differs.any(axis=(1, 2))
    if again.any():
        noise = np.where(differs, residuals, values)[again]
        two_sided[again], one_sided[again] = _from_flips(noise, n, differs[again].mean(axis=(1, 2)), at)
    return equality, two_sided, one_sided


def _from_flips(
    noise: Floats, n: NDArray[np.int64], centered: Floats, at: NDArray[np.int64] | slice
) -> tuple[Floats, Floats]:
    """Return two-sided and one-sided critical values under sign flips, each of shape (B, levels).

    Args:
        noise: Shape (B, rows, K), with 0 for missing pairs.
        n: Number of pairs of each variant, shape (K,).
        centered: Share of the variants that are centered, shape (B,).
        at: Indices of the levels that are wanted.
    """
    critical = []
    for side, quantile in enumerate(_quantiles(_flipped_maxima(noise, n), at)):
        factor = _normal_factors(*noise.shape[1:], False)[side][at]
        if centered.any():
            factor = factor + centered[:, None] * (_normal_factors(*noise.shape[1:], True)[side][at] - factor)
        critical.append(np.minimum.accumulate(quantile * factor, axis=1))
    return critical[0], critical[1]


@lru_cache(maxsize=256)
def _sign_patterns(n: int) -> Floats:
    """Return sign patterns, shape (m, n): of each pair of opposite ones one, without the constant one."""
    if 2 ** (n - 1) - 1 <= _RANDOM_PATTERNS:
        codes = np.arange(1, 2 ** (n - 1))
        return np.asarray(1.0 - 2.0 * ((codes[:, None] >> np.arange(n)) & 1), dtype=np.float64)
    return np.random.default_rng(_SEED).choice([-1.0, 1.0], size=(_RANDOM_PATTERNS, n))


def _flipped_maxima(noise: Floats, n: NDArray[np.int64]) -> Floats:
    """Return the largest z over variants for each sign pattern and its opposite, shape (B, m, 2).

    Args:
        noise: B studies, shape (B, rows, K), with 0 for missing pairs.
        n: Number of pairs of each variant, shape (K,).
    """
    length = np.sqrt((noise**2).sum(axis=1, keepdims=True) * n)
    unit = noise / np.where(length > 0, length, 1.0)
    x = _sign_patterns(noise.shape[1]) @ unit  # the mean over the root mean square: t^2 / (t^2 + n - 1) = x^2
    limit = np.sqrt(1 - 1e-12)
    if (n == n[0]).all():  # z is monotone in x, alike for all variants
        x, same = np.stack([x.max(axis=2), -x.min(axis=2)], axis=2).clip(-limit, limit), float(n[0] - 1)
        return to_z(x * np.sqrt(same / (1 - x**2)), same)
    x, degrees = x.clip(-limit, limit), np.asarray(n - 1, dtype=np.float64)
    z = to_z(x * np.sqrt(degrees / (1 - x**2)), degrees)
    return np.stack([z.max(axis=2), -z.min(axis=2)], axis=2)


def _quantiles(maxima: Floats, at: NDArray[np.int64] | slice = slice(None)) -> tuple[Floats, Floats]:
    """Return the quantiles of |z| and of z at some of `_LEVELS`, each of shape (B, levels)."""
    found = []
    for values in (maxima.max(axis=2), maxima.reshape(len(maxima), -1)):
        ordered, last = np.sort(values, axis=1), values.shape[1] - 1
        # A level k / (m + 1) gives the k-th largest of m: the exact rank test. (numpy.quantile can do the
        # same with method "weibull", and takes three times as long.)
        position = ((last + 2) * (1 - _LEVELS[at]) - 1).clip(0, last)
        below = np.minimum(position.astype(int), last - 1) if last else np.zeros(len(position), dtype=int)
        above = np.minimum(below + 1, last)
        found.append(ordered[:, below] + (position - below) * (ordered[:, above] - ordered[:, below]))
    return found[0], found[1]


@lru_cache(maxsize=256)
def _normal_factors(n: int, count: int, centered: bool) -> tuple[Floats, Floats]:
    """Return the factors of the quantiles, two-sided and one-sided, at `_LEVELS`; 1 where resolved.

    A factor is the quantile of the ratio of the observed statistic to the quantile under flips, over
    simulated studies with equal normal noise.

    Args:
        n: Number of replicates.
        count: Number of variants.
        centered: Whether the flips are those of residuals.
    """
    patterns = len(_sign_patterns(n)) + 1
    unresolved = [(_LEVELS * patterns * sides < _RESOLVED) & (_LEVELS <= 0.25) for sides in (1, 2)]
    factors = (np.ones(len(_LEVELS)), np.ones(len(_LEVELS)))
    if not unresolved[0].any():
        return factors
    generator = np.random.default_rng(_SEED)
    ratios: tuple[list[Floats], list[Floats]] = ([], [])
    for _ in range(int(np.clip(4e6 / patterns, 2_000, _NORMAL_STUDIES)) // _BATCH):
        noise = generator.standard_normal((_BATCH, n, count + 1))
        d = noise[:, :, 1:] - noise[:, :, :1]
        z = to_z(d.mean(axis=1) / d.std(axis=1, ddof=1) * np.sqrt(n), n - 1.0)
        maxima = _flipped_maxima(d - d.mean(axis=1, keepdims=True) * centered, np.full(count, n))
        for own, observed, quantile in zip(ratios, (np.abs(z), z), _quantiles(maxima), strict=True):
            own.append(observed.max(axis=1)[:, None] / quantile)
    for factor, own, where in zip(factors, ratios, unresolved, strict=True):
        every = np.concatenate(own)
        for i in np.flatnonzero(where):
            factor[i] = np.quantile(every[:, i], 1 - _NORMAL_EXCESS[centered] * _LEVELS[i])
    return factors
