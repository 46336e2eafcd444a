"""The report of a study: `report.html`, `summary.json` and the plots.

`report.html` is a single file that loads nothing from another host. The plots are `curves.png` and
`spread.png` of a grid, `search.png` of a search, and `forest.png` of a comparison.
"""

from __future__ import annotations

import base64
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.analyze import formatting, panels
from orchestrator.analyze.results import Summary
from orchestrator.analyze.summary import summarize
from orchestrator.record.schema import Record
from orchestrator.record.study_file import StudyFile
from orchestrator.util import atomic_files

SCHEMA_VERSION = 1
"""The version of `summary.json`, raised when a field is removed or changes its meaning."""


def write_report(
    study: StudyFile, records: Sequence[Record], folder: Path, tracking_uri: str, notes: Sequence[str] = ()
) -> Summary:
    """Write the report of a study: `report.html`, its plots and `summary.json`.

    Args:
        study: The study, with its command.
        records: The records of the study's configurations, as far as they exist.
        folder: The study's folder. Every file in it is replaced as a whole or not at all.
        tracking_uri: Where MLflow has the runs. User and password are left out, here and in the command.
        notes: Sentences for the reader, printed below the answer.

    Returns:
        The summary that the report shows.

    Raises:
        OSError: The folder cannot be written.
    """
    records = panels.deduplicate_records(records)
    summary = summarize(study, records)
    about = {
        "name": study.name,
        "question": study.question,
        "command": formatting.redact_secrets(study.command),
        "tracking_uri": formatting.redact_secrets(tracking_uri),
        "pending": len(set(study.configurations) - {record.fingerprint for record in records}),
        "notes": list(notes),
    }
    pictures = _render_pictures(summary)
    numbers = json.dumps(_summary_to_json(summary, about), indent=1)
    folder.mkdir(parents=True, exist_ok=True)
    for picture, content in pictures.items():
        atomic_files.write_atomically(folder / picture, content)
    atomic_files.write_atomically(folder / "summary.json", numbers.encode())
    page = _render_html(summary, about, records, pictures)
    atomic_files.write_atomically(folder / "report.html", page.encode())
    return summary


def _render_pictures(summary: Summary) -> dict[str, bytes]:
    """Return the plots of a summary: file name -> PNG."""
    from orchestrator.analyze.plots import curves, search_curves, spread

    pictures = {}
    if summary.searches:
        pictures["search.png"] = search_curves.plot_search(summary.searches)
    if summary.panels or not pictures:
        pictures |= {"curves.png": curves.plot_curves(summary), "spread.png": spread.plot_spread(summary)}
    return pictures


def _summary_to_json(summary: Summary, about: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of `summary.json`: every number of the report, as JSON's own types, without NaN."""
    from pydantic import TypeAdapter

    data = {"schema_version": SCHEMA_VERSION, **about}
    data |= TypeAdapter(Summary).dump_python(summary, mode="json", by_alias=True)
    for panel, entry in zip(summary.panels, data["panels"], strict=True):
        entry["answer"] = formatting.answer(panel)
    return data


def _render_html(
    summary: Summary, about: Mapping[str, Any], records: Sequence[Record], pictures: Mapping[str, bytes]
) -> str:
    # The usual rule for autoescape goes by the ending .html and would skip these templates.
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("orchestrator.analyze", ".")
    options: dict[str, Any] = {"undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=loader, autoescape=True, **options)
    return environment.get_template("report.html.jinja").render(
        about=about,
        summary=summary,
        formatting=formatting,
        pictures={name: base64.b64encode(content).decode() for name, content in pictures.items()},
        reproduce=lambda panel, curve, rates: formatting.narrow_command(
            about["command"], curve.variant, rates, {**panel.varied, **curve.varied}
        ),
        unfinished_runs=_unfinished_runs(summary, records),
        mlflow_ui_command=mlflow_ui_command(about["tracking_uri"]),
    )


def _unfinished_runs(summary: Summary, records: Sequence[Record]) -> dict[str, list[tuple[str, str, Record]]]:
    """Return the runs that did not finish: state -> (label of the curve, title of the panel, record)."""
    where = {
        run.fingerprint: (curve.label, formatting.panel_title(panel))
        for panel in summary.panels
        for curve in panel.curves
        for point in curve.points
        for run in point.runs
    }
    runs: dict[str, list[tuple[str, str, Record]]] = {"failed": [], "stopped": [], "diverged": []}
    for r in sorted(records, key=lambda r: (r.configuration.optimizer.learning_rate, r.configuration.seed)):
        if r.state in runs:
            c = r.configuration
            label, title = where.get(r.fingerprint, (c.variant.name, f"{c.task.name} on {c.model.name}"))
            runs[r.state].append((label, title, r))
    return {state: sorted(own, key=lambda run: (run[1], run[0])) for state, own in runs.items()}


def mlflow_ui_command(tracking_uri: str) -> str:
    """Return the command that opens the runs in MLflow's UI; empty for a server, which has an address."""
    if not tracking_uri or tracking_uri.startswith(("http://", "https://")):
        return ""
    return shlex.join(["mlflow", "ui", "--backend-store-uri", tracking_uri])
