"""The report of a study: report.html (one file, no other host is asked), its pictures (curves.png and
spread.png of a grid, search.png, forest.png of a comparison), summary.json."""

from __future__ import annotations

import base64
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.analyze import formatting, panels, selection, verdict
from orchestrator.analyze.comparison import ChosenPoint, TunedChoice
from orchestrator.analyze.results import TOLERANCE, Curve, Panel, Summary
from orchestrator.analyze.sensitivity import summarize
from orchestrator.record.schema import Record
from orchestrator.util import atomic_files

SCHEMA_VERSION = 1
"""Of summary.json; raised when a field changes its meaning or goes."""


@dataclass(frozen=True)
class StudyInfo:
    """What the records do not say: the study's name and question, and the command that made it."""

    name: str
    question: str
    command: str
    tracking_uri: str
    pending: int
    notes: tuple[str, ...]


def write_report(
    records: Sequence[Record],
    folder: Path,
    *,
    name: str,
    question: str,
    command: str,
    tracking_uri: str,
    pending: int = 0,
    notes: Sequence[str] = (),
    baseline: str = "",
    margin: float = TOLERANCE,
    tuning_folder: Path | None = None,
    is_search: bool = False,
    looks: Sequence[int] = (),
) -> Summary:
    """Writes the files into `folder`, each whole or not at all, and returns what they show.

    `baseline`: what all variants are compared with; the records are then of fresh seeds at the points that
    the study in the folder `tuning` has chosen. `searched`, `looks`: see StudyFile.

    `pending`: configurations of the study without a record yet. `command` is what a reader types to get the
    study; a user and password in it or in `tracking_uri` are left out. Raises OSError if the folder cannot be
    written.
    """
    records = panels.deduplicate_records(records)
    summary = summarize(
        records,
        baseline=baseline,
        margin=margin,
        tuning_choices=_read_tuning_choices(tuning_folder),
        looks=looks,
        is_search=is_search,
    )
    command, tracking_uri = formatting.redact_secrets(command), formatting.redact_secrets(tracking_uri)
    about = StudyInfo(name, question, command, tracking_uri, pending, tuple(notes))
    pictures = _render_pictures(summary)
    folder.mkdir(parents=True, exist_ok=True)
    for picture, content in pictures.items():
        atomic_files.write_atomically(folder / picture, content)
    atomic_files.write_atomically(
        folder / "summary.json", json.dumps(summary_to_json(summary, about), indent=1).encode()
    )
    atomic_files.write_atomically(
        folder / "report.html", _render_html(summary, about, records, pictures).encode()
    )
    return summary


def _render_pictures(summary: Summary) -> dict[str, bytes]:
    """File name -> PNG, of what the study has."""
    from orchestrator.analyze.plots import curves, forest, search_curves

    found = {}
    if summary.comparisons:
        found["forest.png"] = forest.plot_forest(summary.comparisons)
    if summary.searches:
        found["search.png"] = search_curves.plot_search(summary.searches)
    if summary.panels or not found:
        found |= {"curves.png": curves.plot_curves(summary), "spread.png": curves.plot_spread(summary)}
    return found


def _read_tuning_choices(tuning_folder: Path | None) -> Mapping[str, ChosenPoint | None]:
    """What the first stage of a comparison has chosen; nothing where that is not at hand."""
    saved = selection.read_choice(tuning_folder, TunedChoice) if tuning_folder else None
    return saved.variants if saved else {}


def summary_to_json(summary: Summary, about: StudyInfo) -> dict[str, Any]:
    """Every number of the report; JSON's own types only, no NaN."""
    from pydantic import TypeAdapter

    found = {"schema_version": SCHEMA_VERSION, **TypeAdapter(StudyInfo).dump_python(about, mode="json")}
    found |= TypeAdapter(Summary).dump_python(summary, mode="json")
    for panel, entry in zip(summary.panels, found["panels"], strict=True):
        entry["answer"] = formatting.answer(panel)
    for compared, entry in zip(summary.comparisons, found["comparisons"], strict=True):
        entry["verdict"] = verdict.verdict_text(compared)
    return found


def reproduction_command(about: StudyInfo, panel: Panel, curve: Curve, rates: Sequence[float]) -> str:
    return formatting.narrow_command(about.command, curve.variant, rates, {**panel.varied, **curve.varied})


def _render_html(
    summary: Summary, about: StudyInfo, records: Sequence[Record], pictures: Mapping[str, bytes]
) -> str:
    # autoescape is set by hand: its usual rule goes by the ending .html and would skip this template.
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("orchestrator.analyze", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja").render(
        about=about,
        summary=summary,
        formatting=formatting,
        verdict=verdict,
        pictures={name: base64.b64encode(content).decode() for name, content in pictures.items()},
        reproduce=lambda panel, curve, rates: reproduction_command(about, panel, curve, rates),
        unfinished_runs=_unfinished_runs(summary, records),
        mlflow_ui_command=mlflow_ui_command(about.tracking_uri),
    )


def _unfinished_runs(summary: Summary, records: Sequence[Record]) -> dict[str, list[tuple[str, str, Record]]]:
    """The runs that did not finish, by state: the variant's label, the panel's title, the record."""
    where = {
        run.fingerprint: (curve.label, formatting.panel_title(panel))
        for panel in summary.panels
        for curve in panel.curves
        for point in curve.points
        for run in point.runs
    }
    runs_by_state: dict[str, list[tuple[str, str, Record]]] = {"failed": [], "stopped": [], "diverged": []}
    for r in records:
        if r.state in runs_by_state:
            c = r.configuration
            label, title = where.get(r.fingerprint, (c.variant.name, f"{c.task.name} on {c.model.name}"))
            runs_by_state[r.state].append((label, title, r))
    for runs in runs_by_state.values():
        runs.sort(
            key=lambda e: (e[1], e[0], e[2].configuration.optimizer.learning_rate, e[2].configuration.seed)
        )
    return runs_by_state


def mlflow_ui_command(tracking_uri: str) -> str:
    """The command that shows the runs in MLflow's pages; empty for a server, which is opened by its
    address."""
    if not tracking_uri or tracking_uri.startswith(("http://", "https://")):
        return ""
    return shlex.join(["mlflow", "ui", "--backend-store-uri", tracking_uri])
