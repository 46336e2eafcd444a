"""Find the sources of a study whose content has changed, or whose name another file has in this run."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace

from orchestrator.record.store import Store
from orchestrator.record.study_file import Source, StudyFile


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
    """Return whether a configuration uses an earlier source of a study; True if it has no record."""
    record = store.get(fingerprint)
    if record is None:
        return True  # if this run requests it, it is added again
    task = record.configuration.task
    if source.content == task.content:
        return source.revision == task.revision
    return source.content in (record.configuration.model.content, record.configuration.variant.revision)
