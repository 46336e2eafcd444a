"""Grouping of a study's records into panels and curves, and warnings of mixed provenance."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter

from orchestrator.record.schema import FINAL_STATES, Record

Value = float | int | str | None
"""A value in a column of a record."""

# Columns with these prefixes are alpha (HiRA has none), hyperparameters that only one variant has, and the
# numerics number. Two variants of one comparison may differ in them, so they split curves, not panels.
_VARIANT_COLUMN_PREFIXES = ("alpha", "variant_")
_NON_SPLITTING_COLUMNS = ("learning_rate", "seed", "variant")
_SHAREABLE_COLUMNS = ("rank", "dropout", "targets")  # variants of one comparison may differ in these
_Row = tuple[Record, dict[str, Value]]


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

    variant: str
    varied: Mapping[str, Value]
    """Columns in which the curve differs from the other curves of its variant: column -> value. Empty if the
    variant has one curve."""
    records: Sequence[Record]

    @property
    def label(self) -> str:
        """The variant and `varied`, for example "lora_plus ratio=4"."""
        return " ".join(
            [self.variant, *(f"{k.removeprefix('variant_')}={v}" for k, v in self.varied.items())]
        )


def group_into_panels(records: Sequence[Record]) -> list[tuple[dict[str, Value], list[CurveRecords]]]:
    """Group records into panels of curves that may be compared.

    The records of one curve differ in learning rate and seed only. Alpha and the variants' own
    hyperparameters split curves. Rank, dropout and targets split panels only if they vary within one variant,
    so that a variant that needs another rank stays in the panel. All other columns, such as the number of
    steps, split panels whenever they vary.

    Args:
        records: Distinct records.

    Returns:
        For each panel the columns in which it differs from the other panels of its task and model (column ->
        value, empty for a single panel), and its curves.
    """
    by_task: dict[tuple[str, str], list[_Row]] = defaultdict(list)
    for record in records:
        task, model = record.configuration.task, record.configuration.model
        columns: dict[str, Value] = {**record.configuration.to_columns()}
        columns |= {"metric": task.metric, "floor": task.floor}
        by_task[task.name, model.name].append((record, columns))
    return [
        (varied, _group_into_curves(own))
        for _, rows in sorted(by_task.items(), key=itemgetter(0))
        for varied, own in _split_rows(rows, _splitting_columns([columns for _, columns in rows]))
    ]


def _split_rows(rows: Sequence[_Row], names: Sequence[str]) -> Iterator[tuple[dict[str, Value], list[_Row]]]:
    """Group rows by their values in the columns `names`.

    Args:
        rows: Records with their columns.
        names: The columns. A row that lacks one has None there.

    Yields:
        The values by column name, and the rows that have these values, in the order of the values.
    """
    split: dict[tuple[Value, ...], list[_Row]] = defaultdict(list)
    for record, columns in rows:
        split[tuple(columns.get(name) for name in names)].append((record, columns))
    for values in sorted(split, key=lambda values: tuple(map(_sort_key, values))):
        yield dict(zip(names, values, strict=True)), split[values]


def _sort_key(value: Value) -> tuple[float, str]:
    return (float(value), "") if isinstance(value, int | float) else (float("inf"), str(value))


def _splitting_columns(rows: Sequence[Mapping[str, Value]]) -> list[str]:
    """Return the columns whose values split the records of one task and model into panels."""
    by_variant: dict[Value, dict[str, set[Value]]] = defaultdict(lambda: defaultdict(set))
    for row in rows:
        for column, value in row.items():
            by_variant[row["variant"]][column].add(value)
    seen_values = by_variant.values()
    return [
        c
        for c in rows[0]
        if c not in _NON_SPLITTING_COLUMNS
        and not c.startswith(_VARIANT_COLUMN_PREFIXES)
        and (
            any(len(seen[c]) > 1 for seen in seen_values)
            or (c not in _SHAREABLE_COLUMNS and len(set().union(*(seen[c] for seen in seen_values))) > 1)
        )
    ]


def _group_into_curves(rows: Sequence[_Row]) -> list[CurveRecords]:
    by_variant: dict[str, list[_Row]] = defaultdict(list)
    for record, columns in rows:
        by_variant[str(columns["variant"])].append((record, columns))
    curves = []
    for variant, own in by_variant.items():
        keys = sorted({k for _, row in own for k in row if k.startswith(_VARIANT_COLUMN_PREFIXES)})
        differing = [k for k in keys if len({row.get(k) for _, row in own}) > 1]
        for varied, members in _split_rows(own, differing):
            curves.append(CurveRecords(variant, varied, [record for record, _ in members]))
    return sorted(curves, key=lambda curve: curve.label)


def count_provenance(records: Iterable[Record]) -> dict[str, dict[str, int]]:
    """Count the provenance of the records with a score.

    Returns:
        Column -> value -> number of records.
    """
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for record in records:
        if record.state not in FINAL_STATES:
            continue
        p = record.provenance
        columns = {
            "commit": p.commit,
            "device": p.device,
            "kernels": p.kernels,
            "workers": str(p.workers),
            **p.versions,
        }
        for column, value in columns.items():
            counts[column][str(value)] += 1
    return {c: dict(sorted(counts[c].items(), key=lambda kv: (-kv[1], kv[0]))) for c in counts}


def mixed_provenance_warnings(provenance: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Return one warning for each column of `provenance` that has more than one value."""
    warnings = []
    for column, values in provenance.items():
        if len(values) > 1:
            shown = ", ".join(f"{_shorten_commit(v)} ({count})" for v, count in list(values.items())[:4])
            more = f" and {len(values) - 4} more" if len(values) > 4 else ""
            warnings.append(f"The records mix {column}: {shown}{more}. Differences may come from this mix.")
    return warnings


def _shorten_commit(value: str) -> str:
    """Return the first 12 characters of a commit, with "-dirty" if there were uncommitted changes."""
    return value[:12] + ("-dirty" if value.endswith("-dirty") else "")
