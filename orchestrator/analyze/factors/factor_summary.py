"""Analysis of a sensitivity study: from its records to the effects of all factors."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from orchestrator.analyze.factors.factor_estimates import summarize_star
from orchestrator.analyze.factors.factor_results import FactorStudy, TaskFactors
from orchestrator.analyze.factors.rate_claim import ALPHA
from orchestrator.analyze.factors.star_data import Star, collect_stars
from orchestrator.analyze.run_labels import RunLabel
from orchestrator.analyze.statistics.outcome import largest_count
from orchestrator.analyze.tuned.tuned_results import CONTROLS
from orchestrator.record.schema import Record
from orchestrator.record.study_file import AnalysisSettings
from orchestrator.study.factors import ALL, RATE, Factor, choose_factors

REQUIRED_SHARE = 0.8
"""Share of the variants for which the claim must hold."""


def find_stars(records: Sequence[Record], labels: Mapping[str, RunLabel]) -> list[Star]:
    """Return the stars of a study, with an arm for every factor that its runs vary.

    Args:
        records: Records with distinct fingerprints.
        labels: Fingerprint -> label, from `label_runs`.
    """
    return collect_stars(records, _known_factors(records), labels)


def summarize_factors(stars: Sequence[Star], settings: AnalysisSettings) -> FactorStudy:
    """Estimate the effects of all factors of all variants and tasks of a study.

    Args:
        stars: The runs of the study, from `find_stars`.
        settings: The margin, and the variants that do not count for the claim.
    """
    groups: dict[tuple[str, str], list[Star]] = defaultdict(list)
    for star in stars:
        groups[star.default.task.name, star.default.model.name].append(star)
    tasks = [_summarize_task(own, settings) for _, own in sorted(groups.items())]
    return FactorStudy(settings.margin, tuple(tasks))


def _known_factors(records: Iterable[Record]) -> list[Factor]:
    """Return the factors of `factors.toml` and those of the variants' own settings in the records."""
    return choose_factors([ALL], (record.configuration for record in records))


def _summarize_task(stars: Sequence[Star], settings: AnalysisSettings) -> TaskFactors:
    measured = dict.fromkeys(arm.factor for star in stars for arm in star.arms if not arm.factor.variant)
    variants = [summarize_star(star, settings.margin, _missing(star, measured)) for star in stars]
    uncounted = {*CONTROLS, *settings.unverified}
    judged = [each for each in variants if each.variant not in uncounted]
    first = stars[0].default
    required = math.ceil(REQUIRED_SHARE * len(judged))
    return TaskFactors(
        task=first.task.name,
        model=first.model.name,
        metric=first.task.metric,
        variants=tuple(variants),
        uncounted=tuple(each.variant for each in variants if each.variant in uncounted),
        num_judged=len(judged),
        num_required=required,
        num_supported=_count([each.claim.p_supported for each in judged]),
        num_refuted=_count([each.claim.p_refuted for each in judged]),
    )


def _count(p_values: Sequence[float]) -> int:
    """Return the lower 95 % confidence limit of the number of variants for which a statement holds.

    Args:
        p_values: One p value per variant.
    """
    return largest_count(np.array(p_values), ALPHA) if p_values else 0


def _missing(star: Star, measured: Iterable[Factor]) -> list[str]:
    """Return the titles of the measured factors for which this variant has no arm."""
    own = {arm.factor.name for arm in star.arms}
    return [factor.title for factor in measured if factor.name not in own and factor.name != RATE]
