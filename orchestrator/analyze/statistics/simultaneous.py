"""Simultaneous intervals of the mean differences of K variants from one baseline over n replicates.

Every variant has its own variance. The t statistic of each variant is mapped to the scale of a normal
distribution, |t| -> z, so that variants with different numbers of replicates or with noise from test items
share one critical value. The reference distribution of the largest z is that of random signs of the
replicates' residuals (sign-flip max-T), calibrated so that it is exact for normal noise: docs/statistics.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from orchestrator.analyze.statistics.bounds import DIFFERENCE_BOUNDS, cut_interval

Floats = NDArray[np.float64]

_SIGN_PATTERNS = 256  # random ones, if there are more than twice as many
_CALIBRATION_STUDIES = 20_000
_CALIBRATION_BATCH = 500
_SEED = 0


@dataclass(frozen=True)
class SimultaneousIntervals:
    """K variants compared with the baseline: arrays of shape (K,).

    A variant with fewer than two replicates, or whose differences are all equal and have no item error, has
    NaN instead of an interval and p values.
    """

    replicates: NDArray[np.int64]
    """Number of replicates in which the variant and the baseline have a score."""
    mean: Floats
    std: Floats
    """Standard deviation of the differences over replicates."""
    standard_error: Floats
    """Over replicates and, if given, items."""
    degrees: Floats
    """Degrees of freedom of the standard error (Satterthwaite)."""
    critical_value: Floats
    """Half of the interval's width, in standard errors."""
    low: Floats
    high: Floats
    p_differs: Floats
    """Adjusted p value of "the difference is 0", two-sided: below alpha if the interval excludes 0."""
    p_not_inferior: Floats
    """Adjusted p value of "the difference is -margin or less", one-sided."""
    p_not_superior: Floats
    """Adjusted p value of "the difference is +margin or more", one-sided: the baseline is not inferior."""
    p_not_inferior_alone: Floats
    """The same without adjustment for the number of variants, for partial conjunctions."""
    p_not_superior_alone: Floats
    z_critical: float
    """The common critical value on the scale of a normal distribution."""


def compare_with_baseline(
    differences: Floats,
    margin: float,
    *,
    alpha: float = 0.05,
    item_error: Floats | None = None,
    bounds: tuple[float, float] = DIFFERENCE_BOUNDS,
) -> SimultaneousIntervals:
    """Return simultaneous intervals and adjusted p values of K mean differences.

    Args:
        differences: Variant minus baseline in each replicate, shape (n, K); NaN for a missing pair.
        margin: The smallest difference that matters.
        alpha: One minus the simultaneous level; from `spending.level_of_look` after earlier looks.
        item_error: Standard error of each mean difference over the test items, shape (K,), from
            `item_noise.item_standard_error`; by default the sentence holds for these items only.
        bounds: The range of a difference.
    """
    known = np.isfinite(differences)
    n = known.sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(known, differences, 0.0).sum(axis=0) / n
        residuals = np.where(known, differences - mean, 0.0)
        std = np.sqrt((residuals**2).sum(axis=0) / (n - 1))
        seed_error = np.where(n > 1, std / np.sqrt(n), np.nan)
        error = np.hypot(seed_error, 0.0 if item_error is None else np.nan_to_num(item_error))
        error = np.where(error > 0, error, np.nan)
        degrees = (n - 1) * (error / seed_error) ** 4
    usable = np.isfinite(error)
    reference = _reference(residuals[:, usable], n[usable])
    z_critical = reference.critical_value(alpha)
    critical = _from_z(np.full(len(n), z_critical), degrees)
    low, high = cut_interval(mean - critical * error, mean + critical * error, bounds)

    def upper(t: Floats) -> Floats:
        return np.where(usable, reference.one_sided(np.sign(t) * _to_z(np.abs(t), degrees)), np.nan)

    return SimultaneousIntervals(
        replicates=n,
        mean=mean,
        std=std,
        standard_error=error,
        degrees=degrees,
        critical_value=critical,
        low=low,
        high=high,
        p_differs=np.where(usable, reference.two_sided(_to_z(np.abs(mean / error), degrees)), np.nan),
        p_not_inferior=upper((mean + margin) / error),
        p_not_superior=upper((margin - mean) / error),
        p_not_inferior_alone=stats.t.sf((mean + margin) / error, degrees),
        p_not_superior_alone=stats.t.sf((margin - mean) / error, degrees),
        z_critical=z_critical,
    )


def _to_z(t: Floats, degrees: Floats | float) -> Floats:
    """Map t statistics at least 0 to standard normal ones (Wallace 1959)."""
    z: Floats = np.sqrt(degrees * np.log1p(t**2 / degrees)) * (8 * degrees + 1) / (8 * degrees + 3)
    return np.where(np.isinf(degrees), t, z)


def _from_z(z: Floats, degrees: Floats) -> Floats:
    """Return the t statistic at least 0 that `_to_z` maps to z."""
    scaled = z * (8 * degrees + 3) / (8 * degrees + 1)
    t: Floats = np.sqrt(degrees * np.expm1(scaled**2 / degrees))
    return np.where(np.isinf(degrees), z, t)


@dataclass(frozen=True)
class _Reference:
    """The null distribution of the largest z over variants, for one study.

    z over `scale` is compared with the same ratio in simulated studies with normal noise.
    """

    scale: float
    """The largest |z| to expect under random signs of this study's residuals."""
    ratios: Floats
    """Sorted ratios of the largest |z| to the scale in the simulated studies."""
    upper_ratios: Floats
    """The same for the largest z, one-sided."""

    def critical_value(self, alpha: float) -> float:
        """Return the critical value of |z|; infinity at level 0."""
        if alpha <= 0 or not len(self.ratios):
            return np.inf
        return float(self.scale * np.quantile(self.ratios, 1 - alpha))

    def two_sided(self, z: Floats) -> Floats:
        """Return the probability that the largest |z| is at least as large."""
        return _tail(self.ratios, z / self.scale)

    def one_sided(self, z: Floats) -> Floats:
        """Return the probability that the largest z is at least as large."""
        return _tail(self.upper_ratios, z / self.scale)


def _tail(ordered: Floats, values: Floats) -> Floats:
    above = len(ordered) - np.searchsorted(ordered, np.nan_to_num(values))
    return np.asarray((above + 1) / (len(ordered) + 1), dtype=np.float64)


def _reference(residuals: Floats, n: NDArray[np.int64]) -> _Reference:
    """Return the null distribution for residuals of shape (n, K), with 0 for missing replicates."""
    if not residuals.shape[1]:
        return _Reference(1.0, np.empty(0), np.empty(0))
    typical = int(np.median(n))
    return _Reference(float(_flip_scale(residuals[None], n)[0]), *_calibration(typical, residuals.shape[1]))


@lru_cache(maxsize=256)
def _sign_patterns(n: int) -> Floats:
    """Return sign patterns without the trivial one, of each pair of opposite ones one, shape (m, n)."""
    if 2 ** (n - 1) - 1 <= _SIGN_PATTERNS:
        codes = np.arange(1, 2 ** (n - 1))
        return 1.0 - 2.0 * ((codes[:, None] >> np.arange(n)) & 1)
    return np.random.default_rng(_SEED).choice([-1.0, 1.0], size=(_SIGN_PATTERNS, n))


def _flip_scale(residuals: Floats, n: NDArray[np.int64]) -> Floats:
    """Return the root mean square over sign patterns of the largest |z| over variants, for B studies.

    Args:
        residuals: Shape (B, n, K), with 0 for missing replicates.
        n: Number of replicates of each variant, shape (K,).
    """
    lengths = np.sqrt((residuals**2).sum(axis=1, keepdims=True)) * np.sqrt(n)
    with np.errstate(invalid="ignore", divide="ignore"):
        unit = np.where(lengths > 0, residuals / lengths, 0.0)
    x = np.abs(_sign_patterns(residuals.shape[1]) @ unit).max(axis=2).clip(max=1 - 1e-9)
    degrees = float(np.median(n)) - 1
    z2 = -degrees * np.log1p(-(x**2)) * ((8 * degrees + 1) / (8 * degrees + 3)) ** 2
    return np.asarray(np.sqrt(z2.mean(axis=1)))


@lru_cache(maxsize=256)
def _calibration(n: int, count: int) -> tuple[Floats, Floats]:
    """Return the sorted ratios of `_Reference` in simulated studies with equal normal noise."""
    generator = np.random.default_rng(_SEED)
    ratios, upper = [], []
    each = np.full(count, n)
    for _ in range(_CALIBRATION_STUDIES // _CALIBRATION_BATCH):
        noise = generator.standard_normal((_CALIBRATION_BATCH, n, count + 1))
        d = noise[:, :, 1:] - noise[:, :, :1]
        mean = d.mean(axis=1)
        z = np.sign(mean) * _to_z(np.abs(mean) / d.std(axis=1, ddof=1) * np.sqrt(n), n - 1.0)
        scale = _flip_scale(d - mean[:, None], each)
        ratios.append(np.abs(z).max(axis=1) / scale)
        upper.append(z.max(axis=1) / scale)
    return np.sort(np.concatenate(ratios)), np.sort(np.concatenate(upper))
