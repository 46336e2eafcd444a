"""The report of a study: `report.html`, `summary.json` and the pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.analyze import formatting, panels
from orchestrator.analyze.report_parts import Picture, ReportData
from orchestrator.analyze.results import Summary
from orchestrator.analyze.sections.catalogue import SECTIONS
from orchestrator.analyze.summary import summarize
from orchestrator.analyze.task_titles import entitle
from orchestrator.record.schema import Record
from orchestrator.record.study_file import PICTURE_FILES, StudyFile
from orchestrator.util import atomic_files

SCHEMA_VERSION = 3
"""The version of `summary.json`, raised when a field is removed or changes its meaning."""


def write_report(
    study: StudyFile, records: Sequence[Record], folder: Path, tracking_uri: str, store: Path | None = None
) -> Summary:
    """Analyze a study and write its report: `report.html`, the pictures (PNG and SVG) and `summary.json`.

    Args:
        study: The study, with its command.
        records: The records of the study's configurations, as far as they exist.
        folder: The study's folder, in the output folder. Each file is replaced atomically. Pictures of an
            earlier report that this report does not have are removed.
        tracking_uri: MLflow's tracking URI of the runs. Secrets are removed from it and from the command.
        store: The folder of the records, which commands in the report name; None for the one in the output
            folder.

    Returns:
        The summary that the report shows.

    Raises:
        OSError: The folder cannot be written.
    """
    # jinja2, matplotlib and plotly are not needed to read a summary.
    from orchestrator.analyze.page import render_page
    from orchestrator.analyze.plots import style

    study = replace(study, command=formatting.redact_secrets(study.command))
    records = panels.deduplicate_records(entitle(study, records))
    uri = formatting.redact_secrets(tracking_uri)
    data = ReportData(study, summarize(study, records), records, uri, folder.parent, store)
    pending = len(set(study.configurations) - {record.fingerprint for record in records})
    files: dict[str, bytes] = {}
    pictures: dict[str, tuple[Picture, bytes]] = {}
    for picture in (picture for section in SECTIONS for picture in section.pictures(data)):
        png, svg = style.render(picture.draw)
        files |= {f"{picture.name}.png": png, f"{picture.name}.svg": svg}
        pictures[picture.name] = (picture, png)
    files["summary.json"] = json.dumps(_summary_to_json(data, pending), indent=1, allow_nan=False).encode()
    files["report.html"] = render_page(data, pictures, pending).encode()
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        atomic_files.write_atomically(folder / name, content)
    for name in set(PICTURE_FILES) - set(files):
        (folder / name).unlink(missing_ok=True)
    return data.summary


def _summary_to_json(data: ReportData, pending: int) -> dict[str, Any]:
    """Return the content of `summary.json`: the study and all numbers of the report as JSON types, no NaN."""
    from pydantic import TypeAdapter

    study = data.study
    about = {
        "schema_version": SCHEMA_VERSION,
        "name": study.name,
        "question": study.question,
        "command": study.command,
        "tracking_uri": data.tracking_uri,
        "pending": pending,
    }
    numbers: dict[str, Any] = TypeAdapter(Summary).dump_python(data.summary, mode="json")
    return about | numbers
