"""The page of the published scores: tables for the terminal, `report.html`, pictures and `summary.json`."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from orchestrator.analyze import formatting
from orchestrator.analyze.published.published_overlay import Overlay, read_overlays
from orchestrator.analyze.published.published_scores import (
    REFERENCE,
    TASKS,
    PublishedTask,
    read_table,
    summarize_task,
)
from orchestrator.analyze.published.published_verdicts import SOURCE, published_verdicts, rates_text
from orchestrator.analyze.verdict import Verdict
from orchestrator.study import bounds
from orchestrator.study.study_name import DEFAULT_STORE_NAME
from orchestrator.util import atomic_files
from orchestrator.util.errors import UsageError

SCHEMA_VERSION = 1
"""Version of `summary.json`, raised when a field is removed or changes its meaning."""
FOLDER = "published"
"""The page's folder in the output folder."""
WIDTH = 80
"""Columns of the text."""
TITLE = f"The published scores of {SOURCE}"


def render_published(tasks: Sequence[PublishedTask]) -> Group:
    """Return the verdicts and tables for a terminal of 80 columns."""
    parts: list[Any] = [Text(TITLE, style="bold"), Text("")]
    for verdict in published_verdicts(tasks):
        parts += [Text(verdict.claim, style="bold"), Padding(Text(verdict.answer), (0, 0, 1, 2))]
    for task in tasks:
        parts += [_variant_table(task), Text(""), _winner_table(task), Text("")]
    return Group(*parts)


def _variant_table(task: PublishedTask) -> Table:
    at = formatting.rate(task.reference_rate)
    table = Table(title=f"{task.table.title}: {task.table.description}", title_justify="left", box=None)
    table.add_column("Rank", justify="right")
    table.add_column("Variant")
    table.add_column("Best score", justify="right")
    table.add_column("Best rate")
    table.add_column(f"Loss at {at}", justify="right")
    table.add_column("Range over rates", justify="right")
    for each in task.variants:
        edge = " (edge)" if each.at_edge else ""
        table.add_row(
            f"{each.rank}{'=' if each.tied_with else ''}",
            each.variant,
            f"{each.best_score:.2f}",
            rates_text(each.best_rates) + edge,
            f"{each.loss_at_reference_rate:.2f}",
            f"{each.range_over_rates:.2f}",
            style="bold" if each.variant == REFERENCE else "",
        )
    table.caption = f"Loss at {at}: points lost by training at {REFERENCE}'s best rate. =: tied. "
    table.caption += "edge: at an end of the grid, perhaps better beyond."
    table.caption_justify = "left"
    return table


def _winner_table(task: PublishedTask) -> Table:
    table = Table(title=f"{task.table.title}: best variant at each rate", title_justify="left", box=None)
    table.add_column("Rate")
    table.add_column("Best variant")
    table.add_column("Score", justify="right")
    table.add_column("Best minus worst", justify="right")
    for each in task.winners:
        names = ", ".join(each.winners) + (" (tie)" if len(each.winners) > 1 else "")
        table.add_row(formatting.rate(each.learning_rate), names, f"{each.score:.2f}", f"{each.span:.2f}")
    return table


def write_published(tasks: Sequence[PublishedTask], folder: Path, overlays: Sequence[Overlay] = ()) -> None:
    """Write `report.html`, `summary.json`, and two pictures a task as PNG and SVG.

    Args:
        tasks: The tasks.
        folder: The folder; every file in it is replaced as a whole or not at all.
        overlays: Own studies on these tasks, drawn over the published curves.

    Raises:
        OSError: The folder cannot be written.
    """
    by_task = {overlay.task: overlay for overlay in overlays}
    verdicts = published_verdicts(tasks)
    pictures = _render_pictures(tasks, by_task)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in pictures.items():
        atomic_files.write_atomically(folder / name, content)
    numbers = {
        "schema_version": SCHEMA_VERSION,
        "source": SOURCE,
        "verdicts": list(map(asdict, verdicts)),
        "tasks": [task.to_json() for task in tasks],
        "overlays": list(map(asdict, overlays)),
    }
    atomic_files.write_atomically(folder / "summary.json", json.dumps(numbers, indent=1).encode())
    page = _render_html(tasks, by_task, verdicts, pictures)
    atomic_files.write_atomically(folder / "report.html", page.encode())


def _render_pictures(tasks: Sequence[PublishedTask], overlays: Mapping[str, Overlay]) -> dict[str, bytes]:
    """Return the pictures: file name -> content."""
    from orchestrator.analyze.plots import style
    from orchestrator.analyze.published import published_plots as plots

    pictures: dict[str, bytes] = {}
    for task in tasks:
        name = task.table.task
        drawn = {
            f"curves_{name}": partial(plots.plot_published_curves, task, overlays.get(name)),
            f"heat_map_{name}": partial(plots.plot_heat_map, task),
        }
        for stem, draw in drawn.items():
            pictures[f"{stem}.png"], pictures[f"{stem}.svg"] = style.render(draw)
    return pictures


def _render_html(
    tasks: Sequence[PublishedTask],
    overlays: Mapping[str, Overlay],
    verdicts: Sequence[Verdict],
    pictures: Mapping[str, bytes],
) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    from orchestrator.analyze.interactive import plotly_bundle
    from orchestrator.analyze.published.published_figures import curve_figure

    # The usual rule for autoescape goes by the ending .html and would skip these templates.
    options: dict[str, Any] = {"undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=PackageLoader("orchestrator.analyze"), autoescape=True, **options)
    figures = {
        f"lines_{task.table.task}": [curve_figure(task, overlays.get(task.table.task))] for task in tasks
    }
    return environment.get_template("published.html.jinja").render(
        title=TITLE,
        source=SOURCE,
        tasks=tasks,
        overlays=overlays,
        verdicts=verdicts,
        png={
            name.removesuffix(".png"): base64.b64encode(content).decode()
            for name, content in pictures.items()
            if name.startswith("curves_") and name.endswith(".png")
        },
        plotly=plotly_bundle.encoded_bundle(),
        figures=plotly_bundle.encode_figures(figures),
        reference=REFERENCE,
        rate=formatting.rate,
        rates_text=rates_text,
        cells=_heat_cells,
    )


def _heat_cells(task: PublishedTask) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return the rows of the heat map: a variant, and for each rate the score, its shade and its marks.

    The shade is 0 (15 points or more below the task's best score) to 1 (the best score).
    """
    from orchestrator.analyze.published.published_plots import SHADED_POINTS

    top, table = task.variants[0].best_score, task.table
    rows = []
    for each in task.variants:
        own = table.scores[table.variants.index(each.variant)]
        cells = [
            {
                "score": float(score),
                "rate": winner.learning_rate,
                "shade": round(max(0.0, 1 - (top - float(score)) / SHADED_POINTS), 2),
                "best": winner.learning_rate in each.best_rates,
                "wins": each.variant in winner.winners,
            }
            for score, winner in zip(own, task.winners, strict=True)
        ]
        rows.append((each.variant, cells))
    return rows


def show_published(
    task_names: Sequence[str],
    noise: float,
    output: Path,
    overlay: str | None = None,
    store: Path | None = None,
) -> None:
    """Print the page of the published scores and write its files to `<output>/published`.

    Args:
        task_names: The published tasks.
        noise: Standard deviation of a score over seeds, in points.
        output: The output folder.
        overlay: The name of an own study in the output folder; its tasks alone are shown.
        store: The folder of that study's records; None for `store` in the output folder.

    Raises:
        UsageError: A task is unknown, the noise is no positive number, or the study cannot be drawn.
    """
    bounds.check_positive("--noise", noise, "1")
    overlays = read_overlays(overlay, output, store or output / DEFAULT_STORE_NAME) if overlay else ()
    names = [each.task for each in overlays] or list(dict.fromkeys(task_names))
    if not names:
        raise UsageError(f"--task is empty; name at least one of {', '.join(TASKS)}.")
    tasks = [summarize_task(read_table(name), noise) for name in names]
    folder = output / FOLDER
    write_published(tasks, folder, overlays)
    console = Console(width=WIDTH, highlight=False)
    console.print(render_published(tasks))
    for each in overlays:
        console.print(f"Overlay  {each.description}", markup=False)
    console.print(f"Report   {folder / 'report.html'}", markup=False, soft_wrap=True)
