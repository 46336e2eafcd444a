"""Statistical methods: intervals of scores, comparisons with a baseline, planning, optima of curves.

All methods are textbook methods on numbers and NumPy arrays. NaN stands for a missing value. Scores lie
between 0 and 1. Intervals are confidence intervals with the level 95 %. docs/statistics.md explains the
choice of each method and reports the error rates that experiments/benchmarks/coverage.py measures.

SciPy is imported inside the functions, because importing it takes longer than most commands run.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Bounds = tuple[float, float]
"""The range of possible values. An interval is cut to this range."""
UNBOUNDED: Bounds = (-math.inf, math.inf)
SCORES: Bounds = (0.0, 1.0)
DIFFERENCES: Bounds = (-1.0, 1.0)
ALPHA = 0.05
"""One minus the confidence level of all intervals."""
POWER = 0.8
"""The probability of a decision for which a number of replicates or seeds is planned."""
PEAK_WINDOW = 0.5
"""The half-width, in decades, of the window around the best grid point in which `find_peak` fits a
parabola."""
_WIDEST_GAP = 0.53
"""The largest distance, in decades, of a neighbor of the best grid point that the window holds in any case.
The gap from 3e-3 to 1e-2 is 0.523."""
_ROUNDING = 1e-12  # A smaller standard deviation is the rounding error of equal values.
_SAME_RATE = 1e-6  # Two log10 rates that differ by less count as equal.


class Estimate(NamedTuple):
    """An estimate from `n` observations with its 95 % confidence interval; NaN for a missing interval."""

    mean: float
    low: float = math.nan
    high: float = math.nan
    n: int = 0


# -- one score


def wilson(count: float, n: int) -> Estimate:
    """Return a share with its Wilson score interval (Wilson 1927), without continuity correction.

    Args:
        count: The number of successes, or the sum of values from 0 to 1. For such a sum the interval is
            conservative.
        n: The number of trials. Without a trial, all values are NaN.
    """
    if n == 0:
        return Estimate(math.nan)
    z, share = NormalDist().inv_cdf(1 - ALPHA / 2), count / n
    center = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(max(0.0, share * (1 - share)) / n + z**2 / (4 * n**2))
    # At a share of 0 the lower limit is exactly 0, and at a share of 1 the upper limit is exactly 1.
    low = 0.0 if share == 0 else max(0.0, center - half)
    return Estimate(share, low, 1.0 if share == 1 else min(1.0, center + half), n)


def mean_interval(values: ArrayLike, bounds: Bounds = UNBOUNDED) -> Estimate:
    """Return a mean over seeds with its t interval (Student 1908): mean +- t(n-1) s / sqrt(n).

    There is no interval with fewer than two values, or if all values are equal. With fewer than ten seeds,
    the percentile bootstrap would cover the true mean too rarely (75 % with three seeds).

    Args:
        values: One value for each seed.
        bounds: The range of a value. The interval is cut to this range if all values lie in it.
    """
    x = np.asarray(values, dtype=float)
    n = len(x)
    if n == 0:
        return Estimate(math.nan)
    mean = math.fsum(x) / n
    error = math.sqrt(math.fsum((x - mean) ** 2) / (n - 1) / n) if n > 1 else 0.0
    if error * math.sqrt(n) < _ROUNDING:
        return Estimate(mean, n=n)
    half = float(_t(ALPHA / 2, n - 1)) * error
    inside = ((x >= bounds[0]) & (x <= bounds[1])).all()
    return Estimate(mean, *_cut(mean - half, mean + half, bounds if inside else UNBOUNDED), n)


def score_interval(values: ArrayLike, items: int = 0) -> Estimate:
    """Return a mean score with an interval that accounts for the variance of the seeds and of the test items.

    The t interval over seeds and the Wilson interval over items are combined. At each end, the distances of
    both intervals from the mean are added in quadrature (MOVER: Zou and Donner 2008).

    Args:
        values: One score for each seed.
        items: The number of items if each score is a mean of values from 0 to 1 over items. The number is 0
            if a score is no such mean or if the number of items is unknown; the interval then accounts for
            the variance of the seeds alone.
    """
    found = mean_interval(values, SCORES)
    return _widen(found, [wilson(found.mean * items, items)], SCORES)


def gain_interval(scores: ArrayLike, untrained: ArrayLike, items: int = 0) -> Estimate:
    """Return the mean gain over the untrained base model, with an interval for seeds and test items.

    Both scores are means over the same items. Adding the Wilson errors of both scores in quadrature (Newcombe
    1998) is therefore conservative.

    Args:
        scores: One test score for each seed.
        untrained: The test score of the untrained base model for each of these seeds.
        items: As for `score_interval`.
    """
    after, before = (np.asarray(values, dtype=float) for values in (scores, untrained))
    found = mean_interval(after - before, DIFFERENCES)
    shares = (mean_interval(after).mean, 1 - mean_interval(before).mean)
    return _widen(found, [wilson(share * items, items) for share in shares], DIFFERENCES)


def _widen(found: Estimate, others: Sequence[Estimate], bounds: Bounds) -> Estimate:
    """Add the errors of other estimates to an interval over seeds, in quadrature."""
    known = [other for other in others if not math.isnan(other.mean)]
    if found.n < 2 or not known:
        return found
    low, high = (found.mean, found.mean) if math.isnan(found.low) else (found.low, found.high)
    below = math.hypot(found.mean - low, *(other.mean - other.low for other in known))
    above = math.hypot(high - found.mean, *(other.high - other.mean for other in known))
    return Estimate(found.mean, *_cut(found.mean - below, found.mean + above, bounds), found.n)


def jackknife(value: float, left_out: ArrayLike, bounds: Bounds = UNBOUNDED) -> Estimate:
    """Return a statistic of a curve with its jackknife interval (Tukey 1958).

    The interval is f +- t(n-1) sqrt((n-1)/n sum_i (f_i - g)^2). Here f is the statistic, f_i is the statistic
    without seed i, and g is the mean of all f_i. For a mean, this interval is exactly the t interval.

    Widths and regrets change abruptly when another rate becomes the best one. In simulations (7 rates; 3, 5
    and 10 seeds), their intervals cover the true value in 89 to 96 % of cases for peaked curves, and in 71 to
    96 % for curves whose differences are within the noise. Such an interval shows the scale of the
    uncertainty and is not a test.

    Args:
        value: The statistic on all seeds.
        left_out: The statistic with each seed left out in turn. There is an interval only if it has at least
            two values, none of them is NaN, and they are not all equal.
        bounds: The range of the statistic.
    """
    x = np.asarray(left_out, dtype=float)
    n = len(x)
    if n < 2 or not np.isfinite(x).all() or math.isnan(value):
        return Estimate(value, n=n)
    error = math.sqrt((n - 1) / n * math.fsum((x - math.fsum(x) / n) ** 2))
    if error < _ROUNDING:
        return Estimate(value, n=n)
    half = float(_t(ALPHA / 2, n - 1)) * error
    return Estimate(value, *_cut(value - half, value + half, bounds), n)


def _cut(low: float, high: float, bounds: Bounds) -> tuple[float, float]:
    return max(bounds[0], low), min(bounds[1], high)


def _t(tail: ArrayLike, degrees: ArrayLike) -> Floats:
    """Return the value that a t distributed variable exceeds with probability `tail`."""
    from scipy import special

    found: Floats = np.asarray(special.stdtrit(degrees, 1 - np.asarray(tail)))
    return found


# -- several variants and one baseline


@dataclass(frozen=True)
class Comparison:
    """The mean differences of K variants from one baseline: arrays of shape (K,).

    Attributes:
        n: The number of replicates in which both the variant and the baseline have a score.
        mean: The mean difference.
        std: The standard deviation of the differences over replicates.
        error: The standard error of the mean difference, over replicates and, if their error is given, test
            items. This field and the following ones are NaN with fewer than two replicates, or if the error
            is 0.
        degrees: The degrees of freedom of the standard error.
        critical: Half of the interval's width in standard errors, before the interval is cut to its bounds.
        low: The lower limits of the simultaneous confidence intervals.
        high: The upper limits of the simultaneous confidence intervals.
    """

    n: NDArray[np.int64]
    mean: Floats
    std: Floats
    error: Floats
    degrees: Floats
    critical: Floats
    low: Floats
    high: Floats


def compare(
    differences: ArrayLike,
    item_error: ArrayLike | None = None,
    alpha: float = ALPHA,
    bounds: Bounds = DIFFERENCES,
) -> Comparison:
    """Return simultaneous intervals of K mean differences: paired t intervals with Bonferroni's correction.

    Each variant has its own variance. All intervals contain their true differences with a probability of at
    least 1 - alpha, whatever the correlation between the variants is. K is the number of variants that have
    an interval.

    The standard error combines the errors of the replicates and of the test items: se^2 = se_seed^2 +
    se_item^2. The error of the items is treated as known, because there are many items. So the degrees of
    freedom (Satterthwaite 1946) are (n - 1) (se / se_seed)^4. They are infinite if se_seed is 0.

    Args:
        differences: Variant minus baseline in each replicate, shape (..., n, K), NaN for a missing pair. With
            additional leading axes, for example one for studies, the fields have the shape (..., K).
        item_error: The standard error of each mean difference over the test items, shape (K,); 0 where it is
            unknown. By default it is 0, and the results then hold for these test items only.
        alpha: One minus the simultaneous confidence level.
        bounds: The range of a difference.
    """
    d = np.asarray(differences, dtype=float)
    known = np.isfinite(d)
    n = known.sum(axis=-2)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(known, d, 0.0).sum(axis=-2) / n
        squares = np.where(known, (d - mean[..., None, :]) ** 2, 0.0)
        std = np.sqrt(squares.sum(axis=-2) / (n - 1))
        std = np.where(std < _ROUNDING, 0.0, std)
        seed_error = std / np.sqrt(n)
        error = np.hypot(seed_error, 0.0 if item_error is None else np.asarray(item_error, dtype=float))
        error = np.where((n > 1) & (error > 0), error, np.nan)
        degrees = (n - 1) * (error / seed_error) ** 4
    compared = np.isfinite(error).sum(axis=-1, keepdims=True)
    critical = _t(alpha / 2 / np.maximum(compared, 1), degrees)
    low, high = (np.clip(mean + sign * critical * error, *bounds) for sign in (-1, 1))
    return Comparison(n, mean, std, error, degrees, critical, low, high)


def not_superior_p(found: Comparison, margin: float) -> Floats:
    """Return one-sided p values of "the difference is at least +margin" by the paired t test, shape (K,).

    The p values are not corrected for the number of variants; `count_shown` corrects them.
    """
    from scipy import special

    p: Floats = np.asarray(special.stdtr(found.degrees, (found.mean - margin) / found.error))
    return p


def holm(p: ArrayLike) -> Floats:
    """Return p values with Holm's step-down correction (Holm 1979), which is valid under any dependence.

    Args:
        p: P values, shape (K,). A NaN stays NaN and does not count as a comparison.
    """
    values = np.asarray(p, dtype=float)
    corrected = np.full(values.shape, np.nan)
    order = np.argsort(values)[: int(np.isfinite(values).sum())]
    factors = np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(factors * values[order]))
    return corrected


def count_shown(p: ArrayLike, alpha: float = ALPHA) -> int:
    """Return how many of K null hypotheses Holm's procedure rejects.

    This number is a lower confidence bound, at level 1 - alpha, of the number of false null hypotheses. It is
    a partial conjunction test with Bonferroni's combination (Benjamini and Heller 2008).

    Args:
        p: P values without correction for multiple comparisons, shape (K,). A NaN counts as 1.
        alpha: The error rate of the bound.
    """
    return int((holm(np.nan_to_num(np.asarray(p, dtype=float), nan=1.0)) <= alpha).sum())


def paired_share_p(won: int, lost: int) -> float:
    """Return the two-sided p value of "both succeed equally often" by McNemar's exact test (McNemar 1947).

    Args:
        won: The number of pairs in which the first succeeds and the second does not.
        lost: The number of pairs in which the second succeeds and the first does not.
    """
    n = won + lost
    tail = sum(math.comb(n, k) for k in range(min(won, lost) + 1))
    return min(1.0, float(2 * tail / 2**n))


def item_error(differences: ArrayLike) -> float:
    """Return the standard error of a mean difference over test items, clustered by item (Miller 2024).

    The results of one item in several replicates are correlated. The difference of each item is therefore
    averaged over the replicates before the standard error is computed.

    Args:
        differences: Variant minus baseline on each item, shape (replicates, items).

    Returns:
        The standard error; NaN without a replicate or with fewer than two items.
    """
    d = np.asarray(differences, dtype=float)
    if d.ndim < 2 or not len(d) or d.shape[1] < 2:
        return math.nan
    return float(d.mean(axis=0).std(ddof=1)) / math.sqrt(d.shape[1])


# -- outcomes of a comparison


OUTCOMES: tuple[tuple[str, Callable[[float, float, float], bool]], ...] = (
    # A difference below the margin does not matter, even if the interval excludes 0.
    ("equivalent", lambda low, high, margin: -margin < low and high < margin),
    ("better", lambda low, high, margin: low > 0),
    ("worse", lambda low, high, margin: high < 0),
    ("not inferior", lambda low, high, margin: low > -margin),
)
"""Outcome of a comparison -> its predicate of (low, high, margin). The first predicate that is true
decides."""


def classify(low: float, high: float, margin: float) -> str:
    """Return the outcome of a comparison: a name in `OUTCOMES`, or "undecided".

    If the intervals of several variants hold simultaneously, their outcomes hold simultaneously, too.

    Args:
        low: The lower limit of variant minus baseline; NaN if there is no interval.
        high: The upper limit of variant minus baseline.
        margin: The smallest difference that matters, above 0.
    """
    return next((name for name, holds in OUTCOMES if holds(low, high, margin)), "undecided")


def counts_for_baseline(low: float, high: float, margin: float) -> str:
    """Return whether a comparison shows that the tuned baseline matches or beats the variant.

    Args:
        low: The lower limit of variant minus baseline; NaN if there is no interval.
        high: The upper limit of variant minus baseline.
        margin: The smallest difference that matters, above 0.

    Returns:
        "yes" if the interval lies below the margin, "no" if it lies above the margin, otherwise "open".
    """
    return "yes" if high < margin else "no" if low > margin else "open"


# -- planning


def replicates_to_decide(
    std: float,
    margin: float,
    comparisons: int,
    item_error: float = 0.0,
    power: float = POWER,
    alpha: float = ALPHA,
    most: int = 1000,
) -> int | None:
    """Return the number of replicates that decides a comparison for the least favorable true difference.

    A comparison is decided if its interval lies above -margin ("better", "equivalent" or "not inferior") or
    below 0 ("worse"). The least favorable true difference is -margin / 2, halfway between these two limits.
    There, both decisions have the same probability Phi((margin / 2 - t se) / se), where Phi is the normal
    distribution function, se is the standard error and t is the critical value of `compare`.

    The two decisions exclude each other. The probability of a decision is therefore the sum of both
    probabilities. It is `power` if se (t - z) = margin / 2, where z is the normal quantile of 1 - power / 2.

    Args:
        std: The standard deviation of the difference over replicates, taken as the true one.
        margin: The smallest difference that matters, above 0.
        comparisons: The number of variants that are compared with the baseline.
        item_error: The standard error over the test items, which more replicates do not reduce.
        power: The probability of a decision.
        alpha: One minus the simultaneous confidence level.
        most: The largest number of replicates that is considered.

    Returns:
        The smallest sufficient number, at least 2; None if it is above `most`.
    """
    z = NormalDist().inv_cdf(1 - power / 2)

    def decides(n: int) -> bool:
        seed_error = std / math.sqrt(n)
        error = math.hypot(seed_error, item_error)
        degrees = (n - 1) * (error / seed_error) ** 4 if seed_error else math.inf
        return error * (float(_t(alpha / 2 / comparisons, degrees)) - z) <= margin / 2

    return _fewest(decides, most)


def replicates_to_exceed(excess: float, std: float, most: int) -> int | None:
    """Return the number of replicates at which a one-sided t test has a power of `POWER`.

    The test shows that a mean lies above a limit. Its power follows from the noncentral t distribution.

    Args:
        excess: The true mean minus the limit.
        std: The true standard deviation over replicates.
        most: The largest number of replicates that is considered.

    Returns:
        The smallest sufficient number, at least 2; None if it is above `most`, or if `excess` or `std` is not
        above 0.
    """
    from scipy import special

    def shows(n: int) -> bool:
        error = special.nctdtr(n - 1, excess / std * math.sqrt(n), _t(ALPHA, n - 1))
        # SciPy returns NaN if the shift is so large that the error is practically 0.
        return not error > 1 - POWER

    return _fewest(shows, most) if excess > 0 and std > 0 else None


def _fewest(is_enough: Callable[[int], bool], most: int) -> int | None:
    """Return the smallest number from 2 to `most` that is enough; None if `most` is not enough.

    Args:
        is_enough: The predicate. If it is true for a number, it is true for all larger numbers.
        most: The largest number.
    """
    if not is_enough(most):
        return None
    return 2 + bisect_left(range(2, most), True, key=is_enough)


def expected_span(errors: ArrayLike) -> float:
    """Return the expected range (best minus worst mean score) of K variants with equal true scores.

    It is the expected range of independent normal values (Tippett 1925), here with unequal standard errors.

    Args:
        errors: The standard error of each variant's mean score, shape (K,). The errors of the means are taken
            to be independent and normal.

    Returns:
        The expected range; 0 with fewer than two variants.
    """
    from scipy import integrate, special

    every = np.asarray(errors, dtype=float)
    known = every[every > 0]
    if len(every) < 2 or not len(known):
        return 0.0
    limit = 9 * float(known.max())
    zeros = len(every) > len(known)

    def outside(x: float) -> float:
        """Return the probability that the best mean is above x and the worst mean is below x."""
        below = special.ndtr(x / known).prod() * (x >= 0 or not zeros)
        above = special.ndtr(-x / known).prod() * (x < 0 or not zeros)
        return float(1.0 - below - above)

    return float(integrate.quad(outside, -limit, limit, points=[0.0], limit=200)[0])


# -- optimum of a curve


class Peak(NamedTuple):
    """The optimum of a curve of scores over learning rates.

    Attributes:
        log10_rate: Log10 of the learning rate at the optimum.
        interpolated: True if the optimum is the maximum of the fitted parabola, False if it is the best grid
            point.
        at_edge: True if the best grid point is the first or the last one. The true optimum may then lie
            outside of the grid.
    """

    log10_rate: float
    interpolated: bool
    at_edge: bool


def find_peak(log10_rates: Floats, scores: Floats, seeds: Floats) -> Peak:
    """Return the maximum of a parabola that is fitted to the points near the best grid point.

    The fit is a weighted least squares fit to the points within `PEAK_WINDOW` of the best grid point, and to
    both neighbors in a grid like 1e-3, 3e-3, 1e-2. The weights are the numbers of seeds. The result is the
    best grid point itself if the window has fewer than three points, or if the parabola has no maximum
    between the outermost points of the window.

    Args:
        log10_rates: Log10 of the learning rate of each grid point, shape (m,), in any order.
        scores: The mean score over seeds, shape (m,); NaN for a point without a score.
        seeds: The number of seeds in each mean, shape (m,).

    Raises:
        ValueError: No point has a score.
    """
    known = np.isfinite(scores) & (seeds > 0)
    if not known.any():
        raise ValueError("a curve without a score has no optimum")
    x, y, weights = log10_rates[known], scores[known], seeds[known]
    best = int(np.argmax(y))
    ends = log10_rates.min() + _SAME_RATE, log10_rates.max() - _SAME_RATE
    grid_point = Peak(float(x[best]), False, not ends[0] < x[best] < ends[1])
    distance = np.abs(x - x[best])
    near = distance <= PEAK_WINDOW + _SAME_RATE
    for side in (x < x[best], x > x[best]):
        near |= side & (distance <= min(_WIDEST_GAP, distance[side].min(initial=math.inf)))
    if near.sum() < 3:
        return grid_point
    offsets = x[near] - x[best]
    curvature, slope, _ = np.polyfit(offsets, y[near], 2, w=np.sqrt(weights[near]))
    top = -slope / (2 * curvature) if curvature < 0 else math.inf
    if not offsets.min() < top < offsets.max():
        return grid_point
    return grid_point._replace(log10_rate=float(x[best] + top), interpolated=True)


def find_optimum(log10_rates: Floats, scores: Floats) -> tuple[Peak, Floats]:
    """Return the optimum of the mean curve, and log10 of the best rate without each seed in turn.

    A statistic of several curves, such as the ratio of two best rates, leaves out the same seed of all curves
    at once. The results are the values for `jackknife`.

    Args:
        log10_rates: Log10 of the learning rates, shape (rates,).
        scores: One score for each rate and seed, shape (rates, seeds); NaN for a missing score.

    Returns:
        The optimum of the mean over the known seeds, and the log10 rates, shape (seeds,). Without a score at
        any rate, the log10 rates are NaN.

    Raises:
        ValueError: No rate has a score.
    """
    seeds = scores.shape[1]
    kept = [np.delete(scores, seed, axis=1) for seed in range(seeds)]
    left_out = [
        find_peak(log10_rates, *_means(each)).log10_rate if np.isfinite(each).any() else math.nan
        for each in kept
    ]
    return find_peak(log10_rates, *_means(scores)), np.array(left_out)


def _means(scores: Floats) -> tuple[Floats, Floats]:
    """Return the mean of the known scores at each rate and their number, each of shape (rates,)."""
    known = np.isfinite(scores)
    count = known.sum(axis=1).astype(float)
    total = np.where(known, scores, 0.0).sum(axis=1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan), count
