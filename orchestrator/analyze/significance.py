"""Comparison of variants with one baseline: test scores of fresh seeds, paired by seed. Plain numbers only.

The difference of variant v at seed s is d(v, s) = score(v, s) - score(baseline, s). The variance of d is
pooled over the variants v = 1 ... K, of n_v seeds each:

    S^2 = sum_v sum_s (d(v, s) - mean d(v))^2 / sum_v (n_v - 1);    mean d(v) has the error S / sqrt(n_v).

All d share the baseline's noise, so any two of them are correlated by 1/2. Therefore S^2 has 4 / (K + 3)
times its sum_v (n_v - 1) degrees of freedom (Satterthwaite; all of them if K = 1). The simultaneous intervals
are Dunnett's: mean d(v) -+ c S / sqrt(n_v), with c from the multivariate t distribution of that correlation.

The outcome of a variant is read off its interval, so that text and plot agree and all outcomes hold
simultaneously: better (above 0), worse (below 0), equivalent (within the margin), not inferior (above minus
the margin). The p values are given in addition. They are those of t tests with Holm's correction over the
variants, for three questions: difference, equivalence (two one-sided tests) and non-inferiority. Holm's
correction may reject a hypothesis that the interval does not yet reject.

A variant whose differences vary more than those of the others (F test at 5 %, shared among the variants) is
excluded from the pool. Its interval is from its own variance, with Sidak's critical value. The simulated
simultaneous coverage with four variants and ten seeds (3,000 draws) is 95.7 % with equal standard deviations;
94.1 % if that of one variant is four times as large and 93.4 % if it is twice as large; 96.6 % if the
baseline's is three times as large. Without the exclusion, the coverage in the second case is 86.1 %.

If any seed of a variant or of the baseline diverged, the variant gets no interval and no test: with the floor
among them the scores have two modes, which no t distribution covers. The share of diverged seeds and the mean
of the others are given instead, and the claim counts the variant as unknown. So an interval describes only
runs that do not diverge: ten seeds without a divergence leave a share of up to 28 % possible. In simulations
with four variants, ten seeds and 2,000 draws, one variant diverges with probability 5 %, 15 % and 30 %. For
runs that do not diverge, all intervals hold in 95, 95 and 94 % of the studies. For the mean that counts a
divergence as the floor they hold in only 41, 77 and 91 %, because in the other studies none of the ten seeds
happens to diverge.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from orchestrator.analyze import power
from orchestrator.analyze.intervals import (
    CONFIDENCE_LEVEL,
    Estimate,
    Interval,
    estimate_mean,
    wilson_interval,
)
from orchestrator.analyze.pooled_errors import DifferenceError, estimate_errors

Outcome = Literal["better", "worse", "equivalent", "not inferior", "undecided"]
Claim = Literal["supported", "refuted", "undecided"]


@dataclass(frozen=True)
class SeedScore:
    """The test score of one seed; the task's floor for a diverged run."""

    value: float
    diverged: bool = False


@dataclass(frozen=True)
class Arm:
    """The scores of one variant."""

    label: str
    test: Estimate
    """The mean, with the floor for diverged seeds. It has no interval if any seed diverged."""
    without_diverged: Annotated[Estimate, Field(alias="survivors")]
    """The mean of the seeds that did not diverge."""
    diverged: int
    """The number of diverged seeds."""
    diverged_interval: Interval | None
    """Wilson's interval of the share of diverged seeds."""


@dataclass(frozen=True)
class PairedComparison:
    """A variant compared with the baseline. Without an interval all numbers but the difference are None."""

    label: str
    seeds: tuple[int, ...]
    """The seeds of which both have a score."""
    dropped: tuple[int, ...]
    """The seeds of which only one of the two has a score."""
    difference: float | None
    """The mean difference of the test score."""
    reason: str = ""
    """The reason why there is no interval, or why it is not from the pooled variance."""
    interval: Interval | None = None
    """The simultaneous interval of the difference."""
    p_differs: float | None = None
    """Holm's p value of the hypothesis that there is no difference."""
    p_equivalent: float | None = None
    """Holm's p value of the hypothesis that the difference is at least as large as the margin."""
    p_not_inferior: float | None = None
    """Holm's p value of the hypothesis that the variant is worse by the margin or more."""
    outcome: Outcome = "undecided"
    minimum_detectable_effect: Annotated[float | None, Field(alias="detectable")] = None
    """The smallest true difference that is detected with probability `power.POWER`."""
    seeds_to_decide: int | None = None
    """Number of seeds that decides an undecided comparison with probability `power.POWER` if the observed
    difference is the true one; None above 1,000."""


@dataclass(frozen=True)
class Comparison:
    """All variants compared with the baseline."""

    baseline: Arm
    arms: tuple[Arm, ...]
    """The variants, in the order of `pairs`."""
    pairs: tuple[PairedComparison, ...]
    """The comparisons, the largest difference first, those without one last."""
    margin: float
    """The smallest difference of the test score that matters."""
    difference_std: Annotated[float | None, Field(alias="spread")]
    """The pooled standard deviation of the differences."""
    correlation: float | None
    """The correlation over seeds of a variant's scores with the baseline's, the mean over variants."""
    pairing_helps: bool | None
    """True if seeds differ by more than the noise (F test at 5 %)."""
    counted: int
    """Number of variants that the claim is about, without controls (full fine-tuning, the head alone)."""
    baseline_not_inferior_to: Annotated[tuple[int, int], Field(alias="baseline_holds")]
    """The interval on the number of counted variants to which the baseline is not inferior."""
    claim: Claim
    """The claim that the baseline matches or beats most variants."""
    level: float = CONFIDENCE_LEVEL
    not_compared: Annotated[tuple[str, ...], Field(alias="unknown")] = ()
    """Variants without any score. The claim counts their outcome as unknown."""


ScoresBySeed = Mapping[int, SeedScore]
"""Seed -> test score. A seed without a score is missing."""


def compare_to_baseline(
    scores: Mapping[str, ScoresBySeed],
    baseline: str,
    margin: float,
    controls: Collection[str] = (),
    expected: Collection[str] = (),
) -> Comparison:
    """Compare every variant with the baseline.

    Args:
        scores: Label -> the scores of the variant.
        baseline: The label of the baseline.
        margin: The smallest difference that matters.
        controls: Labels that the claim does not count.
        expected: Labels that the claim counts, whether or not they have scores.

    Raises:
        KeyError: The baseline has no scores.
    """
    arms = {label: _summarize_arm(label, list(own.values())) for label, own in scores.items()}
    pairs, difference_std = _compare_pairs(scores, arms, arms[baseline], margin)
    missing = tuple(sorted(set(expected) - set(scores)))
    counted = [pair for pair in pairs if pair.label not in controls]
    number = len(counted) + sum(label not in controls for label in missing)
    holds_for = _baseline_holds_interval(counted, margin, number)
    tested = [baseline, *sorted(pair.label for pair in pairs if pair.interval is not None)]
    common_seeds = sorted(set.intersection(*(set(scores[v]) for v in tested)))
    correlation, pairing_helps = _pairing_gain([[scores[v][s].value for s in common_seeds] for v in tested])
    return Comparison(
        baseline=arms[baseline],
        arms=tuple(arms[pair.label] for pair in pairs),
        pairs=tuple(pairs),
        margin=margin,
        difference_std=difference_std,
        correlation=correlation,
        pairing_helps=pairing_helps,
        counted=number,
        baseline_not_inferior_to=holds_for,
        claim=_decide_claim(holds_for, number),
        not_compared=missing,
    )


def _compare_pairs(
    scores: Mapping[str, ScoresBySeed], arms: Mapping[str, Arm], baseline: Arm, margin: float
) -> tuple[list[PairedComparison], float | None]:
    """Return all comparisons, sorted, and the pooled standard deviation of the differences."""
    base = scores[baseline.label]
    others = sorted(label for label in scores if label != baseline.label)
    shared_seeds = {v: sorted(set(scores[v]) & set(base)) for v in others}
    d = {v: [scores[v][s].value - base[s].value for s in shared_seeds[v]] for v in others}
    means = {v: math.fsum(own) / len(own) for v, own in d.items() if own}
    reasons = {v: _exclusion_reason(arms[v], baseline, len(shared_seeds[v])) for v in others}
    errors = estimate_errors({v: d[v] for v in others if not reasons[v]})
    p_values = _corrected_p_values(means, errors, margin)
    pairs = []
    for v in others:
        dropped = tuple(sorted(set(scores[v]) ^ set(base)))
        pair = PairedComparison(
            v, tuple(shared_seeds[v]), dropped, means.get(v), reasons[v], **p_values.get(v, {})
        )
        pairs.append(_apply_error(pair, means[v], errors[v], margin, len(errors)) if v in errors else pair)
    pairs.sort(key=lambda x: (x.difference is None, -(x.difference or 0.0), x.label))
    return pairs, next((error.std for error in errors.values() if error.pooled), None)


def _apply_error(
    pair: PairedComparison, mean: float, error: DifferenceError, margin: float, count: int
) -> PairedComparison:
    """Add to `pair`, one of `count` tested pairs, its interval, outcome and power."""
    half = error.critical_value * error.standard_error
    interval = Interval(mean - half, mean + half)
    outcome = _classify_interval(interval, margin)
    degrees_per_seed = error.degrees / (len(pair.seeds) - 1)
    critical_value = power.dunnett_critical_value if error.pooled else power.sidak_critical_value
    needed = None
    if outcome == "undecided":
        needed = power.seeds_needed(mean, margin, error.std, degrees_per_seed, partial(critical_value, count))
    detectable = error.standard_error * power.minimum_detectable_effect(error.critical_value, error.degrees)
    return replace(
        pair,
        reason="" if error.pooled else "its differences vary more than the others': its own variance",
        interval=interval,
        outcome=outcome,
        minimum_detectable_effect=detectable,
        seeds_to_decide=needed,
    )


def _summarize_arm(label: str, own: Sequence[SeedScore]) -> Arm:
    diverged = sum(score.diverged for score in own)
    test = estimate_mean([score.value for score in own])
    without_diverged = estimate_mean([score.value for score in own if not score.diverged])
    test = Estimate(test.n, test.mean) if diverged else test
    return Arm(label, test, without_diverged, diverged, wilson_interval(diverged, len(own)))


def _exclusion_reason(arm: Arm, baseline: Arm, paired: int) -> str:
    """Return why a variant gets no interval; empty if it gets one."""
    if paired < 2:
        return f"{paired} seed{'' if paired == 1 else 's'} with a score of both"
    for who in (arm, baseline):
        if who.diverged:
            suffix = "" if who is arm else f" of {who.label}"
            return f"{who.diverged} of {who.test.n} seeds{suffix} diverged"
    return ""


def _corrected_p_values(
    means: Mapping[str, float], errors: Mapping[str, DifferenceError], margin: float
) -> dict[str, dict[str, Any]]:
    """Return Holm's p values of the three tests: variant -> field of `PairedComparison` -> p value."""
    differs, equivalent, not_inferior = {}, {}, {}
    for v, error in errors.items():
        p_above = partial(power.one_sided_p_value, error=error.standard_error, degrees=error.degrees)
        differs[v] = min(1.0, 2 * p_above(abs(means[v])))
        not_inferior[v] = p_above(means[v] + margin)
        equivalent[v] = max(not_inferior[v], p_above(margin - means[v]))
    tests = {"p_differs": differs, "p_equivalent": equivalent, "p_not_inferior": not_inferior}
    corrected = {test: power.holm_correction(p) for test, p in tests.items()}
    return {v: {test: p[v] for test, p in corrected.items()} for v in errors}


def _classify_interval(interval: Interval, margin: float) -> Outcome:
    """Return the outcome that the interval shows.

    Equivalence comes first: a difference that is shown to be smaller than the margin does not matter, even if
    it is significantly different from 0.
    """
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
    """Return the interval on the number of variants to which the baseline is not inferior.

    The intervals hold simultaneously, and so does this one. The baseline is not inferior to at least the
    variants whose whole interval is below the margin, and at most to all but those whose whole interval is
    above it.
    """
    sure = sum(pair.interval is not None and pair.interval.high < margin for pair in pairs)
    lost = sum(pair.interval is not None and pair.interval.low > margin for pair in pairs)
    return sure, number - lost


def _decide_claim(holds: tuple[int, int], counted: int) -> Claim:
    if counted and holds[0] > counted / 2:
        return "supported"
    return "refuted" if counted and holds[1] <= counted / 2 else "undecided"


def _pairing_gain(rows: Sequence[Sequence[float]]) -> tuple[float | None, bool | None]:
    """Measure what pairing by seed gains.

    Args:
        rows: The scores of the baseline and of every variant, one row each, one column per seed.

    Returns:
        The mean correlation of the baseline with the variants, and whether seeds differ by more than the
        noise.
    """
    from scipy import stats

    table = np.array(rows)
    if len(table) < 2 or table.shape[1] < 3:
        return None, None
    centred = table - table.mean(axis=1, keepdims=True)
    size = np.sqrt((centred**2).sum(axis=1))
    sizes = size[0] * size[1:]
    known = [centred[0] @ own / s for own, s in zip(centred[1:], sizes, strict=True) if s > 0]
    by_seed = centred.mean(axis=0)
    rest, (k, n) = ((centred - by_seed) ** 2).sum(), table.shape
    if not known or rest <= 0:
        return (float(np.mean(known)) if known else None), (True if known else None)
    ratio = k * (by_seed**2).sum() / (rest / (k - 1))
    return float(np.mean(known)), bool(stats.f.sf(ratio, n - 1, (k - 1) * (n - 1)) < 1 - CONFIDENCE_LEVEL)
