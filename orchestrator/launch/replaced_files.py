"""Removal of configurations from a study whose user has changed the file of a task, variant or model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from orchestrator.record.store import Store
from orchestrator.record.study_file import Source, StudyFile


def drop_replaced(
    study: StudyFile, sources: Sequence[Source], store: Store, notify: Callable[[str], None]
) -> StudyFile:
    """Return a study without the configurations that used a file whose content has changed.

    Results of two contents under one name must not be compared. The records stay in the store.

    Args:
        study: The study before this run.
        sources: The models, tasks and variants of this run; see `StudyFile.sources`.
        store: The store.
        notify: Called with one line for each changed file.
    """
    names, contents = {each.name for each in sources if each.path}, {each.content for each in sources}
    earlier = [each for each in study.sources if each.name in names and each.content not in contents]
    if not earlier:
        return study
    kept = set(study.configurations)
    for source in earlier:
        used = {fingerprint for fingerprint in kept if _uses(store, fingerprint, source.content)}
        kept -= used
        notify(
            f"{source.name} has changed: {len(used)} configurations of its earlier content leave the study; "
            "their records stay in the store"
        )
    others = tuple(each for each in study.sources if each not in earlier)
    return replace(study.keep(kept), sources=others)


def _uses(store: Store, fingerprint: str, content: str) -> bool:
    """Return whether a configuration uses a file of this content. Without a record it is not known: True."""
    record = store.get(fingerprint)
    if record is None:
        return True  # if this run requests it, it is added again
    configuration = record.configuration
    return content in (
        configuration.task.content,
        configuration.model.content,
        configuration.variant.revision,
    )
