"""The report on the published scores: the tables in the terminal, `report.html`, pictures, `summary.json`."""

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
    SEED_NOISE,
    PublishedTask,
    read_table,
    summarize_task,
)
from orchestrator.analyze.published.published_verdicts import SOURCE, published_verdicts
from orchestrator.analyze.verdict import Verdict
from orchestrator.util import atomic_files
from orchestrator.util.graceful_interrupts import PROGRAM

SCHEMA_VERSION = 2
"""Version of `summary.json`, raised when a field is removed or changes its meaning."""
FOLDER = "published"
"""The folder of the files, in the output folder."""
WIDTH = 80
"""Width of the terminal's text, in characters."""
TITLE = f"The published scores of {SOURCE}"


def render_published(tasks: Sequence[PublishedTask]) -> Group:
    """Return the verdicts and the tables for a terminal of `WIDTH` characters."""
    parts: list[Any] = [Text(TITLE, style="bold"), Text("")]
    for verdict in published_verdicts(tasks):
        parts += [Text(verdict.heading, style="bold"), Padding(Text(verdict.answer), (0, 0, 1, 2))]
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
            formatting.rates(each.best_rates) + edge,
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
    """Write `report.html`, `summary.json`, and two pictures per task, each as PNG and SVG.

    Args:
        tasks: The published tasks.
        folder: The folder of the files. Each file is replaced atomically.
        overlays: Curves of own studies, at most one per task, drawn over the published curves.

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
    atomic_files.write_atomically(
        folder / "summary.json", json.dumps(numbers, indent=1, allow_nan=False).encode()
    )
    page = _render_html(tasks, by_task, verdicts, pictures)
    atomic_files.write_atomically(folder / "report.html", page.encode())


def _render_pictures(tasks: Sequence[PublishedTask], overlays: Mapping[str, Overlay]) -> dict[str, bytes]:
    """Return file name -> content of each picture. `overlays` is by the name of the published task."""
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

    from orchestrator.analyze.interactive import plotly_style
    from orchestrator.analyze.published.published_plots import curve_figure

    # jinja2.select_autoescape would skip these templates, whose names end in .jinja.
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
        plotly=plotly_style.encoded_bundle(),
        figures=plotly_style.encode_figures(figures),
        program=PROGRAM,
        reference=REFERENCE,
        rate=formatting.rate,
        rates_text=formatting.rates,
        cells=_heat_cells,
    )


def _heat_cells(task: PublishedTask) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return the rows of the page's heat map, each a variant and its cells by ascending rate.

    Returns:
        The variants with their cells. A cell has `score` in points, `rate`, `best` (whether the rate is the
        variant's best one), `wins` (whether the variant is the best one at the rate), and `shade`, from 0 for
        `SHADED_POINTS` or more below the task's best score to 1 for the best score.
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
    noise: Sequence[float],
    output: Path,
    store: Path,
    overlay: str | None = None,
) -> None:
    """Print the report on the published scores and write its files to `<output>/published`.

    Args:
        task_names: Names of published tasks, see `TASKS`; ignored with `overlay`.
        noise: Assumed standard deviations of a score over seeds, in points.
        output: The output folder.
        store: The folder of the store.
        overlay: The name of an own study in the output folder, to be drawn over the published curves. Only
            the published tasks of that study are shown.

    Raises:
        UsageError: A task is unknown, or the study cannot be drawn.
    """
    overlays = read_overlays(overlay, output, store) if overlay else ()
    names = [each.task for each in overlays] or list(dict.fromkeys(task_names))
    tasks = [summarize_task(read_table(name), noise or tuple(SEED_NOISE)) for name in names]
    folder = output / FOLDER
    write_published(tasks, folder, overlays)
    console = Console(width=WIDTH, highlight=False)
    console.print(render_published(tasks))
    for each in overlays:
        console.print(f"Overlay  {each.description}", markup=False)
    console.print(f"Report   {folder / 'report.html'}", markup=False, soft_wrap=True)
