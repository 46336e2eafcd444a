"""Use of records that an earlier version made of tasks and variants in users' files.

Earlier versions named such a task or variant by the full path of its file, which was part of the fingerprint.
A record of a file under the same path is copied to the fingerprint that this version computes, once for each
path and content in a store.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from orchestrator.record.store import Store
from orchestrator.record.study_file import Source
from orchestrator.study.configuration import Configuration


def adopt_records(store: Store, templates: Sequence[Configuration], sources: Iterable[Source]) -> int:
    """Copy records that name a task or variant by the path of its file to their fingerprints of this version.

    Failed records are left out, so that their configurations are tried again.

    Args:
        store: The store.
        templates: One configuration of each task and variant of a study, as this version makes them.
        sources: The users' files of the study; see `StudyFile.sources`.

    Returns:
        The number of records that were copied.
    """
    by_path = {source.path: source for source in sources}
    tasks = {template.task.content: template.task for template in templates}
    copied = 0
    for record in store.records():
        if record.state == "failed":
            continue
        configuration = record.configuration
        task, variant = configuration.task, configuration.variant
        if (source := by_path.get(task.name)) and source.content in tasks:
            current = tasks[source.content]
            if (task.revision, task.numerics) == (current.revision, current.numerics):
                task = replace(task, name=current.name, content=current.content)
        if (source := by_path.get(variant.name)) and source.content == variant.revision:
            variant = replace(variant, name=source.name)
        adopted = replace(configuration, task=task, variant=variant)
        if adopted != configuration:
            fingerprint = adopted.fingerprint
            copied += store.put(replace(record, fingerprint=fingerprint, configuration=adopted))
    return copied
