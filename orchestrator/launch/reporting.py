"""End of a run: the report, the adapters that are kept, the last MLflow runs and the exit code."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType

from orchestrator.analyze import report
from orchestrator.analyze.runs import lane_row
from orchestrator.execution.progress import RunBudget
from orchestrator.launch.study import Study
from orchestrator.record.schema import Record
from orchestrator.record.store import Store
from orchestrator.record.study_file import AnalysisSettings, StudyFile, read_studies, report_files
from orchestrator.record.tables import CURVES_FILE, PARQUET_FILE, write_parquet
from orchestrator.record.tracker import StudyEnd, TrackerWriter, TrackerWriters
from orchestrator.util import timeouts
from orchestrator.util.command import EXIT_LIMIT_REACHED, graceful_interrupts
from orchestrator.util.redaction import redact_secrets
from orchestrator.util.sqlite_uri import sqlite_path

if TYPE_CHECKING:
    from orchestrator.analyze.report import StudyDescription

_log = logging.getLogger(__name__)

MAX_REASONS, MAX_REASON_LENGTH = 5, 200
MAX_RUNNING_BYTES = 2 * 2**30
"""The total size up to which a running study keeps more adapters than the best one of each goal."""


def print_known_end(study: Study) -> bool:
    """Print what the study's command printed at its last end, if nothing has changed since.

    Returns:
        Whether the text was printed.
    """
    files = _digest_files(study)
    text = files and report.recall_end(study.folder, _digest_inputs(study), files)
    print(text or "", end="", file=study.console.file, flush=True)
    return bool(text)


def _digest_inputs(study: Study) -> str:
    uri = redact_secrets(study.tracking_uri)
    return report.digest_inputs(study.file, study.store, uri, study.folder)


def _digest_files(study: Study) -> str:
    """Return a digest of what the study's end has written beside the report, and of how it prints.

    It has the times of MLflow's database and of the Parquet files, the console's width and encoding, and
    --save-adapters. It is empty if a file is missing, and if MLflow runs on a server or another tracker is
    used, because this program cannot see whether their runs have changed.
    """
    database, console, root = sqlite_path(study.tracking_uri), study.console, study.store.root
    if database is None or study.trackers:
        return ""
    files = [database, root / PARQUET_FILE, root / CURVES_FILE]
    if not all(file.exists() for file in files):
        return ""
    return report.digest(
        [file.stat().st_mtime_ns for file in files],
        (console.width, console.color_system, console.is_terminal, console.encoding),
        study.options.save_adapters,
    )


def report_and_close(
    study: Study, writers: TrackerWriters, keeper: AdapterKeeper, status: str, should_report: bool
) -> None:
    """Write the report, then wait for MLflow and other trackers to log the remaining runs.

    After Ctrl-C there is no report. Ctrl-C during the report does not interrupt it, but shortens the wait for
    MLflow: an exception could be raised inside an import, whose lock Python would never release.

    Args:
        study: The study at the end of the run.
        writers: The writers to MLflow and other trackers, which are closed.
        keeper: Removes the adapters that a complete study does not keep.
        status: MLflow's status of the run of the study: FINISHED or KILLED.
        should_report: True to write a report.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed while the report was written.
    """
    budget = study.budget
    if should_report and budget.is_interrupted:
        should_report = False
        command = study.orchestrator_command("report", study.name)
        study.console.print(f"Without a report: {command} writes it.", markup=False, soft_wrap=True)
    description: tuple[str, Mapping[str, float]] = ("", {})
    lines: list[RenderableType] = []
    try:
        if should_report:
            with graceful_interrupts(budget.request_stop):
                inputs = _digest_inputs(study)  # before the records are read, see `Report`
                records = [r for f in study.file.configurations if (r := study.store.get(f)) is not None]
                is_complete = status == "FINISHED" and len(records) == len(study.file.configurations)
                if study.options.save_adapters == "best" and is_complete:
                    keeper.keep_best(map(study.file.rename, records))
                description, lines = _write_report(study, records, inputs)
    finally:
        interrupted = should_report and budget.is_interrupted
        status = "KILLED" if interrupted else status
        end = StudyEnd(status, tuple(report_files(study.folder)) if should_report else (), *description)
        writers.close(end, _mlflow_seconds(budget, status))
        others = dict(writers)
        mlflow = others.pop("mlflow")
        if should_report:
            lines += (mlflow_lines := _mlflow_lines(study, mlflow))
            _print_lines(study.console, mlflow_lines)
        _print_missing(study, "MLflow", mlflow, f"{study.orchestrator_command('sync')} logs them")
        for name, writer in others.items():
            _print_lines(study.console, [f"{name:8} {writer.view}"] if writer.view else [])
            _print_missing(study, f"--tracker {name}", writer, "the same command writes them")
    if interrupted:
        raise KeyboardInterrupt
    is_logged = should_report and status == "FINISHED" and mlflow.is_finished and not mlflow.error
    # The command `report` may have replaced the report meanwhile, from fewer records.
    if is_logged and report.is_written(study.folder, inputs):
        with study.console.capture() as printed:
            _print_lines(study.console, lines)
        report.remember(study.folder, inputs, _digest_files(study), printed.get())


def _print_lines(console: Console, lines: Iterable[RenderableType]) -> None:
    for line in lines:
        console.print(line, markup=False, soft_wrap=isinstance(line, str))


def _mlflow_lines(study: Study, writer: TrackerWriter) -> list[RenderableType]:
    """Return the command that opens MLflow on a database, and the address of the ranked table, if any."""
    from orchestrator.analyze.sections import mlflow_command

    command = mlflow_command(redact_secrets(study.tracking_uri))
    labelled = (("MLflow", command), ("" if command else "MLflow", writer.view))
    return [f"{label:8} {where}" for label, where in labelled if where]


def _mlflow_seconds(budget: RunBudget, status: str) -> float:
    """Return the time in seconds for logging the remaining runs to MLflow."""
    if budget.is_interrupted:
        return min(timeouts.INTERRUPT_MLFLOW_FLUSH_SECONDS, max(0.5, budget.interrupt_seconds_left() - 1))
    has_ended = status == "FINISHED" or budget.stop_reason
    return timeouts.MLFLOW_FLUSH_SECONDS if has_ended else timeouts.INTERRUPT_MLFLOW_FLUSH_SECONDS


def _print_missing(study: Study, tracker: str, writer: TrackerWriter, remedy: str) -> None:
    """Print the number of runs that a tracker lacks, the reason, and what logs them, if there are any."""
    if writer.is_finished and not writer.pending_count:
        return
    missing = f"{writer.pending_count} runs are" if writer.pending_count else "the study's own run is"
    line = f"{tracker}: {missing} missing ({writer.error or 'it is slow'}); {remedy} later."
    study.console.print(line, markup=False, soft_wrap=True)


def _write_report(
    study: Study, records: Sequence[Record], inputs: str
) -> tuple[StudyDescription, list[RenderableType]]:
    """Write the store's Parquet files and the study's report, and print the tables.

    The report has all configurations of the study, including those of earlier runs.

    Args:
        study: The study.
        records: Its records.
        inputs: The result of `report.digest_inputs` before the records were read.

    Returns:
        The description of the study in MLflow, and what was printed: the tables, and where the files are.
    """
    from orchestrator.analyze import render
    from orchestrator.analyze.sections import NEXT

    folder = study.folder
    write_parquet(study.store, read_studies(study.options.output).values())
    uri = redact_secrets(study.tracking_uri)
    results, sections = report.write_report(study.file, records, folder, uri, study.store.root)
    report.remember(folder, inputs)
    pictures = [file for file in report_files(folder) if file.suffix == ".png"]
    lines: list[tuple[str, object]] = [("Report", folder / "report.html")]
    lines += [("Picture", picture) for picture in pictures[:1]]
    lines += [("Export", study.orchestrator_command(*words)) for words in export_words(study.file, records)]
    last_next = sorted(sections, key=lambda section: section.name == NEXT)  # where a terminal is read first
    printed: list[RenderableType] = [render.to_terminal(last_next)]
    printed += [f"{what:8} {where}" for what, where in lines]
    _print_lines(study.console, printed)
    return report.describe(results, sections), printed


def export_words(study: StudyFile, records: Sequence[Record]) -> list[list[str]]:
    """Return the words of the command that exports the best adapter of each task.

    Args:
        study: The study.
        records: Its records.

    Returns:
        For each task with a finished lane: `export`, the study and, in a study of several tasks, the task.
    """
    from orchestrator.analyze.analysis import find_best_lanes

    tasks = {study.rename(record).configuration.task.name for record in records}
    finished = sorted(set(find_best_lanes(study, records)["task"]))
    return [["export", study.name, *(["--task", task] if len(tasks) > 1 else [])] for task in finished]


def print_missing_results(study: Study) -> int:
    """Print the number of configurations without a result, and the reason, if there are any.

    Args:
        study: The study at the end of the run.

    Returns:
        The exit code of the run, see `run_study`.
    """
    missing = [c.fingerprint for c in study.without_result()]
    num_unsampled = study.total - len(study.requested)
    if not missing and not num_unsampled:
        return 0
    can_continue = num_unsampled or any(study.settled(f) is None for f in missing)
    if (reason := study.budget.stop_reason) and can_continue:
        line = f"Ended by {reason}: {study.describe_progress()}; to go on: {study.command}"
        study.console.print(line, markup=False, soft_wrap=True)
        return EXIT_LIMIT_REACHED
    records = [study.store.get(fingerprint) for fingerprint in missing]
    failed = [each for each in records if each is not None and each.state == "failed"]
    advice = ":" if failed else "; see the messages above"
    unsampled = f", {num_unsampled} were not sampled" if num_unsampled else ""
    study.console.print(f"{len(missing)} configurations failed{unsampled}{advice}", markup=False)
    for line in describe_failures(failed, study.orchestrator_command):
        study.console.print(line, markup=False, soft_wrap=True)
    return 1


def describe_failures(failed: Sequence[Record], command: Callable[..., str]) -> list[str]:
    """Return a line for each distinct reason of failed runs.

    A line names the variants and the reason, and gives the command that shows one of the runs.

    Args:
        failed: The records of the runs.
        command: Returns the command line that a user types for a subcommand and its arguments.
    """
    by_reason: dict[str, list[Record]] = {}
    for record in failed:
        by_reason.setdefault(" ".join(record.reason.split()), []).append(record)
    lines = []
    for reason, records in list(by_reason.items())[:MAX_REASONS]:
        variants = ", ".join(dict.fromkeys(record.configuration.variant.name for record in records))
        shown = command("show", records[0].fingerprint[:12])
        lines.append(f"  {variants}: {reason[:MAX_REASON_LENGTH]}; more: {shown}")
    others = len(by_reason) - MAX_REASONS
    return [*lines, f"  and {others} more reasons, in the report"] if others > 0 else lines


@dataclass
class AdapterKeeper:
    """Removal of adapters in a study with `--save-adapters best`.

    Which lane of a variant is the best is known only at the end, when all seeds of its points have ended.
    """

    store: Store
    settings: AnalysisSettings
    """The settings of the study's analysis, by which lanes are compared."""
    others: Set[str] | None = frozenset()
    """Fingerprints of lanes that other studies list or have trained; their adapters are not removed. None if
    they are not known; no adapter is removed then."""
    lanes: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Fingerprint -> its columns of `runs.lane_row`, of all records that were added."""

    def keep_best(self, records: Iterable[Record], most_bytes: int = 0) -> None:
        """Add records, and remove the adapters of all added lanes but the best ones.

        The best lane so far of each variant and task is always kept. Others are the best run of each point,
        the best points first, as long as all kept adapters together have at most `most_bytes`.

        An error of the disk is logged and not raised, because no result depends on a kept adapter.
        """
        if self.others is None:
            return
        self.lanes |= {record.fingerprint: lane_row(record, self.settings.kind) for record in records}
        # Trainers write an adapter before its record, so only lanes with a record are judged.
        files = {path.stem: path for path in self.store.best_adapters() if path.stem in self.lanes}
        sizes = {}
        for fingerprint, file in files.items():
            with suppress(OSError):  # the user, or another driver, may have removed it
                sizes[fingerprint] = file.stat().st_size
        if sum(sizes.values()) <= most_bytes:
            return
        import pandas as pd

        from orchestrator.analyze import curves

        ranked = curves.rank_lanes(curves.make_points(pd.DataFrame(self.lanes.values())))
        kept, total = set(self.others), 0
        for lane in ranked.sort_values(["place", "task", "model", "variant"]).itertuples():
            total += sizes.get(lane.fingerprint, 0)
            if lane.place == 0 or total <= most_bytes:
                kept.add(lane.fingerprint)
        for fingerprint in files.keys() - kept:
            try:
                files[fingerprint].unlink(missing_ok=True)
            except OSError as error:
                _log.warning("%s is not removed: %s", files[fingerprint], error)
