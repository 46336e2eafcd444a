"""Rendering of `report.html`: a single file that contains everything it shows and can be opened from disk.

The page contains plotly.js and the interactive figures in compressed form, which its script inflates, and the
static pictures as PNG, which a browser without JavaScript shows.
"""

from __future__ import annotations

import base64
import shlex
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from orchestrator.analyze import formatting
from orchestrator.analyze.interactive import plotly_style
from orchestrator.analyze.report_parts import Picture, ReportData
from orchestrator.analyze.sections.catalogue import SECTIONS
from orchestrator.util.graceful_interrupts import PROGRAM


def render_page(data: ReportData, pictures: Mapping[str, tuple[Picture, bytes]], pending: int) -> str:
    """Return the page as HTML.

    Args:
        data: The study, its summary and its records.
        pictures: Name -> the picture, and its static version as PNG.
        pending: The number of configurations without a record.
    """
    # `select_autoescape` goes by the ending of the name and would not escape in *.html.jinja.
    loader = PackageLoader("orchestrator.analyze")
    options: dict[str, Any] = {"undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=loader, autoescape=True, **options)
    environment.globals |= {
        "data": data,
        "summary": data.summary,
        "formatting": formatting,
        "pictures": {name: picture for name, (picture, _) in pictures.items()},
        "png": {name: base64.b64encode(content).decode() for name, (_, content) in pictures.items()},
    }
    bodies = []
    for section in SECTIONS:
        template = environment.get_template(f"{section.name}.html.jinja")
        body = template.render(section.values(data)).strip()
        if body:
            bodies.append((section, Markup(body)))
    figures = {
        name: picture.interactive()
        for name, (picture, _) in pictures.items()
        if picture.interactive is not None
    }
    return environment.get_template("report.html.jinja").render(
        bodies=bodies,
        pending=pending,
        program=PROGRAM,
        mlflow_ui_command=mlflow_ui_command(data.tracking_uri),
        plotly=plotly_style.encoded_bundle() if figures else "",
        figures=plotly_style.encode_figures(figures) if figures else "",
    )


def mlflow_ui_command(tracking_uri: str) -> str:
    """Return the command that opens the runs in MLflow's UI; empty for a server, which serves its own UI."""
    if not tracking_uri or tracking_uri.startswith(("http://", "https://")):
        return ""
    # Four workers, MLflow's default, end each other by a time limit while a busy machine starts them.
    return shlex.join(["mlflow", "ui", "--workers", "1", "--backend-store-uri", tracking_uri])
