"""Which variants differ from one baseline: test scores of fresh seeds, paired by seed. Plain numbers.

d(v, s) = score(v, s) - score(baseline, s). The variance of d is pooled over the variants, v = 1 ... K:

    s^2 = sum_v sum_s (d(v, s) - mean d(v))^2 / sum_v (n_v - 1);    mean d(v) has the error s / sqrt(n_v).

All d share the baseline's noise: any two are correlated by 1/2, so that s^2 has 4 / (K + 3) times its sum_v
(n_v - 1) degrees of freedom (Satterthwaite; all of them when K = 1). Simultaneous intervals are Dunnett's:
mean d(v) -+ c s / sqrt(n_v), c from the multivariate t with that correlation. What is said of a variant is
read off its interval, so that word and picture cannot disagree and all words hold at once: better above nil,
worse below it, equivalent within the margin, not inferior above minus the margin. Beside it stand the p
values of t tests with Holm's correction over the variants, for each of three questions: a difference,
equivalence (two one-sided tests), and not inferior. Holm's can be smaller than the interval would say.

A variant whose differences spread more than the others' (F test at 5 %, shared among the variants) leaves
the pool and is judged by its own variance, its critical value by Sidak. Simulated simultaneous coverage with
four variants and ten seeds (3,000 draws): 95.7 % with equal spreads, 94.1 % when one variant spreads four
times as far and 93.4 % twice as far, 96.6 % when the baseline spreads three times as far; without that rule
86.1 % in the second case.

With any of its seeds (or of the baseline's) diverged a variant gets no interval and no test: the floor makes
two humps of the scores, which no t covers. The share of diverged seeds and the mean of the rest stand there
instead, and the claim counts the variant as unknown. So an interval is about runs that do not diverge: ten
seeds without a divergence leave a share of up to 28 % open. Simulated (four variants, ten seeds, 2,000
draws, one variant diverging with the share 5 %, 15 %, 30 %): all intervals hold at once for the runs that do
not diverge in 95, 95 and 94 % of the studies; for the mean that counts a divergence as the floor in 41, 77
and 91 % only, as in the other studies none of the ten seeds happens to diverge.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from orchestrator.analyze.intervals import (
    CONFIDENCE_LEVEL,
    Estimate,
    Interval,
    estimate_mean,
    wilson_interval,
)
from orchestrator.analyze.power import (
    dunnett_critical_value,
    holm_correction,
    minimum_detectable_effect,
    one_sided_p_value,
    seeds_needed,
    sidak_critical_value,
)

Outcome = Literal["better", "worse", "equivalent", "not inferior", "undecided"]
Claim = Literal["supported", "refuted", "undecided"]

POWER = 0.8
VARIANCE_TEST_LEVEL = 0.05
"""Level of the test by which a variant leaves the pool."""


@dataclass(frozen=True)
class SeedScore:
    """One seed's test score; a diverged run's is the task's floor."""

    value: float
    diverged: bool = False


@dataclass(frozen=True)
class Arm:
    """A variant's own scores: the mean with the floor for diverged seeds, the mean of the rest, and Wilson's
    interval of the share that diverged. The mean has no interval where any diverged."""

    label: str
    test: Estimate
    survivors: Estimate
    diverged: int
    diverged_interval: Interval | None


@dataclass(frozen=True)
class PairedComparison:
    """A variant against the baseline. `dropped`: seeds with a score in only one of the two. Figures are None
    where there is no interval, and `reason` says why. All p values are Holm's. `detectable`: the smallest
    true difference that had an 80 % chance to be told from nil. `seeds_to_decide`: for an undecided one, the
    seeds that decide it with an 80 % chance if the truth is what was seen; None: more than 1,000."""

    label: str
    seeds: tuple[int, ...]
    dropped: tuple[int, ...]
    difference: float | None
    reason: str = ""
    interval: Interval | None = None
    p_differs: float | None = None
    p_equivalent: float | None = None
    p_not_inferior: float | None = None
    outcome: Outcome = "undecided"
    detectable: float | None = None
    seeds_to_decide: int | None = None


@dataclass(frozen=True)
class Comparison:
    """All variants against `baseline`. `spread`: the pooled standard deviation of the differences.
    `correlation`: of the scores of a variant and the baseline over seeds, mean over variants;
    `pairing_helps`: whether seeds differ by more than the noise (F test at 5 %).

    `baseline_holds`: the simultaneous interval on the number of variants, of `counted`, to which the baseline
    is not inferior. Controls (full fine-tuning, the head alone) are no variants and not counted. `unknown`:
    variants that cannot be compared at all; they count, as ones of which nothing is known.
    """

    baseline: Arm
    arms: tuple[Arm, ...]
    pairs: tuple[PairedComparison, ...]
    margin: float
    spread: float | None
    correlation: float | None
    pairing_helps: bool | None
    counted: int
    baseline_holds: tuple[int, int]
    claim: Claim
    level: float = CONFIDENCE_LEVEL
    unknown: tuple[str, ...] = ()


ScoresBySeed = Mapping[int, SeedScore]


def compare_to_baseline(
    scores: Mapping[str, ScoresBySeed],
    baseline: str,
    margin: float,
    controls: Collection[str] = (),
    level: float = CONFIDENCE_LEVEL,
    unknown: Collection[str] = (),
) -> Comparison:
    """`scores`: label -> seed -> test score; a seed that is not there is missing. The pairs are sorted by
    difference, the highest first, those without one last. KeyError without the baseline."""
    arms = {label: _summarize_arm(label, list(own.values()), level) for label, own in scores.items()}
    others = sorted(label for label in scores if label != baseline)
    shared_seeds = {v: sorted(set(scores[v]) & set(scores[baseline])) for v in others}
    d = {v: [scores[v][s].value - scores[baseline][s].value for s in shared_seeds[v]] for v in others}
    exclusion_reasons = {v: _exclusion_reason(arms[v], arms[baseline], len(shared_seeds[v])) for v in others}
    tested = [v for v in others if not exclusion_reasons[v]]
    errors = _difference_errors({v: d[v] for v in tested}, level)
    p = _corrected_p_values(d, errors, margin)
    pairs = []
    for v in others:
        mean = math.fsum(d[v]) / len(d[v]) if d[v] else None
        dropped = tuple(sorted(set(scores[v]) ^ set(scores[baseline])))
        pair = PairedComparison(v, tuple(shared_seeds[v]), dropped, mean, exclusion_reasons[v])
        if v in errors and mean is not None:
            pair = _apply_tests(
                pair, mean, errors[v], (p[0][v], p[1][v], p[2][v]), margin, len(tested), level
            )
        pairs.append(pair)
    pairs.sort(key=lambda x: (x.difference is None, -(x.difference or 0.0), x.label))
    missing = tuple(sorted(set(unknown) - set(scores)))
    counted = [pair for pair in pairs if pair.label not in controls]
    number = len(counted) + sum(label not in controls for label in missing)
    holds_for = _baseline_holds_interval(counted, margin, number)
    pooled = [e.std for e in errors.values() if e.pooled]
    common_seeds = sorted(set.intersection(*(set(scores[v]) for v in [baseline, *tested])))
    table = [[scores[v][seed].value for seed in common_seeds] for v in [baseline, *tested]]
    correlation, helps = _pairing_gain(table, 1 - level)
    return Comparison(
        arms[baseline],
        tuple(arms[pair.label] for pair in pairs),
        tuple(pairs),
        margin,
        pooled[0] if pooled else None,
        correlation,
        helps,
        number,
        holds_for,
        _decide_claim(holds_for, number),
        level,
        missing,
    )


def _apply_tests(
    pair: PairedComparison,
    mean: float,
    error: _DifferenceError,
    p_values: tuple[float, float, float],
    margin: float,
    count: int,
    level: float,
) -> PairedComparison:
    interval = Interval(
        mean - error.critical_value * error.standard_error, mean + error.critical_value * error.standard_error
    )
    outcome = _classify_interval(interval, margin)
    degrees_per_seed = error.degrees / (len(pair.seeds) - 1)
    needed = (
        seeds_needed(mean, margin, error.std, count, degrees_per_seed, POWER, level, error.pooled)
        if outcome == "undecided"
        else None
    )
    return replace(
        pair,
        reason="" if error.pooled else "its differences spread more than the others': its own variance",
        interval=interval,
        p_differs=p_values[0],
        p_equivalent=p_values[1],
        p_not_inferior=p_values[2],
        outcome=outcome,
        detectable=error.standard_error
        * minimum_detectable_effect(error.critical_value, error.degrees, POWER),
        seeds_to_decide=needed,
    )


def _summarize_arm(label: str, own: Sequence[SeedScore], level: float) -> Arm:
    num_diverged = sum(score.diverged for score in own)
    test = estimate_mean([score.value for score in own], level)
    return Arm(
        label,
        Estimate(test.n, test.mean) if num_diverged else test,
        estimate_mean([score.value for score in own if not score.diverged], level),
        num_diverged,
        wilson_interval(num_diverged, len(own), level),
    )


def _exclusion_reason(arm: Arm, baseline: Arm, paired: int) -> str:
    """Why a variant gets no interval; empty: it gets one."""
    if paired < 2:
        return f"{paired} seed{'' if paired == 1 else 's'} with a score of both"
    for who in (arm, baseline):
        if who.diverged:
            suffix = "" if who is arm else f" of {who.label}"
            return f"{who.diverged} of {who.test.n} seeds{suffix} diverged"
    return ""


@dataclass(frozen=True)
class _DifferenceError:
    """Of a mean difference: its standard error is `size`, `spread` is that of one difference."""

    standard_error: float
    std: float
    degrees: float
    critical_value: float
    pooled: bool


def _difference_errors(d: Mapping[str, Sequence[float]], level: float) -> dict[str, _DifferenceError]:
    squares = {v: math.fsum((x - math.fsum(own) / len(own)) ** 2 for x in own) for v, own in d.items()}
    degrees = {v: len(own) - 1 for v, own in d.items()}
    pool = _poolable_variants(squares, degrees)
    found = {}
    total = sum(degrees[v] for v in pool)
    if pool:
        std, pooled_degrees = (
            math.sqrt(math.fsum(squares[v] for v in pool) / total),
            total * 4 / (len(pool) + 3),
        )
        critical = dunnett_critical_value(len(d), pooled_degrees, level)
        for v in pool:
            found[v] = _DifferenceError(std / math.sqrt(len(d[v])), std, pooled_degrees, critical, True)
    for v in set(d) - set(pool):
        std = math.sqrt(squares[v] / degrees[v])
        critical = sidak_critical_value(len(d), degrees[v], level)
        found[v] = _DifferenceError(std / math.sqrt(len(d[v])), std, degrees[v], critical, False)
    return found


def _poolable_variants(squares: Mapping[str, float], degrees: Mapping[str, int]) -> list[str]:
    """The variants whose variances may be pooled: the widest leaves while it is wider than all the rest."""
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


def _corrected_p_values(
    d: Mapping[str, Sequence[float]], errors: Mapping[str, _DifferenceError], margin: float
) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """Holm's p values of: it differs, it lies within the margin, it is not below minus the margin."""
    differs, equivalent, not_inferior = {}, {}, {}
    for v, error in errors.items():
        mean = math.fsum(d[v]) / len(d[v])
        differs[v] = min(1.0, 2 * one_sided_p_value(abs(mean), error.standard_error, error.degrees))
        not_inferior[v] = one_sided_p_value(mean + margin, error.standard_error, error.degrees)
        equivalent[v] = max(
            not_inferior[v], one_sided_p_value(margin - mean, error.standard_error, error.degrees)
        )
    return holm_correction(differs), holm_correction(equivalent), holm_correction(not_inferior)


def _classify_interval(interval: Interval, margin: float) -> Outcome:
    """Equivalent comes first: a difference that is shown to be smaller than what matters is none, even where
    it can be told from nil."""
    if -margin < interval.low and interval.high < margin:
        return "equivalent"
    if interval.low > 0:
        return "better"
    if interval.high < 0:
        return "worse"
    return "not inferior" if interval.low > -margin else "undecided"


def _baseline_holds_interval(
    pairs: Sequence[PairedComparison], margin: float, number: int
) -> tuple[int, int]:
    """The intervals hold all at once, so what they say together does: at least as many variants as lie below
    the margin as a whole; at most all but those that lie above it as a whole."""
    sure = sum(pair.interval is not None and pair.interval.high < margin for pair in pairs)
    lost = sum(pair.interval is not None and pair.interval.low > margin for pair in pairs)
    return sure, number - lost


def _decide_claim(holds: tuple[int, int], counted: int) -> Claim:
    if counted and holds[0] > counted / 2:
        return "supported"
    return "refuted" if counted and holds[1] <= counted / 2 else "undecided"


def _pairing_gain(rows: Sequence[Sequence[float]], alpha: float) -> tuple[float | None, bool | None]:
    """Of pairing by seed: the mean correlation of the first row with the others, and whether seeds differ by
    more than the noise in the table of rows x seeds."""
    import numpy as np
    from scipy import stats

    table = np.array(rows)
    if len(table) < 2 or table.shape[1] < 3:
        return None, None
    centred = table - table.mean(axis=1, keepdims=True)
    size = np.sqrt((centred**2).sum(axis=1))
    known = [
        centred[0] @ own / (size[0] * s)
        for own, s in zip(centred[1:], size[1:], strict=True)
        if size[0] * s > 0
    ]
    by_seed = centred.mean(axis=0)
    rest, (k, n) = ((centred - by_seed) ** 2).sum(), table.shape
    if not known or rest <= 0:
        return (float(np.mean(known)) if known else None), (True if known else None)
    ratio = k * (by_seed**2).sum() / (rest / (k - 1))
    return float(np.mean(known)), bool(stats.f.sf(ratio, n - 1, (k - 1) * (n - 1)) < alpha)
