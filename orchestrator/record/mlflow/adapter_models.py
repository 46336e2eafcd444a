"""Tags of MLflow's logged models. A study logs one model for each adapter that it keeps in its store."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from orchestrator.record.adapters import find_adapter
from orchestrator.record.schema import Record
from orchestrator.record.store import Store
from orchestrator.record.study_file import StudyFile
from orchestrator.study.own_commands import own_command


def model_tags(
    store: Store, output: Path, study: StudyFile, records: Iterable[Record]
) -> dict[str, dict[str, str]]:
    """Return the tags of the logged model of each adapter that a study keeps.

    Args:
        store: The store.
        output: The output folder with the studies' folders.
        study: The study. Its command decides whether the tag `export` has a command of the installed program.
        records: The records of the study, with the names that they have in the study.

    Returns:
        Fingerprint -> name of the tag -> value.
    """
    return {
        record.fingerprint: {
            "fingerprint": record.fingerprint,
            "variant": record.configuration.variant.name,
            "base_model": record.configuration.model.name,
            "base_model_content": record.configuration.model.content,
            "adapter": str(file),
            "export": own_command(
                ["export", study.name, record.fingerprint[:12]], study.command, output, store.root
            ),
        }
        for record in records
        if (file := find_adapter(store, record.fingerprint))
    }
