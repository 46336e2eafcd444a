"""Tags of MLflow's logged models. A study logs one model for each adapter that it keeps in its store."""

from __future__ import annotations

from collections.abc import Iterable

from orchestrator.record.kept_adapters import StudyAdapters, file_name
from orchestrator.record.schema import Record
from orchestrator.record.study_file import StudyFile
from orchestrator.study.own_commands import own_command


def model_tags(
    adapters: StudyAdapters, study: StudyFile, records: Iterable[Record]
) -> dict[str, dict[str, str]]:
    """Return the tags of the logged model of each adapter that a study keeps.

    Args:
        adapters: The adapters of the study.
        study: The study. Its command decides whether the tag `export` has a command of the installed program.
        records: The records of the study, with the names that they have in the study.

    Returns:
        Fingerprint -> name of the tag -> value.
    """
    files = {path.name: path for path in adapters.files()}
    output, root = adapters.study_folder.parent, adapters.store.root
    return {
        record.fingerprint: {
            "fingerprint": record.fingerprint,
            "variant": record.configuration.variant.name,
            "base_model": record.configuration.model.name,
            "base_model_content": record.configuration.model.content,
            "adapter": str(files[name]),
            "export": own_command(
                ["export", study.name, record.fingerprint[:12]], study.command, output, root
            ),
        }
        for record in records
        if (name := file_name(record)) in files
    }
