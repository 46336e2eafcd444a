"""The settings of a study's analysis: fixed when it begins, and kept in `study.json`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from orchestrator.record.study_file import AnalysisSettings, StudyFile
from orchestrator.util.errors import UsageError


def fix_settings(
    settings: AnalysisSettings, study: StudyFile, is_search: bool, replicates: int, variants: Iterable[str]
) -> AnalysisSettings:
    """Return the settings of the analysis, which a study that has begun does not change.

    Args:
        settings: The settings of this command. `max_replicates` is 0 if the command does not name it; then it
            is the planned maximum that the study began with, or else the number of replicates.
        study: The study as it was before this command.
        is_search: Whether a sampler chooses the points.
        replicates: The number of replicates of this command.
        variants: The variants of the study.

    Raises:
        UsageError: The study has begun with another kind, selection, margin or planned maximum, or the
            command asks for more replicates than planned.
    """
    before = study.settings if study.configurations else None
    if settings.kind not in ("replicates", "factors"):
        if before is not None and before.kind in ("replicates", "factors"):
            _check_kind(before, settings, study.name)
        # The points of a search form no curve.
        return replace(settings, kind="search") if settings.kind == "curve" and is_search else settings
    if settings.kind == "factors":
        found = replace(settings, unverified=_unverified(variants))
        if before is not None:
            _check_unchanged(before, found, study.name)
        return found
    planned = settings.max_replicates or (before.max_replicates if before else 0) or replicates
    found = replace(settings, max_replicates=planned, unverified=_unverified(variants))
    if before is not None:
        _check_unchanged(before, found, study.name)
    if replicates > planned:
        raise UsageError(
            f"--replicates {replicates}: study {study.name!r} was planned for at most {planned} "
            f"(--max-replicates), over which its error rate is shared out; take {planned}, or another "
            "--study."
        )
    return found


def _check_kind(before: AnalysisSettings, now: AnalysisSettings, name: str) -> None:
    if before.kind != now.kind:
        raise UsageError(
            f"--study {name!r}: it is a study of another kind ({before.kind}, not {now.kind}); take another "
            "--study."
        )


def _check_unchanged(before: AnalysisSettings, now: AnalysisSettings, name: str) -> None:
    _check_kind(before, now, name)
    if before.select != now.select:
        raise UsageError(
            f"--select {now.select}: study {name!r} began with {before.select}, which is fixed before there "
            f"are results; take --select {before.select}, or another --study."
        )
    for option, then, new in (
        ("--margin", before.margin, now.margin),
        ("--max-replicates", before.max_replicates, now.max_replicates),
    ):
        if then != new:
            raise UsageError(
                f"{option} {new:g}: study {name!r} began with {then:g}, which is fixed before there are "
                f"results; take {option} {then:g}, or another --study."
            )


def _unverified(variants: Iterable[str]) -> tuple[str, ...]:
    """Return the variants that were compared with no other implementation and no paper."""
    from variants import catalogue
    from variants.base import VerifiedBy

    return tuple(name for name in variants if catalogue.get(name).verified_by is VerifiedBy.NONE)
