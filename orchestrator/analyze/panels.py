"""Group the records of a study into panels and curves, and warn of mixed provenance."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.record.schema import FINAL_STATES, Record

Value = float | int | str | None
"""A value in a column of a record."""

# Columns in which two variants of one comparison may differ: alpha (HiRA has none), hyperparameters that only
# one of them has, and the numerics number. These columns split curves; all others split panels.
_VARIANT_COLUMN_PREFIXES = ("alpha", "variant_")
_NON_SPLITTING_COLUMNS = ("learning_rate", "seed", "variant")


def deduplicate_records(records: Iterable[Record]) -> list[Record]:
    """Return one record per fingerprint: a final one if there is one, else a stopped, else a failed one.

    The order of the result does not depend on the order of `records`.
    """
    priority = {"finished": 0, "diverged": 0, "stopped": 1, "failed": 2}
    records_by_fingerprint: dict[str, Record] = {}
    for record in sorted(records, key=lambda r: (priority[r.state], r.fingerprint)):
        records_by_fingerprint.setdefault(record.fingerprint, record)
    return [records_by_fingerprint[f] for f in sorted(records_by_fingerprint)]


@dataclass(frozen=True)
class CurveRecords:
    """The records of one curve."""

    label: str
    varied: Mapping[str, Value]
    """What tells the curve from the other curves of its variant: column -> value, usually empty."""
    records: tuple[Record, ...]


def group_into_panels(records: Sequence[Record]) -> list[tuple[dict[str, Value], list[CurveRecords]]]:
    """Group records into panels of curves that may be compared.

    The records of one curve differ in learning rate and seed only. A column such as rank, which every variant
    has, splits panels only if it varies within one variant, so that a variant that needs another rank stays
    in the panel.

    Returns:
        For each panel what tells it from the other panels of its task and model (column -> value, usually
        empty), and its curves.
    """
    by_task: dict[tuple[str, str], list[tuple[Record, dict[str, Value]]]] = defaultdict(list)
    for record in records:
        task = record.configuration.task
        columns: dict[str, Value] = {
            **record.configuration.to_columns(),
            "metric": task.metric,
            "floor": task.floor,
        }
        by_task[(task.name, record.configuration.model.name)].append((record, columns))

    grouped = []
    for key in sorted(by_task):
        members = by_task[key]
        varied = _splitting_columns([columns for _, columns in members])
        split: dict[tuple[Value, ...], list[tuple[Record, dict[str, Value]]]] = defaultdict(list)
        for record, columns in members:
            split[tuple(columns.get(c) for c in varied)].append((record, columns))
        for values in sorted(split, key=lambda v: tuple(_sort_key(x) for x in v)):
            grouped.append((dict(zip(varied, values, strict=True)), _group_into_curves(split[values])))
    return grouped


def _sort_key(value: Value) -> tuple[float, str]:
    return (float(value), "") if isinstance(value, int | float) else (float("inf"), str(value))


def _splitting_columns(rows: Sequence[Mapping[str, Value]]) -> list[str]:
    """Return the columns whose values split the records of one task and model into panels."""
    by_variant: dict[Value, dict[str, set[Value]]] = defaultdict(lambda: defaultdict(set))
    for row in rows:
        for column, value in row.items():
            by_variant[row["variant"]][column].add(value)
    columns = [
        c for c in rows[0] if c not in _NON_SPLITTING_COLUMNS and not c.startswith(_VARIANT_COLUMN_PREFIXES)
    ]
    # Variants of one comparison may differ in these.
    shareable_columns = ("rank", "dropout", "targets")
    return [
        c
        for c in columns
        if any(len(seen[c]) > 1 for seen in by_variant.values())
        or (c not in shareable_columns and len({v for seen in by_variant.values() for v in seen[c]}) > 1)
    ]


def _group_into_curves(members: Sequence[tuple[Record, Mapping[str, Value]]]) -> list[CurveRecords]:
    rows: dict[str, list[Mapping[str, Value]]] = defaultdict(list)
    for _, columns in members:
        rows[str(columns["variant"])].append(columns)
    differing = {}
    for name, own in rows.items():
        keys = sorted({k for row in own for k in row if k.startswith(_VARIANT_COLUMN_PREFIXES)})
        differing[name] = [k for k in keys if len({row.get(k) for row in own}) > 1]
    lines: dict[str, tuple[dict[str, Value], list[Record]]] = {}
    for record, columns in members:
        name = str(columns["variant"])
        varied = {k: columns.get(k) for k in differing[name]}
        label = " ".join([name, *(f"{k.removeprefix('variant_')}={v}" for k, v in varied.items())])
        lines.setdefault(label, (varied, []))[1].append(record)
    return [CurveRecords(label, lines[label][0], tuple(lines[label][1])) for label in sorted(lines)]


def count_provenance(records: Iterable[Record]) -> dict[str, dict[str, int]]:
    """Count the provenance of the records with a score.

    Returns:
        Column -> value -> number of records.
    """
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for record in records:
        if record.state not in FINAL_STATES:
            continue
        provenance = record.provenance
        columns = {
            "commit": provenance.commit,
            "device": provenance.device,
            "workers": str(provenance.workers),
            **provenance.versions,
        }
        for column, value in columns.items():
            counts[column][str(value)] += 1
    return {c: dict(sorted(counts[c].items(), key=lambda kv: (-kv[1], kv[0]))) for c in counts}


def mixed_provenance_warnings(provenance: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Return one warning for each column of `provenance` that has more than one value."""
    warnings = []
    for column, values in provenance.items():
        if len(values) > 1:
            shown = ", ".join(
                f"{_shorten_commit(value)} ({count})" for value, count in list(values.items())[:4]
            )
            more = f" and {len(values) - 4} more" if len(values) > 4 else ""
            warnings.append(f"The records mix {column}: {shown}{more}. Differences may come from that.")
    return warnings


def _shorten_commit(value: str) -> str:
    """Return the first characters of a commit, and whether there were uncommitted changes."""
    return value[:12] + ("-dirty" if value.endswith("-dirty") else "")
