"""Settings of the analysis of a study: fixed at its first run and kept in `study.json`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from orchestrator.record.study_file import AnalysisSettings, StudyFile
from orchestrator.util.errors import UsageError


def fix_settings(
    settings: AnalysisSettings, study: StudyFile, is_search: bool, replicates: int, variants: Iterable[str]
) -> AnalysisSettings:
    """Complete the settings of the analysis, and check that they agree with earlier runs of the study.

    Args:
        settings: Settings of this command. If `max_replicates` is 0, because the command does not give it, it
            is taken from the first run of the study, else it is `replicates`.
        study: The study before this command.
        is_search: True if a sampler chooses the points.
        replicates: Number of replicates of this command.
        variants: Names of the variants of the study.

    Returns:
        The settings to use.

    Raises:
        UsageError: The first run of the study had another kind, selection, margin or planned maximum, or this
            command has more replicates than planned.
    """
    before = study.settings if study.configurations else None
    if settings.kind not in ("replicates", "factors"):
        if before is not None and before.kind in ("replicates", "factors"):
            _check_kind(before, settings, study.name)
        # The points of a search are not a curve over the learning rate.
        return replace(settings, kind="search") if settings.kind == "curve" and is_search else settings
    found = replace(settings, unverified=_unverified(variants))
    planned = settings.max_replicates or (before.max_replicates if before else 0) or replicates
    if settings.kind == "replicates":
        found = replace(found, max_replicates=planned)
    if before is not None:
        _check_unchanged(before, found, study.name)
    if settings.kind == "replicates" and replicates > planned:
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
    """Check that the settings that are fixed at the first run of a study have not changed.

    Raises:
        UsageError: A setting has changed.
    """
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
    """Return the variants that were verified against neither another implementation nor a paper."""
    from variants import catalogue
    from variants.traits import VerifiedBy

    return tuple(name for name in variants if catalogue.traits(name).verified_by is VerifiedBy.NONE)
