"""The report of a study: report.html (one file, no other host is asked), curves.png, spread.png,
summary.json."""

from __future__ import annotations

import base64
import json
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.analyze import groups, words
from orchestrator.analyze.results import Curve, Panel, Run, Summary
from orchestrator.analyze.sensitivity import summarize
from orchestrator.record.schema import Record

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
) -> Summary:
    """Writes the four files into `folder`, each whole or not at all, and returns what they show.

    `pending`: configurations of the study without a record yet. `command` is what a reader types to get the
    study; a user and password in it or in `tracking_uri` are left out. Raises OSError if the folder cannot be
    written.
    """
    from orchestrator.analyze import plots

    records = groups.distinct(records)
    summary = summarize(records)
    command, tracking_uri = words.without_secrets(command), words.without_secrets(tracking_uri)
    about = About(name, question, command, tracking_uri, pending, tuple(notes))
    curves, spread = plots.curves(summary), plots.spread(summary)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "curves.png", curves)
    _write(folder / "spread.png", spread)
    _write(folder / "summary.json", json.dumps(as_json(summary, about), indent=1).encode())
    _write(folder / "report.html", _html(summary, about, records, curves, spread).encode())
    return summary


def _write(path: Path, content: bytes) -> None:
    """Renamed into place: a reader sees the old file or the new one, never a half."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def as_json(summary: Summary, about: About) -> dict[str, Any]:
    """Every number of the report; JSON's own types only, no NaN."""
    from pydantic import TypeAdapter

    found = {"schema_version": SCHEMA_VERSION, **TypeAdapter(About).dump_python(about, mode="json")}
    found |= TypeAdapter(Summary).dump_python(summary, mode="json")
    for panel, shown in zip(summary.panels, found["panels"], strict=True):
        shown["answer"] = words.answer(panel)
    return found


def reproduce(about: About, panel: Panel, curve: Curve, rates: Sequence[float]) -> str:
    return words.narrowed(about.command, curve.variant, rates, {**panel.varied, **curve.varied})


def _html(summary: Summary, about: About, records: Sequence[Record], curves: bytes, spread: bytes) -> str:
    # autoescape is set by hand: its usual rule goes by the ending .html and would skip this template.
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("orchestrator.analyze", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    by_fingerprint = {r.fingerprint: r for r in records}
    return environment.get_template("report.html.jinja").render(
        about=about,
        summary=summary,
        words=words,
        curves=base64.b64encode(curves).decode(),
        spread=base64.b64encode(spread).decode(),
        reproduce=lambda panel, curve, rates: reproduce(about, panel, curve, rates),
        record=lambda run: by_fingerprint[run.fingerprint],
        ended=_ended(summary),
        opens=how_to_open(about.tracking_uri),
    )


def _ended(summary: Summary) -> dict[str, list[tuple[Panel, Curve, float, Run]]]:
    """The runs that did not finish, by state."""
    found: dict[str, list[tuple[Panel, Curve, float, Run]]] = {"failed": [], "stopped": [], "diverged": []}
    for panel in summary.panels:
        for curve in panel.curves:
            for point in curve.points:
                for run in point.runs:
                    if run.state in found:
                        found[run.state].append((panel, curve, point.learning_rate, run))
    return found


def how_to_open(tracking_uri: str) -> str:
    """The command that shows the runs in MLflow's pages; empty for a server, which is opened by its
    address."""
    if not tracking_uri or tracking_uri.startswith(("http://", "https://")):
        return ""
    return shlex.join(["mlflow", "ui", "--backend-store-uri", tracking_uri])
