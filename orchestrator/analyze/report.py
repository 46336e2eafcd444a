"""The report of a study: its files, its description for MLflow, and a memo of its inputs.

The memo is the file `<output>/<study>/.report.json`. It identifies the inputs of the last report, so that the
same report is not written again. Its content is {"inputs": digest, "files": {name: SHA-256}, "end": digest,
"text": what the study's command printed at its end}.

The functions import pandas, Altair and the other slow libraries, so that importing this module is fast.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from orchestrator.analyze import formatting
from orchestrator.record.schema import Record
from orchestrator.record.store import Store
from orchestrator.record.study_file import StudyFile, report_files
from orchestrator.study.names import DEFAULT_STORE_NAME
from orchestrator.util import atomic_files
from variants.catalogue import source_digest

if TYPE_CHECKING:
    from orchestrator.analyze.render import Section
    from orchestrator.analyze.results import Results

SCHEMA_VERSION = 4
"""The version of the format of `summary.json`. It rises when a field is removed or changes its meaning."""
MEMO_FILE = ".report.json"
"""The name of the memo in the study's folder."""
_PACKAGES = Path(__file__).parents[1], Path(__file__).parents[2] / "variants"
# The digests are computed on import, because the source files may change while a study runs.
_PROGRAM = [source_digest(package) for package in _PACKAGES]
_LIBRARIES = ("altair", "mlflow", "numpy", "pandas", "scipy", "vl-convert-python")
"""Libraries whose versions affect the content of a report or of MLflow's runs."""
_OUTCOME_NUMBERS = {"supported": 1.0, "undecided": 0.0, "refuted": -1.0}
"""Outcome of a verdict -> metric in MLflow."""


class StudyDescription(NamedTuple):
    """The description and the metrics of the MLflow run that stands for the whole study."""

    text: str
    """The report in Markdown, without charts and without folded sections."""
    metrics: dict[str, float]
    """Name -> value of the metrics.

    - `verdict_1`, `verdict_2` and so on: 1 for supported, 0 for undecided, -1 for refuted. A descriptive
      verdict has no metric.
    - `best_validation_score.<curve>`, `best_test_score.<curve>` and `best_log10_learning_rate.<curve>`: the
      best point of each curve. With several panels, the names end in `.<task>`, or in `.<panel>` if several
      panels have the same task. A replicated tuning does not have these metrics.
    """


def write_report(
    study: StudyFile, records: Iterable[Record], folder: Path, tracking_uri: str, store: Path | None = None
) -> tuple[Results, list[Section]]:
    """Analyze a study and write its report: `report.html`, the charts (PNG and SVG) and `summary.json`.

    Args:
        study: The study, with its command.
        records: The records of the study's configurations. Configurations without a record count as pending.
        folder: The study's folder, which lies in the output folder. Each file is replaced atomically. Charts
            of an earlier report are removed if this report does not have them.
        tracking_uri: MLflow's tracking URI of the runs. Secrets are removed from the URI and from the
            command.
        store: The folder of the records, which commands in the report name. None stands for the store in the
            output folder.

    Returns:
        The results and the sections of the report.

    Raises:
        OSError: The folder cannot be written.
    """
    from orchestrator.analyze import render, sections
    from orchestrator.analyze.analysis import analyze, with_harness

    study = replace(study, command=formatting.redact_secrets(study.command))
    root = store or folder.parent / DEFAULT_STORE_NAME
    results = with_harness(analyze(study, records), root / "harness")
    uri = formatting.redact_secrets(tracking_uri)
    shown = sections.Report(results, uri, folder.parent, store)
    made = sections.make_sections(shown)
    chips = [f"{n} {label}" for label, n in results.states.items() if n or label == "finished"]
    chips += [f"{results.missing} pending"] if results.missing else []
    page = render.to_html(study.name, study.question, sections.setup_line(results), chips, made)
    about = {
        "schema_version": SCHEMA_VERSION,
        "name": study.name,
        "question": study.question,
        "command": study.command,
        "tracking_uri": uri,
        "setup": sections.setup_line(results),
        "pending": results.missing,
        "next": dict(zip(("step", "command"), shown.next_step, strict=True)),
    }
    write_files(folder, page, about | results.to_json(), made)
    return results, made


def write_files(folder: Path, page: str, numbers: Mapping[str, Any], made: Sequence[Section]) -> None:
    """Write the files of a report, and remove charts of an earlier report that this report does not have.

    Args:
        folder: The folder of the files, which is created if it is missing.
        page: The content of report.html.
        numbers: The content of summary.json, without the file names of the charts.
        made: The sections, whose charts are written as PNG and SVG.
    """
    from orchestrator.analyze import chart_style

    pictures: dict[str, bytes] = {}
    for section in made:
        if section.chart is not None:
            pictures[f"{section.name}.png"] = chart_style.to_png(section.chart)
            pictures[f"{section.name}.svg"] = chart_style.to_svg(section.chart).encode()
    summary = json.dumps({**numbers, "pictures": list(pictures)}, indent=1, allow_nan=False)
    earlier = report_files(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = {**pictures, "summary.json": summary.encode(), "report.html": page.encode()}
    for name, content in files.items():
        atomic_files.write_atomically(folder / name, content)
    for path in earlier:
        if path.name not in files:
            path.unlink(missing_ok=True)


def describe_study(study: StudyFile, records: Iterable[Record]) -> StudyDescription:
    """Analyze the records of a study, and return the description of the results for MLflow."""
    from orchestrator.analyze import sections
    from orchestrator.analyze.analysis import analyze

    study = replace(study, command=formatting.redact_secrets(study.command))
    results = analyze(study, records)
    return describe(results, sections.make_sections(sections.Report(results)))


def describe(results: Results, made: Sequence[Section]) -> StudyDescription:
    """Return the description of a study's results for MLflow.

    Args:
        results: The results.
        made: The sections of the report.
    """
    from orchestrator.analyze import render

    outcomes = results.verdicts["outcome"]
    metrics = {
        f"verdict_{place}": _OUTCOME_NUMBERS[outcome]
        for place, outcome in enumerate(outcomes, 1)
        if outcome in _OUTCOME_NUMBERS
    }
    panels = results.panels
    one_each = panels["task"].nunique() == len(panels)
    task_of = panels.set_index("panel")["task"]
    is_tuned = results.study.settings.kind == "replicates"
    for row in () if is_tuned else results.best.to_dict("records"):
        if math.isnan(row["learning_rate"]) or row["nothing_learned"]:
            continue
        panel = task_of[row["panel"]] if one_each else row["panel"]
        name = f"{row['curve']}.{panel}" if len(panels) > 1 else row["curve"]
        metrics[f"best_log10_learning_rate.{name}"] = math.log10(row["learning_rate"])
        for score in ("validation_score", "test_score"):
            if not math.isnan(row[score]):
                metrics[f"best_{score}.{name}"] = row[score]
    return StudyDescription(render.to_markdown(made), metrics)


# -- the memo


def digest_inputs(study: StudyFile, store: Store, uri: str, folder: Path) -> str:
    """Return a digest of everything that determines a study's report, including the program.

    Args:
        study: The study.
        store: The records. Records of other studies change the digest, too, because the Parquet files contain
            them.
        uri: MLflow's tracking URI, without secrets.
        folder: The study's folder.
    """
    scores = [(str(path), path.stat().st_mtime_ns) for path in store.harness.glob("*/[!.]*.json")]
    stamps = sorted(store.stamps()), sorted(scores)
    libraries = [version(name) for name in _LIBRARIES]
    return digest(study, stamps, uri, str(folder), str(store.root), _PROGRAM, libraries)


def digest(*values: object) -> str:
    """Return the SHA-256 digest of values. The `repr` of each value must show its whole content."""
    return hashlib.sha256(repr(values).encode()).hexdigest()


def is_written(folder: Path, inputs: str) -> bool:
    """Return whether the folder has the report of the inputs, and the files of the report are unchanged.

    Args:
        folder: The study's folder.
        inputs: The result of `digest_inputs`.
    """
    memo = _read(folder)
    return memo.get("inputs") == inputs and memo.get("files") == _file_digests(folder)


def recall_end(folder: Path, inputs: str, end: str) -> str | None:
    """Return what the study's command printed at its end; None if an input or a file has changed.

    Args:
        folder: The study's folder.
        inputs: The result of `digest_inputs`.
        end: A digest of everything else that determines what the command prints.
    """
    memo = _read(folder)
    return memo.get("text") if memo.get("end") == end and is_written(folder, inputs) else None


def remember(folder: Path, inputs: str, end: str = "", text: str = "") -> None:
    """Write the memo, which records that the folder has the report of the inputs.

    Args:
        folder: The study's folder.
        inputs: The result of `digest_inputs`.
        end: A digest of everything else that determines what the command prints.
        text: What the study's command printed at its end.
    """
    memo = {"inputs": inputs, "files": _file_digests(folder), "end": end, "text": text}
    atomic_files.write_atomically(folder / MEMO_FILE, json.dumps(memo, indent=1).encode())


def _read(folder: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        memo = json.loads((folder / MEMO_FILE).read_bytes())
        if isinstance(memo, dict):
            return memo
    return {}


def _file_digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in report_files(folder)}
