"""Null distribution of the largest statistic over variants, from sign flips of whole replicates.

A sign pattern multiplies all K differences of each replicate by 1 or by -1. If the noise is jointly symmetric
about 0, this does not change its distribution. For variants that are equal to the baseline, the largest |z|
over variants, observed and under every sign pattern, are therefore exchangeable, whatever the variances,
tails and correlations of the noise are. Their quantile is an exact critical value for the hypothesis "all
variants are equal to the baseline".

Confidence limits need this quantile at the true differences, which are unknown. Instead, the variants that
the test finds to differ are centered (their means are subtracted), all others are taken as equal to the
baseline, and the quantile is computed again.

With n replicates there are 2^(n - 1) patterns (16 for n = 5), because opposite patterns have the same |z|. A
quantile with fewer than 20 patterns above it is unresolved. It is multiplied by a factor that comes from
simulated studies with normal noise. docs/statistics.md has the measured error rates of this method and of
alternatives.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_RANDOM_PATTERNS = 1023  # from twelve replicates on, instead of all patterns
_RESOLVED = 20  # smallest number of patterns above a quantile that needs no factor
_LEVELS = np.array(
    [1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.25, 0.4, 0.6, 0.8, 1.0]
)
_NORMAL_STUDIES = 20_000  # largest number of simulated studies
_NORMAL_EXCESS = {False: 1.05, True: 1.25}
"""Type I error rate under normal noise, as a multiple of the nominal level, to which unresolved quantiles are
set: without (False) and with centered differences (True). It is above 1 because the error rates under other
noise are lower."""
_BATCH = 500  # simulated studies per NumPy call
_SEED = 0


def to_z(t: Floats, degrees: Floats | float) -> Floats:
    """Map t statistics to the scale of a standard normal distribution (approximation of Wallace 1959).

    Args:
        t: The t statistics, of either sign.
        degrees: Their degrees of freedom, which broadcast with `t`; infinity leaves t unchanged.
    """
    with np.errstate(invalid="ignore"):  # infinite degrees of freedom
        z = np.sqrt(degrees * np.log1p(t**2 / degrees)) * (1 - 2 / (8 * degrees + 3))
    return np.where(np.isinf(degrees), t, np.sign(t) * z)


def from_z(z: Floats | float, degrees: Floats) -> Floats:
    """Return the t statistics that `to_z` maps to z, for z of at least 0.

    Args:
        z: Statistics on the scale of a standard normal distribution, at least 0.
        degrees: Degrees of freedom, which broadcast with `z`.
    """
    with np.errstate(
        invalid="ignore", over="ignore"
    ):  # infinite degrees of freedom; one degree and a large z
        t = np.sqrt(degrees * np.expm1((z / (1 - 2 / (8 * degrees + 3))) ** 2 / degrees))
    return np.where(np.isinf(degrees), z, t)


@dataclass(frozen=True)
class NullDistribution:
    """Critical values of the largest z over variants, at each of `_LEVELS`: arrays of shape (levels,)."""

    equality: Floats
    """Critical values of |z|, descending, for the test of "equal to the baseline"."""
    two_sided: Floats
    """Critical values of |z|, descending, for intervals."""

    def critical_value(self, alpha: float) -> float:
        """Return the critical value of |z| for intervals with the simultaneous level 1 - alpha.

        Args:
            alpha: The error rate. At 0 the result is infinity; a value between 0 and the smallest of
                `_LEVELS` counts as that level.
        """
        if alpha <= 0:
            return np.inf
        with np.errstate(divide="ignore"):  # The critical value at level 1 may be 0.
            return float(np.exp(np.interp(np.log(alpha), np.log(_LEVELS), np.log(self.two_sided))))

    def equality_p(self, z: Floats) -> Floats:
        """Return two-sided p values of "equal to the baseline", adjusted for the number of variants."""
        levels = np.interp(np.abs(z), self.equality[::-1], np.log(_LEVELS)[::-1])
        return np.asarray(np.exp(levels))


def null_distribution(differences: Floats, alpha: float) -> NullDistribution:
    """Return the null distribution of one study.

    Args:
        differences: Variant minus baseline in each replicate, shape (n, K). A missing pair is NaN; each
            variant has at least two pairs. If the array is empty, all critical values are NaN.
        alpha: The level of the test by which the variants to center are found.
    """
    if not differences.size:
        unknown = np.full(len(_LEVELS), np.nan)
        return NullDistribution(unknown, unknown)
    known = np.isfinite(differences)
    return NullDistribution(
        *(q[0] for q in _two_steps(np.where(known, differences, 0.0)[None], known, alpha))
    )


def critical_values(differences: Floats) -> tuple[Floats, Floats]:
    """Return the critical values at level 0.05 of B simulated studies without missing pairs.

    The coverage benchmark uses this function, because `null_distribution` for each study is slower.

    Args:
        differences: Variant minus baseline, shape (B studies, n replicates, K variants).

    Returns:
        The critical values of |z| for the test of equality and for intervals, each of shape (B,).
    """
    level = np.flatnonzero(_LEVELS == 0.05)
    known = np.ones(differences.shape[1:], dtype=bool)
    equality, two_sided = _two_steps(differences, known, 0.05, level)
    return equality[:, 0], two_sided[:, 0]


def _two_steps(
    values: Floats, known: NDArray[np.bool_], alpha: float, at: NDArray[np.int64] | slice = slice(None)
) -> tuple[Floats, Floats]:
    """Return `equality` and `two_sided` of `NullDistribution` for B studies.

    Args:
        values: Differences, shape (B, n, K), with 0 for missing pairs.
        known: True for each pair that is not missing, shape (n, K).
        alpha: The level of the test by which the variants to center are found.
        at: Indices of the requested levels in `_LEVELS`.

    Returns:
        Two arrays of shape (B, levels).
    """
    n = known.sum(axis=0)
    mean = values.sum(axis=1, keepdims=True) / n
    residuals = np.where(known, values - mean, 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):  # equal differences, or alpha 0
        z = to_z(mean * np.sqrt(n) / np.sqrt((residuals**2).sum(axis=1, keepdims=True) / (n - 1)), n - 1.0)
        equality = _from_flips(values, n, np.zeros(len(values)), at)
        limit = [np.interp(np.log(alpha), np.log(_LEVELS[at]), np.log(row)) for row in equality]
        differs = np.abs(z) > (np.exp(limit) if alpha > 0 else np.full(len(values), np.inf))[:, None, None]
    two_sided = equality.copy()
    again = differs.any(axis=(1, 2))
    if again.any():
        noise = np.where(differs, residuals, values)[again]
        two_sided[again] = _from_flips(noise, n, differs[again].mean(axis=(1, 2)), at)
    return equality, two_sided


def _from_flips(
    noise: Floats, n: NDArray[np.int64], centered: Floats, at: NDArray[np.int64] | slice
) -> Floats:
    """Return critical values of |z| under sign flips, shape (B, levels).

    Args:
        noise: Differences of B studies, some of them centered, shape (B, n replicates, K), with 0 for missing
            pairs.
        n: Number of pairs of each variant, shape (K,).
        centered: Share of the variants that are centered, shape (B,). The factors with and without centering
            are averaged with this weight.
        at: Indices of the requested levels in `_LEVELS`.
    """
    factor = _normal_factors(*noise.shape[1:], False)[at]
    if centered.any():
        factor = factor + centered[:, None] * (_normal_factors(*noise.shape[1:], True)[at] - factor)
    return np.minimum.accumulate(_quantiles(_flipped_maxima(noise, n), at) * factor, axis=1)


@lru_cache(maxsize=256)
def _sign_patterns(n: int) -> Floats:
    """Return sign patterns, shape (m, n): one of each opposite pair, without the pattern of equal signs.

    If there are more than `_RANDOM_PATTERNS` of them, return that many random patterns instead.
    """
    if 2 ** (n - 1) - 1 <= _RANDOM_PATTERNS:
        codes = np.arange(1, 2 ** (n - 1))
        return np.asarray(1.0 - 2.0 * ((codes[:, None] >> np.arange(n)) & 1), dtype=np.float64)
    return np.random.default_rng(_SEED).choice([-1.0, 1.0], size=(_RANDOM_PATTERNS, n))


def _flipped_maxima(noise: Floats, n: NDArray[np.int64]) -> Floats:
    """Return the largest |z| over variants for each sign pattern, shape (B, m).

    Args:
        noise: Differences of B studies, shape (B, n replicates, K), with 0 for missing pairs.
        n: Number of pairs of each variant, shape (K,).
    """
    length = np.sqrt((noise**2).sum(axis=1, keepdims=True) * n)
    unit = noise / np.where(length > 0, length, 1.0)
    # The mean divided by the root mean square: t = x sqrt((n - 1) / (1 - x^2)).
    x = np.abs(_sign_patterns(noise.shape[1]) @ unit)
    limit = np.sqrt(1 - 1e-12)
    if (n == n[0]).all():  # z is the same monotone function of x for all variants
        x, common = x.max(axis=2).clip(max=limit), float(n[0] - 1)
        return to_z(x * np.sqrt(common / (1 - x**2)), common)
    x, degrees = x.clip(max=limit), np.asarray(n - 1, dtype=np.float64)
    return np.asarray(to_z(x * np.sqrt(degrees / (1 - x**2)), degrees).max(axis=2))


def _quantiles(maxima: Floats, at: NDArray[np.int64] | slice = slice(None)) -> Floats:
    """Return the upper quantiles over sign patterns, shape (B, levels).

    Args:
        maxima: Largest |z| for each sign pattern, shape (B, m).
        at: Indices of the requested levels in `_LEVELS`.
    """
    ordered, last = np.sort(maxima, axis=1), maxima.shape[1] - 1
    # At the level k / (m + 1) the quantile is the k-th largest of m values, as in an exact rank test.
    # (numpy.quantile computes the same with method "weibull", three times as slowly.)
    position = ((last + 2) * (1 - _LEVELS[at]) - 1).clip(0, last)
    below = np.minimum(position.astype(int), last - 1) if last else np.zeros(len(position), dtype=int)
    above = np.minimum(below + 1, last)
    found: Floats = ordered[:, below] + (position - below) * (ordered[:, above] - ordered[:, below])
    return found


@lru_cache(maxsize=256)
def _normal_factors(n: int, count: int, centered: bool) -> Floats:
    """Return the factors of the quantiles, shape (levels,).

    The factor is 1 at a level whose quantile is resolved. At other levels it is a quantile, over simulated
    studies with equal normal noise, of this ratio: the observed largest statistic divided by the quantile
    under sign flips.

    Args:
        n: Number of replicates.
        count: Number of variants.
        centered: True if the signs of centered differences are flipped.
    """
    patterns = len(_sign_patterns(n)) + 1
    unresolved = (_LEVELS * patterns < _RESOLVED) & (_LEVELS <= 0.25)
    factors = np.ones(len(_LEVELS))
    if not unresolved.any():
        return factors
    generator = np.random.default_rng(_SEED)
    ratios = []
    for _ in range(int(np.clip(4e6 / patterns, 2_000, _NORMAL_STUDIES)) // _BATCH):
        noise = generator.standard_normal((_BATCH, n, count + 1))
        d = noise[:, :, 1:] - noise[:, :, :1]
        z = to_z(d.mean(axis=1) / d.std(axis=1, ddof=1) * np.sqrt(n), n - 1.0)
        maxima = _flipped_maxima(d - d.mean(axis=1, keepdims=True) * centered, np.full(count, n))
        ratios.append(np.abs(z).max(axis=1)[:, None] / _quantiles(maxima))
    every = np.concatenate(ratios)
    for i in np.flatnonzero(unresolved):
        factors[i] = np.quantile(every[:, i], 1 - _NORMAL_EXCESS[centered] * _LEVELS[i])
    return factors
