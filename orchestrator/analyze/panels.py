"""Which records belong on one curve, and what a study mixes that it should not."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.record.schema import Record

Value = float | int | str | None

# What two variants of one comparison may differ in as a matter of course: alpha (HiRA has none),
# hyperparameters that only one of them knows, and their numerics number. These split curves; all else splits
# panels.
_VARIANT_COLUMN_PREFIXES = ("alpha", "variant_")
_NON_SPLITTING_COLUMNS = ("learning_rate", "seed", "variant")


def deduplicate_records(records: Iterable[Record]) -> list[Record]:
    """One record a fingerprint (a final one before a stopped before a failed), in an order that does not
    depend on the order given."""
    priority = {"finished": 0, "diverged": 0, "stopped": 1, "failed": 2}
    records_by_fingerprint: dict[str, Record] = {}
    for record in sorted(records, key=lambda r: (priority[r.state], r.fingerprint)):
        records_by_fingerprint.setdefault(record.fingerprint, record)
    return [records_by_fingerprint[f] for f in sorted(records_by_fingerprint)]


@dataclass(frozen=True)
class CurveRecords:
    """The records of one curve. `varied`: what tells it from the other curves of its variant, mostly
    nothing."""

    label: str
    varied: Mapping[str, Value]
    records: tuple[Record, ...]


def group_into_panels(records: Sequence[Record]) -> list[tuple[dict[str, Value], list[CurveRecords]]]:
    """Records that may be compared: for each panel what tells it from the other panels of its task and model
    (column -> value, empty in the usual case), and the curves in it.

    Records on one curve differ in learning rate and seed only. A column such as rank, which every variant
    has, splits panels only where it varies within one variant, so that a variant that needs another rank
    stays.
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

    found = []
    for key in sorted(by_task):
        members = by_task[key]
        varied = _splitting_columns([columns for _, columns in members])
        split: dict[tuple[Value, ...], list[tuple[Record, dict[str, Value]]]] = defaultdict(list)
        for record, columns in members:
            split[tuple(columns.get(c) for c in varied)].append((record, columns))
        for values in sorted(split, key=lambda v: tuple(_sort_key(x) for x in v)):
            found.append((dict(zip(varied, values, strict=True)), _group_into_curves(split[values])))
    return found


def _sort_key(value: Value) -> tuple[float, str]:
    return (float(value), "") if isinstance(value, int | float) else (float("inf"), str(value))


def _splitting_columns(rows: Sequence[Mapping[str, Value]]) -> list[str]:
    by_variant: dict[Value, dict[str, set[Value]]] = defaultdict(lambda: defaultdict(set))
    for row in rows:
        for column, value in row.items():
            by_variant[row["variant"]][column].add(value)
    columns = [
        c for c in rows[0] if c not in _NON_SPLITTING_COLUMNS and not c.startswith(_VARIANT_COLUMN_PREFIXES)
    ]
    shareable_columns = (
        "rank",
        "dropout",
        "targets",
    )  # variants of one comparison may legitimately differ in these
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
    """What the records with a score were made with: column -> value -> how many records."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for record in records:
        if record.state not in ("finished", "diverged"):
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
    """One warning for each column of `provenance` that holds more than one value."""
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
    """A commit's first letters, and whether there were changes."""
    return value[:12] + ("-dirty" if value.endswith("-dirty") else "")
