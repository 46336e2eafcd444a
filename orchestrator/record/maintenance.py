"""The commands `gc` and `sync` on a store and the folders of studies.

`gc` removes what a crash has left; a study removes its temporary data itself, unless it is killed or its
machine loses power. `sync` writes the Parquet files and the MLflow runs of all studies from the records.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from orchestrator.record.mlflow import MlflowTracker, check_uri, study_uri
from orchestrator.record.schema import FINAL_STATES, Record
from orchestrator.record.store import Store
from orchestrator.record.study_file import LOCK_FILE, STUDY_FILE, StudyFile, read_studies, report_files
from orchestrator.record.tables import write_parquet
from orchestrator.record.tracker import StudyEnd, describe_error
from orchestrator.util import atomic_files
from orchestrator.util.redaction import redact_secrets

Describe = Callable[[StudyFile, Sequence[Record]], tuple[str, Mapping[str, float]]]
"""Function of a study and its records that returns the study's description in Markdown and its metrics."""

# Incomplete files, damaged records that were moved aside, and files that tested a folder.
_TEMPORARY = re.compile(
    atomic_files.TEMPORARY_NAME.pattern + r"|\..+\.torn|\.probe-.+|\.check-[0-9a-f]{32}|\.mlflow\.db\.new.*"
)
_TEMPORARY_BASE = re.compile(r"\..+-[a-z0-9_]{8}")


def find_garbage(store: Store, output: Path, older_than: float) -> dict[str, list[Path]]:
    """Find the files and folders that no study needs. Other processes may run studies at the same time.

    Args:
        store: The store.
        output: The output folder with the studies' folders.
        older_than: Seconds; temporary files that are younger are kept.

    Returns:
        Kind of garbage -> files and folders.
    """
    before = time.time() - older_than
    return {
        "checkpoints and records of lanes that have ended": [*_ended(store)],
        "temporary files": [path for path in _temporary(store, output) if _newest(path) < before],
        "scratch folders of dead processes": store.stale_scratch(),
    }


def remove_garbage(store: Store, found: Mapping[str, list[Path]]) -> None:
    """Remove what `find_garbage` has found.

    Raises:
        OSError: A file or folder cannot be removed.
    """
    store.remove_stale_scratch()  # with their lock files
    for path in (path for paths in found.values() for path in paths):
        try:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        except FileNotFoundError:  # its study has removed it
            continue


def describe_garbage(found: Mapping[str, list[Path]]) -> Iterator[str]:
    """Yield a line for each kind of garbage, with the number of paths and their size."""
    from rich.filesize import decimal

    for kind, paths in found.items():
        files = [each for path in paths for each in (path, *path.rglob("*")) if each.is_file()]
        if paths:
            yield f"{kind}: {len(paths)} ({decimal(sum(each.lstat().st_size for each in files))})"


def _ended(store: Store) -> Iterator[Path]:
    """Yield the checkpoints of lanes with a final record, and the records that a final one has replaced."""
    states = store.states()
    for path in sorted([*store.checkpoints.glob("*"), *store.records_folder.glob("*/*.*.json")]):
        fingerprint = path.name.split(".")[0]
        # `states` reads only the first bytes of a record. `get_reusable` finds damage in the rest.
        if states.get(fingerprint) in FINAL_STATES and store.get_reusable(fingerprint) is not None:
            yield path


def _temporary(store: Store, output: Path) -> Iterator[Path]:
    folders = [store.root, *store.root.glob("*"), store.data, *store.records_folder.glob("*")]
    folders += [*store.adapters.glob("*"), *store.checkpoints.glob("*/*"), output]
    studies = [path.parent for path in output.glob(f"*/{STUDY_FILE}")]
    folders += [study / name for study in studies for name in ("", "export")]
    for folder in dict.fromkeys(path.resolve() for path in folders if path.is_dir()):
        for path in sorted(folder.glob(".*")):
            is_base = folder.name == store.bases.name and _TEMPORARY_BASE.fullmatch(path.name)
            if is_base or _TEMPORARY.fullmatch(path.name):
                yield path


def _newest(path: Path) -> float:
    """Return the latest modification time (Unix seconds) in a path; infinity if a part of it disappears."""
    try:
        return max(each.lstat().st_mtime for each in (path, *path.rglob("*")))
    except OSError:
        return float("inf")


def sync_projections(
    store: Store,
    output: Path,
    tracking_uri: str | None,
    notify: Callable[[str], None],
    describe: Describe,
) -> int:
    """Write the Parquet files and the MLflow runs again from the records.

    The runs of a running study are skipped. A study cannot start while this function writes its runs.

    Args:
        store: The store.
        output: The output folder with the studies' folders.
        tracking_uri: MLflow's tracking URI for all studies; None: the URI in each study's file.
        notify: Called with one line of text for the Parquet files and for each study.
        describe: Returns the description and the metrics of a study's run.

    Returns:
        Exit code: 0, or 1 if MLflow stopped answering or has refused a record.

    Raises:
        UsageError: A tracking URI cannot be used.
    """
    studies = read_studies(output)
    uris = [tracking_uri or study_uri(study.tracking_uri, store) for study in studies.values()]
    for uri in set(uris):
        check_uri(uri)
    notify(f"{write_parquet(store, studies.values())}: {len(store.states())} records")
    exit_code = 0
    for uri, study in zip(uris, studies.values(), strict=True):
        name, tracker = study.name, MlflowTracker(uri)
        try:
            with FileLock(study.folder / LOCK_FILE, timeout=0):
                count, refused = _sync_study(store, study, tracker, describe)
        except Timeout:
            notify(f"{name}: is running and logs its runs itself; skipped")
        except Exception as error:
            if not tracker.is_outage(error):
                raise
            why = describe_error(error)
            notify(f"{name}: MLflow does not answer ({why}); remove a damaged file, and run sync again later")
            return 1
        else:
            of = f"{count} of {len(study.configurations)} configurations"
            notify(f"{name}: {of} in {redact_secrets(uri)}")
            if refused:
                notify(f"{name}: MLflow refuses {len(refused)} more, first {refused[0]}")
                exit_code = 1
    return exit_code


def _sync_study(
    store: Store, study: StudyFile, tracker: MlflowTracker, describe: Describe
) -> tuple[int, list[str]]:
    """Write the runs of a study.

    Returns:
        The number of runs, and for each record that MLflow refuses its fingerprint and the reason.
    """
    tracker.start(study, {})
    records = [study.rename(record) for record in map(store.get, study.configurations) if record is not None]
    refused = []
    for record in records:
        try:
            tracker.log_record(record)
        except Exception as error:
            if tracker.is_outage(error):
                raise
            refused.append(f"{record.fingerprint[:12]}: {describe_error(error)}")
    status = "FINISHED" if len(records) == len(study.configurations) else "KILLED"
    report = tuple(report_files(study.folder))
    tracker.finish(StudyEnd(status, report, *(describe(study, records) if records else ("", {}))))
    return len(records) - len(refused), refused
