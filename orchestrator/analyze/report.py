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
from orchestrator.analyze.comparison import Chosen, TunedChoice
from orchestrator.analyze.results import TOLERANCE, Curve, Panel, Summary
from orchestrator.analyze.sensitivity import summarize
from orchestrator.record.schema import Record
from orchestrator.util import atomic_files

SCHEMA_VERSION = 1
"""Of summary.json; raised when a field changes its meaning or goes."""


@dataclass(frozen=True)
class About:
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
    tuning: Path | None = None,
    searched: bool = False,
    looks: Sequence[int] = (),
) -> Summary:
    """Writes the files into `folder`, each whole or not at all, and returns what they show.

    `baseline`: what all variants are compared with; the records are then of fresh seeds at the points that
    the study in the folder `tuning` has chosen. `searched`, `looks`: see StudyFile.

    `pending`: configurations of the study without a record yet. `command` is what a reader types to get the
    study; a user and password in it or in `tracking_uri` are left out. Raises OSError if the folder cannot be
    written.
    """
    records = panels.distinct(records)
    summary = summarize(
        records, baseline=baseline, margin=margin, tuning=_chosen(tuning), looks=looks, search=searched
    )
    command, tracking_uri = formatting.without_secrets(command), formatting.without_secrets(tracking_uri)
    about = About(name, question, command, tracking_uri, pending, tuple(notes))
    pictures = _pictures(summary)
    folder.mkdir(parents=True, exist_ok=True)
    for picture, content in pictures.items():
        atomic_files.replace(folder / picture, content)
    atomic_files.replace(folder / "summary.json", json.dumps(as_json(summary, about), indent=1).encode())
    atomic_files.replace(folder / "report.html", _html(summary, about, records, pictures).encode())
    return summary


def _pictures(summary: Summary) -> dict[str, bytes]:
    """File name -> PNG, of what the study has."""
    from orchestrator.analyze.plots import curves, forest, search_curves

    found = {}
    if summary.comparisons:
        found["forest.png"] = forest.forest(summary.comparisons)
    if summary.searches:
        found["search.png"] = search_curves.points(summary.searches)
    if summary.panels or not found:
        found |= {"curves.png": curves.curves(summary), "spread.png": curves.spread(summary)}
    return found


def _chosen(tuning: Path | None) -> Mapping[str, Chosen | None]:
    """What the first stage of a comparison has chosen; nothing where that is not at hand."""
    kept = selection.read(tuning, TunedChoice) if tuning else None
    return kept.variants if kept else {}


def as_json(summary: Summary, about: About) -> dict[str, Any]:
    """Every number of the report; JSON's own types only, no NaN."""
    from pydantic import TypeAdapter

    found = {"schema_version": SCHEMA_VERSION, **TypeAdapter(About).dump_python(about, mode="json")}
    found |= TypeAdapter(Summary).dump_python(summary, mode="json")
    for panel, shown in zip(summary.panels, found["panels"], strict=True):
        shown["answer"] = formatting.answer(panel)
    for compared, shown in zip(summary.comparisons, found["comparisons"], strict=True):
        shown["verdict"] = verdict.verdict(compared)
    return found


def reproduce(about: About, panel: Panel, curve: Curve, rates: Sequence[float]) -> str:
    return formatting.narrowed(about.command, curve.variant, rates, {**panel.varied, **curve.varied})


def _html(summary: Summary, about: About, records: Sequence[Record], pictures: Mapping[str, bytes]) -> str:
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
        words=formatting,
        verdict=verdict,
        pictures={name: base64.b64encode(content).decode() for name, content in pictures.items()},
        reproduce=lambda panel, curve, rates: reproduce(about, panel, curve, rates),
        ended=_ended(summary, records),
        opens=how_to_open(about.tracking_uri),
    )


def _ended(summary: Summary, records: Sequence[Record]) -> dict[str, list[tuple[str, str, Record]]]:
    """The runs that did not finish, by state: the variant's label, the panel's title, the record."""
    where = {
        run.fingerprint: (curve.label, formatting.title(panel))
        for panel in summary.panels
        for curve in panel.curves
        for point in curve.points
        for run in point.runs
    }
    found: dict[str, list[tuple[str, str, Record]]] = {"failed": [], "stopped": [], "diverged": []}
    for r in records:
        if r.state in found:
            c = r.configuration
            label, title = where.get(r.fingerprint, (c.variant.name, f"{c.task.name} on {c.model.name}"))
            found[r.state].append((label, title, r))
    for runs in found.values():
        runs.sort(
            key=lambda e: (e[1], e[0], e[2].configuration.optimizer.learning_rate, e[2].configuration.seed)
        )
    return found


def how_to_open(tracking_uri: str) -> str:
    """The command that shows the runs in MLflow's pages; empty for a server, which is opened by its
    address."""
    if not tracking_uri or tracking_uri.startswith(("http://", "https://")):
        return ""
    return shlex.join(["mlflow", "ui", "--backend-store-uri", tracking_uri])
