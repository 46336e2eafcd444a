"""`study.json`: the record of what a study has requested, from which its projections can be rebuilt."""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from orchestrator.record.schema import Record
from orchestrator.study.expected import Expectation
from orchestrator.study.names import CONFIG_NAME, DEFAULT_STORE_NAME, nearest_valid_name, other_folders
from orchestrator.util import atomic_files
from orchestrator.util.command import PROGRAM
from orchestrator.util.errors import UsageError, quote_value, suggest_nearest
from variants.variant_settings import FILE_SUFFIX

_log = logging.getLogger(__name__)

STUDY_FILE = "study.json"
LOCK_FILE = ".lock"
"""File beside study.json that a running study locks. Only its holder writes study.json."""


def report_files(folder: Path) -> list[Path]:
    """Return the existing files of the report in a folder.

    These are the pictures that summary.json names, then report.html and summary.json. Pictures with another
    name belong to the user.
    """
    summary = folder / "summary.json"
    names: list[str] = []
    with suppress(OSError, ValueError):  # there is no report yet, or its summary is damaged
        names = json.loads(summary.read_bytes()).get("pictures", [])
    pictures = [
        folder / name for name in names if name == Path(name).name and name.endswith((".png", ".svg"))
    ]
    return [path for path in (*pictures, folder / "report.html", summary) if path.is_file()]


StudyKind = Literal["curve", "search", "replicates", "factors", "transfer"]
"""The design of a study:

- curve: a grid of learning rates with several seeds.
- search: points that a sampler has chosen.
- replicates: every replicate tunes each variant with a grid or a search of its own.
- factors: one hyperparameter after another is varied, with the learning rate tuned again.
- transfer: one factor at several levels, each with a grid of learning rates.
"""


@dataclass(frozen=True)
class AnalysisSettings:
    """The settings of a study's analysis, fixed before there are results."""

    kind: StudyKind = "curve"
    baseline: str = "lora"
    """The variant that all others are compared with."""
    margin: float = 0.01
    """The smallest difference of the score that matters."""
    select: Literal["validation", "published"] = "validation"
    """The scores that choose the best rate: the validation scores, or, as in the published survey, the test
    scores."""
    by: Literal["loss", "score"] = "score"
    """Transfer: what chooses the best rate of a level on the validation split."""
    factor: str = ""
    """Transfer: the factor, see `study.levels`."""
    links: tuple[str, ...] = ()
    """Transfer: what moves with the factor, keys of `study.levels.LINKS`."""
    widths: Mapping[str, int] = field(default_factory=dict)
    """Transfer between base models: name of a model -> its hidden size."""
    unverified: tuple[str, ...] = ()
    """Variants that were verified against no other implementation and no paper. They get no verdict."""
    expected: tuple[Expectation, ...] = ()
    """Published numbers, with which the report compares those of the study."""


@dataclass(frozen=True)
class Source:
    """A base model, or a task or variant in a user's file, under the name that it has in a study.

    A record may have been made under another name; see `StudyFile.rename`.
    """

    content: str
    """Content of the model or task, or revision of the variant."""
    name: str
    path: str = ""
    """The user's file or folder; empty for a model that is built in or from the hub."""
    title: str = ""
    """The title of a task; empty for models and variants."""
    revision: str = ""
    """The revision of a task's data; empty for models and variants."""
    warnings: tuple[str, ...] = ()
    """What is wrong with a task's data, one line each; see `Task.warnings`."""


def data_warnings(sources: Iterable[Source]) -> list[str]:
    """Return the warnings of all sources, one line each; for each task, the worst comes first."""
    return [f"{source.title or source.name}: {text}" for source in sources for text in source.warnings]


@dataclass(frozen=True)
class StudyFile:
    """The content of study.json. A file with an unknown field is refused."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    schema_version: Literal[2] = field(default=2, kw_only=True)
    """Version of the file, to be raised when a field is added, removed or changes its meaning."""
    name: str
    question: str
    command: str
    """The command line of the study, without passwords."""
    configurations: tuple[Annotated[str, Field(pattern=r"^\w+$")], ...] = ()
    """Fingerprints of all configurations that the study has requested."""
    reused: tuple[str, ...] = ()
    """Fingerprints of the configurations that the store had when the study first requested them. Later runs
    cannot find this out again."""
    tracking_uri: str = ""
    """MLflow's tracking URI, with stars in place of a password; empty for the SQLite file in the store."""
    settings: AnalysisSettings = AnalysisSettings()
    sources: tuple[Source, ...] = ()
    """The base models of the study, and the tasks and variants in users' files."""
    experiment: str = "study"
    """The experiment as a subcommand of the program: study, tuned, sensitivity or transfer."""
    folder: Path = field(default=Path(), compare=False)
    """The folder of the study. It is not in the file, so that the folder can be moved."""

    def again(self, *words: str, experiment: str = "") -> str:
        """Return the command that runs this study by its study.yaml, with more options.

        Args:
            *words: The options and their values, which replace those of the file.
            experiment: Another experiment to run with the same options.
        """
        config = ["--config", str(self.folder / CONFIG_NAME)]
        return shlex.join([PROGRAM, experiment or self.experiment, *config, *words])

    def option_of(self, task: str) -> tuple[str, str]:
        """Return the option that names one of the tasks alone, and its value."""
        path = next((each.path for each in self.sources if each.name == task), "")
        return "--data" if path and not path.endswith(FILE_SUFFIX) else "--task", path or task

    def train_again(self, fingerprints: Iterable[str], *words: str, store: Path | None = None) -> str:
        """Return the command that trains lanes of this study again.

        It names another output folder and another store, because nothing is trained where a record is known.

        Args:
            fingerprints: The lanes.
            *words: More options and their values.
            store: The folder of their records; None for the one in the output folder.
        """
        output = self.folder.parent
        folders = other_folders(output, store or output / DEFAULT_STORE_NAME)
        return self.again("--only", *(each[:12] for each in fingerprints), *words, *folders)

    def with_sources(self, sources: Iterable[Source]) -> StudyFile:
        """Return this study with more sources, of which each replaces an earlier one of the same content."""
        by_content = {source.content: source for source in (*self.sources, *sources)}
        return replace(self, sources=tuple(by_content.values()))

    def in_order(self, records: Iterable[Record]) -> list[Record]:
        """Return records in the order in which the study requested their configurations."""
        order = {fingerprint: i for i, fingerprint in enumerate(self.configurations)}
        return sorted(records, key=lambda record: order.get(record.fingerprint, len(order)))

    def rename(self, record: Record) -> Record:
        """Return a record with the names that its base model, task and variant have in this study.

        A record that another study has made may have other names for the same contents.
        """
        names = {source.content: source.name for source in self.sources}
        configuration = record.configuration
        task, model, variant = configuration.task, configuration.model, configuration.variant
        renamed = replace(
            configuration,
            task=replace(task, name=names.get(task.content, task.name)),
            model=replace(model, name=names.get(model.content, model.name)),
            variant=replace(variant, name=names.get(variant.revision, variant.name)),
        )
        return record if renamed == configuration else replace(record, configuration=renamed)

    def with_configurations(self, requested: Iterable[str], cached: Iterable[str]) -> StudyFile:
        """Return this study with more configurations.

        Args:
            requested: Fingerprints of the configurations.
            cached: Fingerprints that the store has. Those that the study requests for the first time count as
                reused.
        """
        cached, present = set(cached), set(self.configurations)
        added = tuple(f for f in dict.fromkeys(requested) if f not in present)
        reused = self.reused + tuple(f for f in added if f in cached)
        return replace(self, configurations=self.configurations + added, reused=reused)

    def keep(self, fingerprints: Collection[str]) -> StudyFile:
        """Return this study without the configurations that are not among `fingerprints`."""
        reused = tuple(f for f in self.reused if f in fingerprints)
        return replace(
            self, configurations=tuple(f for f in self.configurations if f in fingerprints), reused=reused
        )

    def write(self, folder: Path) -> None:
        """Write study.json in a folder; a reader sees the old file or the new one."""
        folder.mkdir(parents=True, exist_ok=True)
        content = asdict(self)
        del content["folder"]
        text = atomic_files.add_checksum(json.dumps(content, indent=1))
        atomic_files.write_atomically(folder / STUDY_FILE, text)

    @classmethod
    def read(cls, folder: Path) -> StudyFile | None:
        """Read study.json in the folder of a study.

        Returns:
            The study; None if the folder has no such file.

        Raises:
            UsageError: The file is no study, is damaged, belongs to another study, or was written by another
                version of this program.
        """
        study = cls._read(folder)
        if study is not None and study.name != folder.name:
            raise UsageError(
                f"{folder / STUDY_FILE}: belongs to the study {quote_value(study.name)}, not "
                f"{quote_value(folder.name)}; give the folder its name back, or delete the file and run the "
                "study's command again"
            )
        return study

    @classmethod
    def _read(cls, folder: Path) -> StudyFile | None:
        """Read study.json like `read`, in a folder of any name."""
        remedy = (
            "take the version of this program that wrote it, or delete it and run the study's command again"
        )
        study = atomic_files.read_json(folder / STUDY_FILE, cls, "a study", remedy)
        return None if study is None else replace(study, folder=folder)


def read_studies(output: Path) -> dict[str, StudyFile]:
    """Read all studies in an output folder.

    A file that `StudyFile.read` refuses is left out, with a warning.

    Returns:
        Name of each study -> its content, sorted by name.
    """
    found = {}
    for path in sorted(output.glob(f"*/{STUDY_FILE}")):
        try:
            if (study := StudyFile.read(path.parent)) is not None:
                found[study.name] = study
        except UsageError as error:
            _log.warning("%s (left out until then)", error)
    return found


def find_study(output: Path, name: str) -> StudyFile:
    """Return the study `name` in an output folder. The files of other studies are not read.

    Raises:
        UsageError: There is no such study; the error names the nearest one. Or `StudyFile.read` refuses it.
    """
    study = StudyFile.read(output / name) if name == nearest_valid_name(name) else None
    if study is not None:
        return study
    names = sorted(path.parent.name for path in output.glob(f"*/{STUDY_FILE}"))
    if not names:
        raise UsageError(f"study {name!r}: there is no study under {output}; name its folder with --output")
    raise UsageError(f"study {name!r}: not under {output}. {suggest_nearest(name, names)}")


def lanes_of_others(output: Path, study: StudyFile) -> set[str] | None:
    """Return the fingerprints of lanes whose adapters a study must not remove, because it shares them.

    Returns:
        The fingerprints. None if a file of another study cannot be read, after a warning: any lane may then
        be shared.
    """
    found = set(study.reused)
    for path in output.glob(f"*/{STUDY_FILE}"):
        if path.parent.name == study.name:
            continue
        try:
            other = StudyFile._read(path.parent)
        except UsageError as error:
            _log.warning("%s (all adapters are kept until then)", error)
            return None
        if other is not None and other.name != study.name:  # a copy in a folder of another name
            found.update(other.configurations)
    return found
