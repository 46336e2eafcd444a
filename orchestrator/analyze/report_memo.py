"""A file that identifies the inputs of a study's last report, so that the same report is not made again.

<output>/<study>/.report.json
{"inputs": digest, "files": {name: SHA-256}, "end": digest, "text": what the study's command printed}
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from orchestrator.record.store import Store
from orchestrator.record.study_file import REPORT_FILES, StudyFile
from orchestrator.util import atomic_files
from variants.source_cache import source_digest

MEMO_FILE = ".report.json"
_PACKAGES = Path(__file__).parents[1], Path(__file__).parents[2] / "variants"
# The digest is taken when the program is loaded, because its files may change while a study runs.
_PROGRAM = [source_digest(package) for package in _PACKAGES]
_LIBRARIES = ("matplotlib", "mlflow", "numpy", "plotly", "scipy")
"""Libraries that decide the content of a report or of MLflow's runs."""


def digest_inputs(study: StudyFile, store: Store, uri: str, folder: Path) -> str:
    """Return a digest of everything that determines a study's report, the program itself included.

    Args:
        study: The study.
        store: The records. Those of other studies count, too, because the Parquet files contain them.
        uri: MLflow's tracking URI, without secrets.
        folder: The study's folder.
    """
    stamps = sorted(store.stamps())
    study = replace(study, looks=())  # a report records its own look, which is no new input of the next one
    return digest(
        study, stamps, uri, str(folder), str(store.root), _PROGRAM, [version(n) for n in _LIBRARIES]
    )


def digest(*values: object) -> str:
    """Return a digest of values whose `repr` is their content."""
    return hashlib.sha256(repr(values).encode()).hexdigest()


def is_written(folder: Path, inputs: str) -> bool:
    """Return whether the folder has the report of these inputs, and none of its files has changed."""
    memo = _read(folder)
    return memo.get("inputs") == inputs and memo.get("files") == _file_digests(folder)


def recall_end(folder: Path, inputs: str, end: str) -> str | None:
    """Return what the study's command printed at its end; None if something has changed since.

    Args:
        folder: The study's folder.
        inputs: The result of `digest_inputs`.
        end: A digest of everything else that determines what is printed.
    """
    memo = _read(folder)
    return memo.get("text") if memo.get("end") == end and is_written(folder, inputs) else None


def remember(folder: Path, inputs: str, end: str = "", text: str = "") -> None:
    """Record that the folder has the report of these inputs.

    Args:
        folder: The study's folder.
        inputs: The result of `digest_inputs`.
        end: As for `recall_end`.
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
    files = [path for name in REPORT_FILES if (path := folder / name).is_file()]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
