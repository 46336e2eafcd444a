"""Text of one record for a terminal of 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

from orchestrator.record.schema import COLUMNS, Cost, Provenance, Record
from orchestrator.record.store import Store
from orchestrator.record.study_file import StudyFile, read_studies
from orchestrator.study.names import store_command
from orchestrator.util.errors import UsageError


def format_record(store: Store, output: Path, prefix: str) -> str:
    """Return a record as text.

    The text has state, scores, cost, provenance, evaluations, the traceback of a failed lane, the command
    that exports the adapter of a finished lane, and the command that trains the configuration again.

    Args:
        store: The store.
        output: The output folder with the studies' folders; the studies that requested the configuration are
            looked up there.
        prefix: First digits of the fingerprint.

    Raises:
        UsageError: No fingerprint, or more than one, begins with `prefix`, or the record's file is damaged.
    """
    fingerprint = store.resolve_prefix(prefix)
    record = store.get(fingerprint)
    if record is None:  # `resolve_prefix` reads the first bytes of files only
        raise UsageError(
            f"fingerprint {prefix!r}: {store.records_folder / fingerprint[:2]} no longer holds a "
            "whole record of it; its study's command trains it again"
        )
    studies = [each for each in read_studies(output).values() if fingerprint in each.configurations]
    lines = [*_format_header(record, store.count_failures(fingerprint)), *_format_scores(record), ""]
    lines += [_wrap_pairs(_format_columns(record.cost), "cost")]
    lines += [_wrap_pairs(_format_columns(record.provenance), "provenance")]
    if record.traceback:
        lines += ["", record.traceback.rstrip()]
    if record.state == "finished" and studies:
        command = store_command("export", studies[0].name, fingerprint[:12], output=output, store=store.root)
        lines += ["", "To export its adapter:", f"  {command}"]
    return "\n".join([*lines, "", *_format_rerun(record, studies, output, store)])


def _format_header(record: Record, failures: int) -> Iterator[str]:
    configuration = record.configuration
    state = f"{record.state} after {record.steps} of {configuration.lr_schedule.steps} steps"
    yield f"fingerprint  {record.fingerprint}"
    yield f"state        {state}{f', {failures} failures' if failures > 1 else ''}"
    if record.reason:
        yield f"reason       {record.reason}"
    yield ""
    columns = configuration.to_columns().items()
    yield _wrap_pairs([f"{name} {_shorten(value)}" for name, value in columns if value is not None])


def _format_scores(record: Record) -> Iterator[str]:
    metric = record.configuration.task.metric
    yield ""
    for split in ("validation", "test"):
        score = record.score(split)
        untrained = record.baseline_scores.get(split, {}).get(metric)
        before = f" (untrained {untrained:.4f})" if untrained is not None else ""
        yield f"{split:<12} {metric} {'none' if score is None else f'{score:.4f}'}{before}"
    forgetting = record.results()["forgetting"]
    yield f"forgetting   {'-' if forgetting is None else f'{forgetting:.4f} nats per token'}"
    names = dict.fromkeys(name for e in record.evaluations for name in e.scores)
    if not names:
        return
    yield ""
    yield f"{'step':>8}  {'split':<10}" + "".join(f"  {name:>13}" for name in names)
    for e in record.evaluations:
        cells = [f"{e.scores[name]:13.4f}" if name in e.scores else " " * 13 for name in names]
        yield f"{e.step:>8}  {e.split:<10}" + "".join(f"  {cell}" for cell in cells)


def _format_columns(part: Cost | Provenance) -> Iterator[str]:
    """Yield the columns that are not empty, with their units."""
    for name, each in COLUMNS[type(part)].items():
        value = getattr(part, each.field)
        if not value:
            continue
        if each.unit == "s":
            yield f"{name} {value:.1f} s"
        elif each.unit == "bytes":
            yield f"{name} {value / 2**20:.0f} MiB"
        elif each.unit == "UTC":
            yield f"{name} {datetime.fromtimestamp(value, UTC):%Y-%m-%d %H:%M:%S} UTC"
        elif isinstance(value, Mapping):
            yield from (f"{key} {text}" for key, text in value.items())
        else:
            yield f"{name} {', '.join(map(str, value)) if isinstance(value, tuple) else value}"


def _format_rerun(record: Record, studies: list[StudyFile], output: Path, store: Store) -> Iterator[str]:
    if not studies:
        yield f"No study under {output} requests this configuration, so no command trains it again."
        return
    study, fingerprint = studies[0], record.fingerprint
    yield f"To train it again (study {study.name}):"
    if record.state == "failed":
        yield f"  {study.again('--only', fingerprint[:12], '--retry-failed')}"
    else:
        yield f"  {study.train_again([fingerprint], store=store.root)}"


def _wrap_pairs(pairs: Iterable[str], title: str = "") -> str:
    """Return the pairs in lines of at most 78 columns beside a title. Lines break between pairs only."""
    text = ", ".join(pair.replace(" ", "\0") for pair in pairs)
    lines = textwrap.wrap(text, 65, break_on_hyphens=False)
    return textwrap.indent("\n".join(lines), " " * 13).replace(" " * 13, f"{title:<13}", 1).replace("\0", " ")


def _shorten(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    text = str(value)
    return text if len(text) <= 40 else text[:12] + "..."
