"""What a later run reads in `study.json`: settings that stay, and sources that may have changed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from orchestrator.record.store import Store
from orchestrator.record.study_file import AnalysisSettings, Source, StudyFile
from orchestrator.study.configuration import Configuration
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


def refuse_other_runs(
    study: StudyFile,
    requested: Iterable[Configuration],
    templates: Iterable[Configuration],
    replicates: int,
    store: Store,
) -> None:
    """Check that a comparison has no earlier runs of the same tunings that this command does not request.

    A tuning consists of the runs of one task, variant and replicate. If some of them had other settings, the
    best one would be chosen among runs that are not comparable.

    Args:
        study: The study before this command.
        requested: Configurations of this command.
        templates: One configuration per task and variant.
        replicates: Number of replicates of this command.
        store: The records.

    Raises:
        UsageError: The study has such runs.
    """
    asked = {c.fingerprint for c in requested}
    tuned = {(template.task.name, template.variant.name) for template in templates}
    records = [store.get(fingerprint) for fingerprint in study.configurations if fingerprint not in asked]
    others = [record.configuration for record in records if record is not None]
    unlike = sum((c.task.name, c.variant.name) in tuned and c.seed < replicates for c in others)
    if unlike:
        raise UsageError(
            f"--study {study.name!r}: it has {unlike} runs of the same tunings that this command does not "
            "ask for (other steps, rates, rank, ..., or other numerics), and a choice among "
            "both would compare unlike runs; repeat its options, or take another --study."
        )


def find_other_files(study: StudyFile, sources: Sequence[Source]) -> list[tuple[Source, Source]]:
    """Return the sources of a study whose name belongs to a different file in this run.

    Files with equal contents count as the same file, so that a file may be moved.

    Args:
        study: The study before this run.
        sources: The models, tasks and variants of this run; see `StudyFile.sources`.

    Returns:
        Pairs of the source of the study and the source of the run.
    """
    mine = {source.name: source for source in sources if source.path}
    pairs = [(each, mine[each.name]) for each in _earlier_contents(study, sources)]
    return [(theirs, own) for theirs, own in pairs if _place(theirs.path) != _place(own.path)]


def drop_replaced(
    study: StudyFile, sources: Sequence[Source], store: Store, notify: Callable[[str], None]
) -> StudyFile:
    """Return a study without the configurations that used a file whose content or data have changed.

    The results of two contents under one name must not be compared. The records stay in the store.

    Args:
        study: The study before this run.
        sources: The models, tasks and variants of this run; see `StudyFile.sources`.
        store: The store.
        notify: Called with one line for each changed file.
    """
    earlier = _earlier_contents(study, sources)
    kept = set(study.configurations)
    for source in earlier:
        used = {fingerprint for fingerprint in kept if _uses(store, fingerprint, source)}
        kept -= used
        if used:
            notify(
                f"{source.name} has changed: {len(used)} configurations of its earlier content leave the "
                "study; their records stay in the store"
            )
    others = tuple(each for each in study.sources if each not in earlier)
    return replace(study.keep(kept), sources=others)


def _earlier_contents(study: StudyFile, sources: Sequence[Source]) -> list[Source]:
    """Return the sources of a study that have another content, or other data, in this run."""
    names = {each.name for each in sources if each.path}
    present = {(each.content, each.revision) for each in sources}
    return [s for s in study.sources if s.name in names and (s.content, s.revision) not in present]


def _place(path: str) -> str:
    """Return what identifies a file or folder; for a dataset of the hub, its name."""
    return os.path.realpath(path) if os.path.isabs(path) else path


def _uses(store: Store, fingerprint: str, source: Source) -> bool:
    """Return whether a configuration was trained with `source`; True if the store has no record of it."""
    record = store.get(fingerprint)
    if record is None:
        return True  # if this run requests it, it is added again
    task = record.configuration.task
    if source.content == task.content:
        return source.revision == task.revision
    return source.content in (record.configuration.model.content, record.configuration.variant.revision)
