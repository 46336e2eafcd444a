"""Sensitivity studies: the test score lost by each hyperparameter and by the learning rate.

A factor is a hyperparameter whose effect is measured; its levels are the values that are trained. A study has
one star for each variant, task and base model. A star consists of these runs:

- the curve: the runs of the default configuration at all learning rates and seeds;
- one arm for each factor: the runs that differ from the default in this factor alone, besides the learning
  rate and the seed.

The module `effects` defines the losses A, B, B(rate | h) and D, the gain C and the configuration x*. The
alias group are the factors that may act as a learning rate, such as alpha. The module `replacement` tests
whether the rate could replace them. A factor that it could replace does not count against claim 1.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import compress, groupby
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from orchestrator.analyze import effects, stats
from orchestrator.analyze.comparison import CONTROLS
from orchestrator.analyze.replacement import Replacement, Sweep, judge_replacement
from orchestrator.analyze.runs import Split, finite
from orchestrator.record.schema import Record
from orchestrator.record.study_file import AnalysisSettings
from orchestrator.study.configuration import Configuration, Value
from orchestrator.study.factors import (
    ALL,
    RATE,
    Factor,
    choose_factors,
    default_rate,
    is_near,
    load_factors,
    resweep_rates,
)
from orchestrator.study.option import format_value
from orchestrator.study.space import apply_values, get_value

if TYPE_CHECKING:
    import pandas as pd

Scores = NDArray[np.float64]
REQUIRED_SHARE = 0.8
"""The share of the variants for which claim 1 must hold."""
HALF_DECADE, FACTOR_2 = 0.5, math.log10(2)
"""Log10 of the two ratios by which a hyperparameter is off in the loss D (see `effects`): 3.16 and 2."""


@dataclass(frozen=True)
class Arm:
    """The scores of all levels of one factor, at the learning rates near x* that all levels have.

    Attributes:
        factor: The factor.
        levels: The measured levels including the default, in ascending order of their positions.
        default: The index of the default in `levels`.
        rates: The learning rates, ascending.
        seeds: The seeds for which every level has a score at every rate; may be empty.
        choices: Validation scores, shape (levels, rates, seeds).
        values: Test scores, of the same shape.
        gain: The gain C of the factor (see `effects`), shape (n,). The n seeds are those for which every
            level has a score at the published default rate; n may be 0.
        fingerprints: The runs at the levels other than the default.
        sweeps: For a factor of the alias group, the scores of each level at all of its own rates.
    """

    factor: Factor
    levels: tuple[Value, ...]
    default: int
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    choices: Scores
    values: Scores
    gain: Scores
    fingerprints: tuple[str, ...]
    sweeps: tuple[Sweep, ...] = ()

    @property
    def positions(self) -> list[float]:
        """The positions of the levels on the axis of the prior, see `Factor.position`."""
        return [self.factor.position(level, i) for i, level in enumerate(self.levels)]

    @property
    def weights(self) -> Scores:
        """The prior weights of the levels, shape (levels,)."""
        if self.factor.prior == "choice":
            return np.full(len(self.levels), 1 / len(self.levels))
        ends = [self.factor.position(end, 0) for end in self.factor.prior_ends(self.levels[self.default])]
        # The prior is cut to the range of the measured levels. A task may allow a smaller range than the
        # prior has: a batch, for example, has at most as many examples as the training split.
        low, high = max(ends[0], self.positions[0]), min(ends[1], self.positions[-1])
        return effects.prior_weights(self.positions, min(low, high), high)


@dataclass(frozen=True)
class Star:
    """The scores of one variant on one task and base model: the curve of the learning rate and the arms.

    Attributes:
        default: The default configuration, with placeholders for learning rate and seed (see `normalize`).
        rates: The learning rates at which the default configuration has a score, ascending.
        seeds: The seeds for which the curve has a score at every rate; may be empty.
        choices: Validation scores of the curve, shape (rates, seeds).
        values: Test scores of the curve, of the same shape.
        peak: The optimum of the mean validation score. The mean includes seeds that lack a score at other
            rates.
        center: The learning rate of x*: the rate of the curve that is nearest to the optimum.
        arms: The arms of the factors, see `_build_arm`.
        curve: The fingerprints of the runs of the curve.
        num_outside: The number of runs that belong to neither the curve nor an arm, because they differ from
            the default in more than one factor. The analysis does not use them.
    """

    default: Configuration
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    choices: Scores
    values: Scores
    peak: stats.Peak
    center: float
    arms: tuple[Arm, ...]
    curve: tuple[str, ...]
    num_outside: int

    def rate_ends(self, scale: float) -> tuple[float, float]:
        """Return log10 of the ends of the curve's range, scaled by `scale` around its best rate."""
        return effects.scaled_ends([math.log10(r) for r in self.rates], math.log10(self.center), scale)

    def misset_rate(self, scale: float, columns: Sequence[int], sweep: Sequence[float]) -> Scores:
        """Return A of the learning rate, shape (columns,).

        Args:
            scale: The range of the rate, as a multiple of the curve's range.
            columns: The indices of the seeds.
            sweep: The rates among which the best rate is chosen.
        """
        rows = [self.rates.index(rate) for rate in sweep]
        weights = effects.prior_weights([math.log10(r) for r in self.rates], *self.rate_ends(scale))
        return effects.misset_rate(self.values[:, columns], self.choices[:, columns], rows, weights)


# -- stars


@dataclass(frozen=True, eq=False)
class Level:
    """The runs of one configuration at all learning rates and seeds.

    Attributes:
        configuration: The configuration, see `normalize`.
        runs: (learning rate, seed) -> record.
    """

    configuration: Configuration
    runs: dict[tuple[float, int], Record] = field(default_factory=dict)

    @property
    def rates(self) -> set[float]:
        """The learning rates of the runs."""
        return {rate for rate, _ in self.runs}

    @property
    def seeds(self) -> set[int]:
        """The seeds of the runs."""
        return {seed for _, seed in self.runs}

    @property
    def fingerprints(self) -> tuple[str, ...]:
        """The fingerprints of the runs."""
        return tuple(record.fingerprint for record in self.runs.values())


def find_stars(records: Sequence[Record]) -> list[Star]:
    """Return the stars whose curve has a score, sorted by task, base model and variant.

    Args:
        records: Records with distinct fingerprints, in the order in which the study requested them. A study
            requests the default of a star first.
    """
    factors = choose_factors([ALL], (record.configuration for record in records))
    groups: dict[tuple[str, str, str], dict[str, Level]] = defaultdict(dict)
    for record in records:
        c, normal = record.configuration, normalize(record.configuration)
        levels = groups[c.task.name, c.model.name, c.variant.name]
        level = levels.setdefault(normal.fingerprint, Level(normal))
        level.runs[c.optimizer.learning_rate, c.seed] = record
    stars = [_build_star(list(levels.values()), factors) for _, levels in sorted(groups.items())]
    return [star for star in stars if star is not None]


def normalize(configuration: Configuration) -> Configuration:
    """Replace learning rate and seed by placeholders, so that all runs of a curve are equal."""
    optimizer = replace(configuration.optimizer, learning_rate=1.0)  # the same placeholder as in templates
    return replace(configuration, optimizer=optimizer, seed=0)


def _build_star(levels: Sequence[Level], factors: Sequence[Factor]) -> Star | None:
    """Return the star of one variant, task and base model; None if its curve has no score.

    Args:
        levels: The levels of the variant on this task and base model.
        factors: The factors whose arms are built.
    """
    default = _find_default(levels, factors)
    rates, seeds = sorted(default.rates), sorted(default.seeds)
    scores = score_array([default], rates, seeds)
    known: NDArray[np.bool_] = np.asarray(np.isfinite(scores).all(axis=(0, 1)))
    scored = known.sum(axis=1) > 0
    if not scored.any():
        return None
    rates, scores, known = list(compress(rates, scored)), scores[:, :, scored], known[scored]
    means = scores[0, 0].mean(axis=1, where=known)
    peak, center = effects.find_center(rates, means, known.sum(axis=1))
    complete, choices, values = _without_gaps(scores, seeds)
    changed = [find_changed_factor(level.configuration, default.configuration, factors) for level in levels]
    arms = []
    for factor in factors:
        own = [level for level, each in zip(levels, changed, strict=True) if each is factor]
        if own and (arm := _build_arm(factor, [default, *own], rates, center)) is not None:
            arms.append(arm)
    outside = [level for level, each in zip(levels, changed, strict=True) if each is None]
    return Star(
        default=default.configuration,
        rates=tuple(rates),
        seeds=complete,
        choices=choices[0],
        values=values[0],
        peak=peak,
        center=center,
        arms=tuple(arms),
        curve=default.fingerprints,
        num_outside=sum(len(level.runs) for level in outside if level is not default),
    )


def _find_default(levels: Sequence[Level], factors: Sequence[Factor]) -> Level:
    """Return the default configuration.

    The default is the configuration from which the most runs differ in at most one factor. Ties are decided
    by these rules, in this order:

    - The configuration with the most learning rates is the default, because the curve has more rates than the
      arms.
    - The configuration with the most runs is the default.
    - The first configuration is the default, because a study requests its default first.
    """

    def rank(default: Level) -> tuple[int, int, int]:
        explained = [
            level
            for level in levels
            if level is default
            or find_changed_factor(level.configuration, default.configuration, factors) is not None
        ]
        return sum(len(level.runs) for level in explained), len(default.rates), len(default.runs)

    return max(levels, key=rank)


def find_changed_factor(
    configuration: Configuration, default: Configuration, factors: Sequence[Factor]
) -> Factor | None:
    """Return the single factor in which a configuration differs from the default.

    Args:
        configuration: A configuration with the learning rate and the seed of `default`.
        default: The default configuration.
        factors: The factors of the study.

    Returns:
        The factor; None if the configuration is the default or differs from it in more than one factor.
    """
    for factor in factors:
        value, changed = get_value(default, factor.name), get_value(configuration, factor.name)
        if value is None or changed in (None, value):
            continue
        restored = apply_values(configuration, {factor.name: value})
        # `apply_values` lowers the number of evaluations of a configuration with few steps.
        if replace(restored, evaluations=default.evaluations) == default:
            return factor
    return None


def score_array(
    levels: Sequence[Level],
    rates: Sequence[float],
    seeds: Sequence[int],
    by: Literal["score", "loss"] = "score",
) -> Scores:
    """Return the scores of all runs, shape (2, levels, rates, seeds); NaN for a run without a score.

    Index 0 of the first axis is the validation split, and index 1 is the test split. By "loss", the score is
    the inverse perplexity (`Record.quality`).
    """

    def scores(split: Split) -> list[list[list[float]]]:
        return [
            [[_score(level.runs.get((r, s)), split, by) for s in seeds] for r in rates] for level in levels
        ]

    return np.array([scores("validation"), scores("test")])


def _without_gaps(scores: Scores, seeds: Sequence[int]) -> tuple[tuple[int, ...], Scores, Scores]:
    """Leave out the seeds that lack a score.

    Args:
        scores: The result of `score_array`.
        seeds: The seeds of the last axis.

    Returns:
        The seeds that have every score, their validation scores and their test scores. The scores have the
        shape (levels, rates, seeds).
    """
    complete: NDArray[np.bool_] = np.asarray(np.isfinite(scores).all(axis=(0, 1, 2)))
    choices, values = scores[..., complete]
    return tuple(compress(seeds, complete)), choices, values


def _score(record: Record | None, split: Split, by: Literal["score", "loss"]) -> float:
    """Return the score of a run; NaN if the run is missing, was stopped early or failed.

    The score of a diverged run is the task's floor. The score of a finished run is also the floor if the
    recorded score is missing or not finite.
    """
    if record is None:
        return math.nan
    score = finite(record.quality(split, by))
    if math.isnan(score) and record.state == "finished":
        return record.configuration.task.floor if by == "score" else 0.0
    return score


def _sweep(level: Level, rates: Sequence[float]) -> Sweep:
    """Return the scores of a level at those of some rates at which it has any."""
    seeds = sorted(level.seeds)
    scores = score_array([level], rates, seeds)
    known: NDArray[np.bool_] = np.asarray(np.isfinite(scores).all(axis=(0, 1)))
    scored = known.sum(axis=1) > 0
    complete, choices, values = _without_gaps(scores[:, :, scored], seeds)
    return Sweep(np.log10(list(compress(rates, scored))), complete, choices[0], values[0])


def _build_arm(
    factor: Factor, levels: Sequence[Level], curve_rates: Sequence[float], center: float
) -> Arm | None:
    """Return the arm of a factor; None if its levels have no common rate near `center` or no common seed.

    Args:
        factor: The factor.
        levels: The runs of each level, the default first.
        curve_rates: The rates at which the curve has a score. The arm has no other rates.
        center: The learning rate of x*. The arm has all common rates near it (see `is_near`). These may be
            more rates than the design requests around `center`, because further seeds may have moved x*.
    """
    values_of = [(level, get_value(level.configuration, factor.name)) for level in levels]
    named = [(level, value) for level, value in values_of if value is not None]

    def place(entry: tuple[Level, Value]) -> float:
        value = entry[1]
        if factor.prior != "choice":
            return float(value)
        return factor.levels.index(value) if value in factor.levels else -1

    named.sort(key=place)
    ordered = [level for level, _ in named]
    default = ordered.index(levels[0])
    seeds = sorted(set.intersection(*(level.seeds for level in levels)))
    measured = set(curve_rates).intersection(*(level.rates for level in levels))
    rates = sorted(rate for rate in measured if is_near(rate, center))
    if not rates or not seeds:
        return None
    complete, choices, values = _without_gaps(score_array(ordered, rates, seeds), seeds)
    published = score_array(ordered, [default_rate(curve_rates)], seeds)
    _, published_choices, published_values = _without_gaps(published, seeds)
    return Arm(
        factor=factor,
        levels=tuple(value for _, value in named),
        default=default,
        rates=tuple(rates),
        seeds=complete,
        choices=choices,
        values=values,
        gain=effects.gain(published_values[:, 0], published_choices[:, 0], default),
        fingerprints=tuple(name for level in levels[1:] for name in level.fingerprints),
        sweeps=tuple(
            _sweep(level, curve_rates if level is levels[0] else sorted(level.rates))
            for level in ordered
            if factor.alias
        ),
    )


# -- effects


class FactorStudy:
    """The frames `factors`, `replacements` and `claims` of a sensitivity study, see `Results`."""

    def __init__(self, stars: Sequence[Star], runs: pd.DataFrame, settings: AnalysisSettings) -> None:
        """Estimate the effects of all factors and test claim 1.

        Args:
            stars: The stars of the study.
            runs: The runs, from `run_frame`.
            settings: The margin, and the variants that do not count for the claim.
        """
        import pandas as pd

        factors, replacements, claims = [], [], []
        runs = runs.set_index("fingerprint")
        for panel, group in groupby(stars, lambda star: str(runs.loc[star.curve[0], "panel"])):
            own = list(group)
            measured = dict.fromkeys(a.factor for star in own for a in star.arms if not a.factor.variant)
            for star in own:
                has = {arm.factor for arm in star.arms}
                missing = ", ".join(factor.title for factor in measured if factor not in has)
                about = {"panel": panel, "variant": star.default.variant.name}
                compared = [_Comparison(star, arm, settings.margin) for arm in star.arms]
                rows = [_arm_row(each, settings.margin, runs["label"]) for each in compared]
                rows.sort(key=lambda row: -np.nan_to_num(row["misset"]))
                others = [each for each in compared if not each.is_replaced]
                factors += [about | row for row in (_rate_row(star, others, runs["label"]), *rows)]
                counted = about["variant"] not in {*CONTROLS, *settings.unverified}
                claim = _claim_row(star, compared, settings.margin)
                claims.append(about | {"counted": counted, "missing": missing} | claim)
                replacements += [about | {"counted": counted} | row for e in compared for row in e.rows()]
        self.factors, self.claims, self.replacements = map(pd.DataFrame, (factors, claims, replacements))


class _Comparison:
    """The losses of one factor and of the learning rate, for each seed that the arm and the curve share.

    A factor of the alias group also has the test whether the rate could replace it (`replacement`), and
    shares the seeds that have the scores for this test.
    """

    def __init__(self, star: Star, arm: Arm, margin: float) -> None:
        self.star, self.arm = star, arm
        self.replacement: Replacement | None = None
        shared = set(arm.seeds) & set(star.seeds)
        if arm.sweeps:
            times = [10 ** (x - arm.positions[arm.default]) for x in arm.positions]
            self.replacement = judge_replacement(arm.sweeps, arm.default, times, margin)
            shared &= set(self.replacement.seeds)
        own = [arm.seeds.index(seed) for seed in sorted(shared)]
        self._columns = [star.seeds.index(seed) for seed in sorted(shared)]
        self._scores = arm.values[:, :, own], arm.choices[:, :, own], arm.default

    @property
    def is_replaced(self) -> bool:
        """Whether the rate could replace the factor, by the test."""
        return self.replacement is not None and self.replacement.outcome == "could"

    def retuned(self) -> Scores:
        """Return B of the factor: for the alias group over the rates of each level, else over the arm's."""
        if self.replacement is None:
            return effects.retuned(*self._scores, self.arm.weights)
        shared = [self.replacement.seeds.index(self.star.seeds[column]) for column in self._columns]
        tops = self.replacement.tops[:, shared]
        loss: Scores = tops[self.arm.default] - self.arm.weights @ tops
        return loss

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of the factor in `Results.replacements`."""
        arm, found = self.arm, self.replacement
        if found is None:
            return []
        levels = [level for i, level in enumerate(arm.levels) if i != arm.default]
        about: dict[str, Any] = {
            "factor": arm.factor.name,
            "title": arm.factor.title,
            "outcome": found.outcome,
        }
        about |= {"p_could": found.p_could, "p_could_not": found.p_could_not, "seeds": len(found.seeds)}
        named = zip(levels, found.rows, strict=False)  # without a seed there is no row
        return [about | {"level": arm.factor.label(level)} | row for level, row in named]

    def retuned_rate(self, scale: float) -> Scores:
        """Return B(rate | h) for the factor h of this arm, shape (shared seeds,).

        The prior of the rate is cut to the rates of the arm, because the factor was varied at no other rate.
        Rates farther from the best rate have larger losses. This B(rate | h) is therefore too small rather
        than too large.

        Args:
            scale: The range of the rate, as a multiple of the curve's range.
        """
        x = [math.log10(rate) for rate in self.arm.rates]
        low, high = self.star.rate_ends(scale)
        weights = effects.prior_weights(x, max(low, x[0]), min(high, x[-1]))
        return effects.retuned_rate(*self._scores, weights)

    def differences(self, scale: float, ratio: float = 1.0) -> list[Scores]:
        """Return the loss of the rate minus `ratio` times the loss of the factor.

        Args:
            scale: The range of the rate, as a multiple of the curve's range.
            ratio: The multiple of the factor's loss.

        Returns:
            The differences of A and the differences of B, each of shape (shared seeds,).
        """
        misset = effects.misset(*self._scores, self.arm.weights)
        misset_rate = self.star.misset_rate(scale, self._columns, self.arm.rates)
        return [misset_rate - ratio * misset, self.retuned_rate(scale) - ratio * self.retuned()]

    def contrasts(
        self, scale: float, margin: float, ratio: float = 1.0, may_replace: bool = False
    ) -> list[effects.Contrast]:
        """Return the contrast of A and the contrast of B.

        If the rates of the arm do not cover the whole range of the rate, B(rate | h) is too small. The
        contrast of B then cannot refute the claim, so its `p_less` is set to 1.

        Claim 1 holds against a factor of the alias group also if the rate could replace it, and fails only if
        it could not. Their p values are combined with those of the contrasts (`effects.or_replaced`).

        Args:
            scale: The range of the rate, as a multiple of the curve's range.
            margin: The smallest difference of the score that matters.
            ratio: The multiple of the factor's loss, see `differences`.
            may_replace: Whether the claim holds if the rate could replace the factor.
        """
        by_a, by_b = (effects.contrast(d, margin) for d in self.differences(scale, ratio))
        covers = all(is_near(10**end, self.star.center) for end in self.star.rate_ends(scale))
        found = [by_a, by_b if covers else replace(by_b, p_less=1.0)]
        if self.replacement is None:
            return found
        p_could = self.replacement.p_could if may_replace else 1.0
        return effects.or_replaced(found, p_could, self.replacement.p_could_not)


def _fields(name: str, per_seed: Scores | None) -> dict[str, float]:
    """Return the mean over seeds with its t interval as columns `name`, `name_low` and `name_high`."""
    found = stats.mean_interval([] if per_seed is None else per_seed, stats.DIFFERENCES)
    return {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high}


def _counts(fingerprints: Sequence[str], labels: pd.Series) -> dict[str, int]:
    """Return the number of usable runs, and the number of runs that finished, collapsed or diverged."""
    own = labels.loc[list(fingerprints)]
    return {
        "usable": int((own == "finished").sum()),
        "ended": int(own.isin(["finished", "collapsed", "diverged"]).sum()),
    }


def _arm_row(compared: _Comparison, margin: float, labels: pd.Series) -> dict[str, Any]:
    """Return the row of one factor in `Results.factors`.

    The losses of the factor alone use all seeds of its arm. Its contrasts with the rate use the seeds that
    the arm and the curve share.
    """
    arm, factor = compared.arm, compared.arm.factor
    own = (arm.values, arm.choices, arm.default)
    scores = effects.at_best_rate(*own)

    def off_by(distance: float) -> Scores | None:
        if factor.prior != "log":  # ratios make sense for a log prior only
            return None
        return effects.loss_off_by(scores, arm.positions, arm.positions[arm.default], distance)

    row: dict[str, Any] = {
        "factor": factor.name,
        "title": factor.title,
        "alias": compared.is_replaced,
        "levels": ", ".join(factor.label(level) for level in arm.levels),
        "default": factor.label(arm.levels[arm.default]),
        **_fields("misset", effects.misset(*own, arm.weights)),
        **_fields("retuned", compared.retuned() if arm.sweeps else effects.retuned(*own, arm.weights)),
        **_fields("gain", arm.gain),
        **_fields("off_by_2", off_by(FACTOR_2)),
        **_fields("off_by_half_decade", off_by(HALF_DECADE)),
        **_fields("rate_retuned", compared.retuned_rate(1.0)),
        **_counts(arm.fingerprints, labels),
        "edge_levels": ", ".join(_edge_levels(arm, compared.replacement)),
    }
    for name, contrast in zip(("misset", "retuned"), compared.contrasts(1.0, margin), strict=True):
        seeds = effects.seeds_to_support(contrast, margin)
        row |= {
            f"{name}_contrast_low": contrast.lower,
            f"{name}_seeds": contrast.seeds,
            f"{name}_seeds_to_decide": math.nan if seeds is None else seeds,
        }
    return row


def _edge_levels(arm: Arm, replacement: Replacement | None) -> list[str]:
    """Return the labels of the levels whose best rate is the first or the last rate of the arm.

    A level at which all rates have the same mean score is left out. For a factor of the alias group, they are
    the levels whose best rate is not resolved among their own rates.
    """
    if not arm.seeds:
        return []
    if replacement is not None:
        return [arm.factor.label(arm.levels[i]) for i in replacement.unresolved if i != arm.default]
    means = arm.choices.mean(axis=2)
    best = means.argmax(axis=1)
    is_edge = ((best == 0) | (best == len(arm.rates) - 1)) & (np.ptp(means, axis=1) > 0)
    return [arm.factor.label(level) for level in compress(arm.levels, is_edge)]


def _rate_row(star: Star, judged: Sequence[_Comparison], labels: pd.Series) -> dict[str, Any]:
    """Return the row of the learning rate in `Results.factors`.

    The column `retuned` has the smallest B(rate | h) over the factors that the rate could not replace. It
    is the loss if the rate is drawn from its prior and h is tuned for each rate (see `effects`). The smallest
    value belongs to the factor whose tuning makes up best for a wrong rate.

    Args:
        star: The star of the variant and task.
        judged: The comparisons with the factors that the rate is not shown to replace.
        labels: Fingerprint -> label of the run.
    """
    factor = load_factors()[RATE]
    x, center = [math.log10(rate) for rate in star.rates], math.log10(star.center)
    retuned = [_fields("retuned", each.retuned_rate(1.0)) for each in judged]
    known = [fields for fields in retuned if not math.isnan(fields["retuned"])]
    sweep, start = resweep_rates(star.rates, star.center), star.rates.index(default_rate(star.rates))
    return {
        "factor": factor.name,
        "title": factor.title,
        "alias": True,
        "levels": ", ".join(map(format_value, star.rates)),
        "default": format_value(star.rates[start]),
        **_fields("misset", star.misset_rate(1.0, range(len(star.seeds)), sweep)),
        **min(known, key=lambda fields: fields["retuned"], default=_fields("retuned", None)),
        **_fields("gain", effects.gain(star.values, star.choices, start)),
        **_fields("off_by_2", effects.loss_off_by(star.values, x, center, FACTOR_2)),
        **_fields("off_by_half_decade", effects.loss_off_by(star.values, x, center, HALF_DECADE)),
        **_counts(star.curve, labels),
        "edge_levels": format_value(star.center) if star.peak.at_edge else "",
    }


def _claim_row(star: Star, compared: Sequence[_Comparison], margin: float) -> dict[str, Any]:
    # If the rate could replace every factor, there is no other factor that it could matter more than.
    may_replace = any(each.replacement is None for each in compared)

    def contrasts(scale: float, margin: float, ratio: float = 1.0) -> list[effects.Contrast]:
        return [c for each in compared for c in each.contrasts(scale, margin, ratio, may_replace)]

    far = contrasts(1.0, 0.0, effects.FAR_MORE)
    return {
        **effects.judge_claim({scale: contrasts(scale, margin) for scale in effects.RANGE_SCALES})._asdict(),
        "far_more": bool(far) and all(c.p_more <= stats.ALPHA for c in far),
        "best_rate": star.center,
        "best_at_edge": star.peak.at_edge,
        "seeds": len(star.seeds),
        "num_outside": star.num_outside,
    }


def count_claims(claims: pd.DataFrame) -> dict[str, int]:
    """Count the variants of a panel for which claim 1 holds and fails.

    Returns:
        `judged` is the number of variants that count for the claim. `required` is the number of variants for
        which the claim must hold. `supported` and `refuted` are lower 95 % confidence bounds of the number of
        variants for which the claim holds and fails, by Holm's procedure.
    """
    own = claims[claims["counted"]]
    return {
        "judged": len(own),
        "required": math.ceil(REQUIRED_SHARE * len(own)),
        "supported": stats.count_shown(own["p_supported"]),
        "refuted": stats.count_shown(own["p_refuted"]),
    }
