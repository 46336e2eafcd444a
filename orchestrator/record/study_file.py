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

from orchestrator.util import atomic_files
from orchestrator.util.errors import BadInput, nearest, quoted

_log = logging.getLogger(__name__)

FILE = "study.json"
SCHEMA_VERSION = 1
"""Of study.json; to be raised when a field is added, removed or changes its meaning. A file that says none
has version 1."""
PICTURES = ("forest.png", "search.png", "curves.png", "spread.png")
"""The pictures of a study's report, beside study.json. A study has some of them."""
REPORT = ("report.html", *PICTURES, "summary.json")
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

    def extended(self, asked: Iterable[str], known: Iterable[str]) -> StudyFile:
        """This study with more configurations; those new to it that are `known` count as reused."""
        asked, known, old = list(dict.fromkeys(asked)), set(known), set(self.configurations)
        new = tuple(f for f in asked if f not in old)
        return replace(
            self,
            configurations=self.configurations + new,
            reused=self.reused + tuple(f for f in new if f in known),
        )

    def looked(self, seeds: int) -> StudyFile:
        """This study after a verdict from so many seeds; with no more of them it is the same look again."""
        return replace(self, looks=(*self.looks, seeds)) if seeds > max(self.looks, default=0) else self

    def write(self, folder: Path) -> None:
        """Replaces `folder`/study.json at once."""
        folder.mkdir(parents=True, exist_ok=True)
        data = {"schema_version": SCHEMA_VERSION, **asdict(self)}
        atomic_files.replace(folder / FILE, atomic_files.seal(json.dumps(data, indent=1)))

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
            raise BadInput(
                f"{folder / FILE}: is of the study {quoted(study.name)}, not {quoted(folder.name)}; give the "
                "folder its name back, or delete the file and run the study's command again"
            )
        return study

    @classmethod
    def _read(cls, folder: Path) -> StudyFile | None:
        """Do as `read`, whatever the folder is called."""
        path, remedy = folder / FILE, "delete it and run the study's command again"
        data: dict[str, Any] | None = atomic_files.read(path, dict[str, Any], "a study", remedy)
        if data is None:
            return None
        version = data.pop("schema_version", SCHEMA_VERSION)
        if version != SCHEMA_VERSION:
            raise _newer(path, f"schema_version {version}")
        unknown = sorted(data.keys() - {field.name for field in fields(cls)})
        if unknown:
            raise _newer(path, f"field {unknown[0]!r}")
        text = json.dumps(data).encode()
        study: StudyFile = atomic_files.parsed(text, cls, str(path), "a study", remedy)
        odd = [name for name in study.configurations if not name.isalnum()]
        if odd:
            raise BadInput(
                f"{path}: not a study (configurations: {quoted(odd[0])} is no fingerprint); {remedy}"
            )
        return study


def _newer(path: Path, what: str) -> BadInput:
    return BadInput(
        f"{path}: {what} is unknown to this program, so a newer version of it has written the file; "
        "update the program, or choose another --study"
    )


def all_studies(output: Path) -> dict[str, tuple[Path, StudyFile]]:
    """name -> (folder, study) of every study under `output`, sorted by name. A copy in a folder of another
    name is left out, with a warning."""
    found = {}
    for path in sorted(output.glob(f"*/{FILE}")):
        study = StudyFile._read(path.parent)
        if study is not None and study.name != path.parent.name:
            _log.warning(
                "%s is of the study %s: left out until the folder has this name", path, quoted(study.name)
            )
        elif study is not None:
            found[study.name] = (path.parent, study)
    return found


def find_study(output: Path, name: str) -> tuple[Path, StudyFile]:
    """Raises BadInput with the nearest name when no study under `output` is called `name`."""
    studies = all_studies(output)
    if not studies:
        raise BadInput(f"study {name!r}: there is no study under {output}; name its folder with --output")
    if name not in studies:
        raise BadInput(f"study {name!r}: not under {output}. {nearest(name, studies)}")
    return studies[name]
