"""`study.json`: what a study asked for, kept in its folder so that everything about it can be rebuilt.

<output>/<study>/study.json
{"schema_version", "name", "question", "command", "configurations": [fingerprint, ...],
 "reused": [fingerprint, ...], "tracking_uri", "baseline", "margin", "tuning", "searched",
 "looks": [seeds, ...]}
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from orchestrator.study.retired_options import translate_command
from orchestrator.util import atomic_files
from orchestrator.util.errors import UsageError, quote_value, suggest_nearest

_log = logging.getLogger(__name__)

STUDY_FILE = "study.json"
SCHEMA_VERSION = 1
"""Of study.json; to be raised when a field is added, removed or changes its meaning. A file that says none
has version 1."""
PLOT_FILES = ("forest.png", "search.png", "curves.png", "spread.png")
"""The pictures of a study's report, beside study.json. A study has some of them."""
REPORT_FILES = ("report.html", *PLOT_FILES, "summary.json")
"""All files of a study's report."""


@dataclass(frozen=True)
class StudyFile:
    """`command` is the command line as typed, but for passwords. `reused` are the configurations that were
    known already when the study first asked for them; being kept, it stays true after a crash and a second
    run."""

    name: str
    question: str
    command: str
    configurations: tuple[str, ...] = ()
    reused: tuple[str, ...] = ()
    tracking_uri: str = ""
    """Empty: the SQLite file of the store. A password in it is not kept: stars stand there."""
    baseline: str = ""
    """Of a study with fresh seeds: the variant that all others are compared with. Empty: no comparison."""
    margin: float = 0.01
    """Of such a study: the smallest difference of the test score that matters, fixed before it began."""
    tuning: str = ""
    """Of such a study: the name of the study beside it that chose the configurations."""
    searched: bool = False
    """Whether a search asked for its points, so that no grid's curve goes through them."""
    looks: tuple[int, ...] = ()
    """Of a study with fresh seeds: how many it had each time a verdict was read, ascending. With more seeds
    after a look the 5 % no longer holds exactly."""

    def with_configurations(self, requested: Iterable[str], cached: Iterable[str]) -> StudyFile:
        """This study with more configurations; those new to it that are `known` count as reused."""
        requested, cached, present = list(dict.fromkeys(requested)), set(cached), set(self.configurations)
        added = tuple(f for f in requested if f not in present)
        return replace(
            self,
            configurations=self.configurations + added,
            reused=self.reused + tuple(f for f in added if f in cached),
        )

    def with_look(self, seeds: int) -> StudyFile:
        """This study after a verdict from so many seeds; with no more of them it is the same look again."""
        return replace(self, looks=(*self.looks, seeds)) if seeds > max(self.looks, default=0) else self

    def write(self, folder: Path) -> None:
        """Replaces `folder`/study.json at once."""
        folder.mkdir(parents=True, exist_ok=True)
        data = {"schema_version": SCHEMA_VERSION, **asdict(self)}
        atomic_files.write_atomically(
            folder / STUDY_FILE, atomic_files.add_checksum(json.dumps(data, indent=1))
        )

    @classmethod
    def read(cls, folder: Path) -> StudyFile | None:
        """Read `folder`/study.json.

        Args:
            folder: the study's folder.

        Returns:
            The study, or None where the folder holds none.

        Raises:
            BadInput: the file is not a study, is damaged, or was written by a newer version of this program;
                or it is another study's.
        """
        study = cls._read(folder)
        if study is not None and study.name != folder.name:
            raise UsageError(
                f"{folder / STUDY_FILE}: is of the study {quote_value(study.name)}, not {quote_value(folder.name)}; give the "
                "folder its name back, or delete the file and run the study's command again"
            )
        return study

    @classmethod
    def _read(cls, folder: Path) -> StudyFile | None:
        """Do as `read`, whatever the folder is called."""
        path, remedy = folder / STUDY_FILE, "delete it and run the study's command again"
        data: dict[str, Any] | None = atomic_files.read_json(path, dict[str, Any], "a study", remedy)
        if data is None:
            return None
        version = data.pop("schema_version", SCHEMA_VERSION)
        if version != SCHEMA_VERSION:
            raise _newer_version_error(path, f"schema_version {version}")
        unknown = sorted(data.keys() - {field.name for field in fields(cls)})
        if unknown:
            raise _newer_version_error(path, f"field {unknown[0]!r}")
        text = json.dumps(data).encode()
        study: StudyFile = atomic_files.parse_json(text, cls, str(path), "a study", remedy)
        odd = [name for name in study.configurations if not name.isalnum()]
        if odd:
            raise UsageError(
                f"{path}: not a study (configurations: {quote_value(odd[0])} is no fingerprint); {remedy}"
            )
        return replace(study, command=translate_command(study.command))


def _newer_version_error(path: Path, what: str) -> UsageError:
    return UsageError(
        f"{path}: {what} is unknown to this program, so a newer version of it has written the file; "
        "update the program, or choose another --study"
    )


def read_studies(output: Path) -> dict[str, tuple[Path, StudyFile]]:
    """name -> (folder, study) of every study under `output`, sorted by name. A copy in a folder of another
    name is left out, with a warning."""
    found = {}
    for path in sorted(output.glob(f"*/{STUDY_FILE}")):
        study = StudyFile._read(path.parent)
        if study is not None and study.name != path.parent.name:
            _log.warning(
                "%s is of the study %s: left out until the folder has this name",
                path,
                quote_value(study.name),
            )
        elif study is not None:
            found[study.name] = (path.parent, study)
    return found


def find_study(output: Path, name: str) -> tuple[Path, StudyFile]:
    """Raises BadInput with the nearest name when no study under `output` is called `name`."""
    studies = read_studies(output)
    if not studies:
        raise UsageError(f"study {name!r}: there is no study under {output}; name its folder with --output")
    if name not in studies:
        raise UsageError(f"study {name!r}: not under {output}. {suggest_nearest(name, studies)}")
    return studies[name]
