"""Tables of records: one with a row per configuration, and one with a row per step of every curve.

The store keeps them as Parquet files. `orchestrator.load` returns those of one study as pandas frames. Their
columns are the fields of the configuration and of the record, see `record/schema.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.record.schema import (
    COLUMN_TYPES,
    COLUMNS,
    RESULTS,
    SCHEMA_VERSION,
    Cost,
    Evaluation,
    Provenance,
    Record,
    StepMetrics,
    column_values,
)
from orchestrator.record.store import Store
from orchestrator.record.study_file import StudyFile
from orchestrator.study import configuration
from orchestrator.study.configuration import Field
from orchestrator.util.atomic_files import replace_atomically

if TYPE_CHECKING:
    import pyarrow as pa

PARQUET_FILE = "records.parquet"
CURVES_FILE = "curves.parquet"

_METADATA = {"record_schema_version": str(SCHEMA_VERSION)}


def write_parquet(store: Store, studies: Iterable[StudyFile] = ()) -> Path:
    """Write `records.parquet` and `curves.parquet` in the store's folder.

    Args:
        store: The store.
        studies: The studies from which the column `studies` is filled, and `task_title` for users' tasks.
            Without them, the lists are empty, and the title is the task's name.

    Returns:
        The path of `records.parquet`.
    """
    import pyarrow.parquet

    names: dict[str, list[str]] = {}
    titles: dict[str, str] = {}
    for study in studies:
        for fingerprint in study.configurations:
            names.setdefault(fingerprint, []).append(study.name)
        titles |= {source.content: source.title for source in study.sources if source.title}
    tables = make_tables(store.records(), names, titles)
    for name, table in zip((PARQUET_FILE, CURVES_FILE), tables, strict=True):
        with replace_atomically(store.root / name) as temporary:
            pyarrow.parquet.write_table(table, temporary)
    return store.root / PARQUET_FILE


def make_tables(
    records: Iterable[Record], studies: Mapping[str, Sequence[str]], titles: Mapping[str, str]
) -> tuple[pa.Table, pa.Table]:
    """Return the table of runs, with a row per record, and that of the curves, with a row per step.

    Columns of the runs: `fingerprint`; `studies`; every hyperparameter under its name in
    `Configuration.to_columns()` (a variant's own as `variant_<name>`, numbers as float64); `task_title`, the
    name of the task for a reader; the columns of the record, its cost and its provenance (`versions` is a
    JSON object); `Record.results`; every score of the last evaluation of a split as `validation_<score>` and
    `test_<score>`, for any state. The table's metadata has the version of the schema under
    `record_schema_version`.

    Columns of the curves: `fingerprint` (dictionary-encoded); those of `StepMetrics` (`learning_rate` as
    scheduled); every score of an evaluation after that step as `validation_<score>` and `test_<score>`.

    Args:
        records: The records. They are not held at once, because their curves are large.
        studies: Fingerprint -> names of the studies that have requested it.
        titles: Content of a user's task -> its title.
    """
    rows, curves = [], []
    for record in records:
        rows.append(_to_row(record, studies.get(record.fingerprint, ()), titles))
        curves.append(_curve_table(record))
    return _to_table(rows), _concatenate(curves)


def make_runs(
    records: Iterable[Record], studies: Mapping[str, Sequence[str]], titles: Mapping[str, str]
) -> pa.Table:
    """Return the first of the tables of `make_tables` alone, which takes less time."""
    return _to_table([_to_row(record, studies.get(record.fingerprint, ()), titles) for record in records])


def make_curves(records: Iterable[Record]) -> pa.Table:
    """Return the second of the tables of `make_tables` alone."""
    return _concatenate([_curve_table(record) for record in records])


def _to_row(record: Record, studies: Sequence[str], titles: Mapping[str, str]) -> dict[str, Any]:
    """Return a record as a row of the runs; times are in milliseconds since the epoch."""
    task = record.configuration.task
    row: dict[str, Any] = {"studies": list(studies), **record.configuration.to_columns()}
    row["task_title"] = titles.get(task.content, task.name)
    for evaluation in record.evaluations:  # in the order of steps, so that the last one stays
        row |= _scores_of(evaluation)
    row |= record.results()
    for part in (record, record.cost, record.provenance):
        row |= {name: _plain(getattr(part, each.field), each) for name, each in COLUMNS[type(part)].items()}
    return row


def _scores_of(evaluation: Evaluation) -> dict[str, float]:
    return {f"{evaluation.split}_{name}": float(value) for name, value in evaluation.scores.items()}


def _plain(value: Any, column: Field) -> Any:
    """Return the value of a field for Arrow."""
    if column.unit == "UTC":
        return round(value * 1000)
    return json.dumps(dict(value), sort_keys=True) if isinstance(value, Mapping) else value


def _curve_table(record: Record) -> pa.Table:
    """Return the rows of one record in the table of curves."""
    import pyarrow as pa

    rows: dict[int, dict[str, Any]] = {step.step: column_values(step) for step in record.curve}
    for evaluation in record.evaluations:
        rows.setdefault(evaluation.step, {"step": evaluation.step}).update(_scores_of(evaluation))
    ordered = [{"fingerprint": record.fingerprint, **rows[step]} for step in sorted(rows)]
    fixed = _curve_schema()
    scores = dict.fromkeys(name for row in ordered for name in row if name not in fixed.names)
    schema = pa.schema([*fixed, *(pa.field(name, pa.float64()) for name in scores)])
    return pa.Table.from_pylist(ordered, schema)


def _curve_schema() -> pa.Schema:
    """Return the columns of the curves of any record."""
    import pyarrow as pa

    types = {"fingerprint": pa.dictionary(pa.int32(), pa.string()), **_arrow_types(COLUMNS[StepMetrics])}
    return pa.schema(types.items(), _METADATA)


def _arrow_types(columns: Mapping[str, Field]) -> dict[str, pa.DataType]:
    import pyarrow as pa

    def arrow_type(column: Field) -> pa.DataType:
        if column.unit == "UTC":
            return pa.timestamp("ms", tz="UTC")
        alias = COLUMN_TYPES[column.value_type]
        return pa.list_(pa.int64()) if alias == "list<int64>" else pa.type_for_alias(alias)

    return {name: arrow_type(column) for name, column in columns.items()}


def _concatenate(curves: Sequence[pa.Table]) -> pa.Table:
    """Concatenate the curves of several runs. A score that a run does not have is null in its rows."""
    import pyarrow as pa

    table = pa.concat_tables([_curve_schema().empty_table(), *curves], promote_options="default")
    return table.unify_dictionaries().replace_schema_metadata(_METADATA)


def _to_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Return rows as a table with the fixed columns, and those of the variants and scores in `rows`.

    The types are fixed, because a type inferred from an empty column would change once the column has values.
    """
    import pyarrow as pa

    results = _arrow_types(COLUMNS[Record]) | dict.fromkeys(RESULTS, pa.float64())
    results |= _arrow_types(COLUMNS[Cost] | COLUMNS[Provenance])
    types = {"fingerprint": results.pop("fingerprint"), "studies": pa.list_(pa.string())}
    types |= _arrow_types(configuration.COLUMNS)
    types["task_title"] = pa.string()
    for name in sorted({name for row in rows for name in row} - types.keys() - results.keys()):
        types[name] = _infer_type([row[name] for row in rows if row.get(name) is not None])
    types |= results
    # Variants may have hyperparameters of one name and different types.
    text = {name for name, kind in types.items() if kind == pa.string()}
    converted = [
        {name: str(value) if name in text and value is not None else value for name, value in row.items()}
        for row in rows
    ]
    return pa.Table.from_pylist(converted, pa.schema(types.items(), _METADATA))


def _infer_type(values: Iterable[Any]) -> pa.DataType:
    """Return the type of a column from its values.

    All numbers become float64, because a later record may have a fraction.
    """
    import pyarrow as pa

    types = {type(value) for value in values}
    if types == {bool}:
        return pa.bool_()
    return pa.float64() if types <= {int, float} else pa.string()
