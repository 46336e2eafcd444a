"""Tables of records: one with a row per configuration, and one with a row per step of every curve.

The store keeps them as Parquet files. `orchestrator.load` returns those of one study as pandas frames.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.record.schema import SCHEMA_VERSION, Record
from orchestrator.record.store import Store
from orchestrator.record.study_file import read_studies
from orchestrator.util.atomic_files import replace_atomically
from orchestrator.util.errors import UsageError

if TYPE_CHECKING:
    import pyarrow as pa

_log = logging.getLogger(__name__)

PARQUET_FILE = "records.parquet"
CURVES_FILE = "curves.parquet"

# Arrow type -> columns, in the order of the file. The types are fixed, because a type inferred from an empty
# column would change once the column has values.
_CONFIGURATION = {
    "string": "variant task task_title model model_content dtype targets schedule task_revision base_dropout "
    "test_evaluations",
    "int64": "seed rank steps_horizon batch_size accumulation max_length task_train_size "
    "task_validation_size task_test_size task_numerics evaluations variant_numerics loop_numerics",
    "float64": "learning_rate alpha dropout weight_decay beta1 beta2 epsilon clip_norm head_learning_rate "
    "warmup final_factor divergence_loss_ratio divergence_share divergence_smoothing",
}
_RESULT = {
    "string": "state reason",
    "int64": "steps",
    "float64": "validation_score test_score untrained_validation_score untrained_test_score",
}
_PROVENANCE = {
    "float64": "seconds train_seconds evaluate_seconds generate_seconds start_seconds other_seconds",
    "int64": "tokens trainable_parameters peak_memory lane_group_size workers attempt",
    "string": "commit device kernels host versions scheduler",
    "list<int64>": "resumed_from",
    "timestamp": "started ended",
}

_CURVE = ("train_loss", "gradient_norm", "learning_rate")


def write_parquet(store: Store, output: Path | None = None) -> Path:
    """Write `records.parquet` and `curves.parquet` in the store's folder.

    Args:
        store: The store.
        output: The folder with the studies' folders, from which the column `studies` is filled, and
            `task_title` for users' tasks. None: the lists are empty, and the title is the task's name.

    Returns:
        The path of `records.parquet`.
    """
    import pyarrow as pa
    import pyarrow.parquet

    studies, titles = _read_studies(output) if output is not None else ({}, {})
    rows, curves = [], []
    for record in store.records():  # not all records at once, because their curves are large
        rows.append(to_row(record, studies.get(record.fingerprint, ()), titles))
        curves.append(_curve_table(record))
    tables = {PARQUET_FILE: _runs_table(rows), CURVES_FILE: _concatenate(curves)}
    for name, table in tables.items():
        with replace_atomically(store.root / name) as temporary:
            pa.parquet.write_table(table, temporary)
    return store.root / PARQUET_FILE


def _read_studies(output: Path) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Return fingerprint -> names of the studies that have requested it, and content of a task -> title."""
    studies: dict[str, list[str]] = {}
    titles: dict[str, str] = {}
    try:
        for name, (_, study) in read_studies(output).items():
            for fingerprint in study.configurations:
                studies.setdefault(fingerprint, []).append(name)
            titles |= {source.content: source.title for source in study.sources if source.title}
    except UsageError as error:  # another study's file must not prevent this study's report
        _log.warning("%s: the column `studies` of %s is empty: %s", output, PARQUET_FILE, error)
        return {}, {}
    return studies, titles


def runs_table(
    records: Iterable[Record], studies: Mapping[str, Sequence[str]], titles: Mapping[str, str]
) -> pa.Table:
    """Return one row per record.

    Columns: `fingerprint`; `studies`; every hyperparameter under its name in `Configuration.to_columns()` (a
    variant's own as `variant_<name>`, numbers as float64); `task_title`, the name of the task for a reader;
    `state`, `reason`, `steps`; `validation_score` and
    `test_score` as in `Record.score`; the same metric for the untrained base; every score of the last
    evaluation of a split as `validation_<score>` and `test_<score>`, for any state; cost and provenance
    (`versions` is a JSON object, times are UTC). The table's metadata has the version of the schema under
    `record_schema_version`.

    Args:
        records: The records.
        studies: Fingerprint -> names of the studies that have requested it.
        titles: Content of a user's task -> its title.
    """
    return _runs_table([to_row(record, studies.get(record.fingerprint, ()), titles) for record in records])


def curves_table(records: Iterable[Record]) -> pa.Table:
    """Return one row per record and step.

    Columns: `fingerprint` (dictionary-encoded), `step`, `train_loss`, `gradient_norm`, `learning_rate` as
    scheduled, and every score of an evaluation after that step as `validation_<score>` and `test_<score>`.
    """
    return _concatenate([_curve_table(record) for record in records])


def to_row(record: Record, studies: Sequence[str], titles: Mapping[str, str]) -> dict[str, Any]:
    """Return a record as a row of `runs_table`.

    Args:
        record: The record.
        studies: Names of the studies that have requested it.
        titles: Content of a user's task -> its title.

    Returns:
        Column -> value; times are in milliseconds since the epoch.
    """
    task, metric = record.configuration.task, record.configuration.task.metric
    cost, provenance = record.cost, record.provenance
    columns: dict[str, Any] = {"fingerprint": record.fingerprint, "studies": list(studies)}
    columns |= record.configuration.to_columns()
    columns["task_title"] = titles.get(task.content, task.name)
    for evaluation in record.evaluations:  # in the order of steps, so that the last one stays
        columns |= {f"{evaluation.split}_{name}": float(v) for name, v in evaluation.scores.items()}
    for split in ("validation", "test"):
        columns[f"{split}_score"] = record.score(split)
        columns[f"untrained_{split}_score"] = record.baseline_scores.get(split, {}).get(metric)
    columns |= {"state": record.state, "reason": record.reason, "steps": record.steps}
    columns |= {"seconds": cost.train_seconds + cost.evaluate_seconds, **asdict(cost)}
    columns |= asdict(provenance)
    columns |= {
        "versions": json.dumps(dict(provenance.versions), sort_keys=True),
        "started": round(provenance.started * 1000),
        "ended": round(provenance.ended * 1000),
        "scheduler": record.stopping_settings,
    }
    return columns


def _curve_table(record: Record) -> pa.Table:
    """Return the rows of one record in `curves_table`."""
    import pyarrow as pa

    rows: dict[int, dict[str, float]] = {
        step.step: {
            "train_loss": step.loss,
            "gradient_norm": step.gradient_norm,
            "learning_rate": step.learning_rate,
        }
        for step in record.curve
    }
    for evaluation in record.evaluations:
        scores = {f"{evaluation.split}_{name}": float(value) for name, value in evaluation.scores.items()}
        rows.setdefault(evaluation.step, {}).update(scores)
    names = dict.fromkeys((*_CURVE, *(name for row in rows.values() for name in row)))
    steps = sorted(rows)
    fingerprints = pa.DictionaryArray.from_arrays(
        pa.array([0] * len(steps), pa.int32()), [record.fingerprint]
    )
    columns = {"fingerprint": fingerprints, "step": pa.array(steps, pa.int64())}
    columns |= {name: pa.array([rows[step].get(name) for step in steps], pa.float64()) for name in names}
    return pa.table(columns)


def _concatenate(curves: Sequence[pa.Table]) -> pa.Table:
    """Concatenate the curves of several runs. A score that a run does not have is null in its rows."""
    import pyarrow as pa

    numbers = [pa.field(name, pa.float64()) for name in _CURVE]
    fields = [pa.field("fingerprint", pa.dictionary(pa.int32(), pa.string())), pa.field("step", pa.int64())]
    empty = pa.schema([*fields, *numbers]).empty_table()
    table = pa.concat_tables([empty, *curves], promote_options="default").unify_dictionaries()
    return table.replace_schema_metadata({"record_schema_version": str(SCHEMA_VERSION)})


def _runs_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    import pyarrow as pa

    schema = pa.schema(_arrow_fields(rows), metadata={"record_schema_version": str(SCHEMA_VERSION)})
    # Variants may have hyperparameters of one name and different types.
    text = {field.name for field in schema if field.type == pa.string()}
    converted = [
        {name: str(value) if name in text and value is not None else value for name, value in row.items()}
        for row in rows
    ]
    return pa.Table.from_pylist(converted, schema)


def _arrow_fields(rows: Iterable[Mapping[str, Any]]) -> list[pa.Field]:
    """Return the fields of `runs_table`: fixed ones, and those of the variants and scores in `rows`."""
    import pyarrow as pa

    types = {t: pa.type_for_alias(t) for t in ("string", "int64", "float64", "bool")}
    types |= {"list<int64>": pa.list_(pa.int64()), "list<string>": pa.list_(pa.string())}
    types |= {"timestamp": pa.timestamp("ms", tz="UTC")}

    def typed_fields(group: Mapping[str, str]) -> list[pa.Field]:
        return [pa.field(name, types[t]) for t, names in group.items() for name in names.split()]

    fixed = (
        [pa.field("fingerprint", pa.string()), *typed_fields({"list<string>": "studies", **_CONFIGURATION})],
        typed_fields(_RESULT),
        typed_fields(_PROVENANCE),
    )
    fixed_names = {field.name for group in fixed for field in group}
    other_types: dict[str, set[type]] = {}
    for columns in rows:
        for name in columns.keys() - fixed_names:
            other_types.setdefault(name, set()).add(type(columns[name]))
    scores: list[pa.Field] = []
    variant_fields: list[pa.Field] = []
    for name in sorted(other_types):
        field = pa.field(name, types[_arrow_type_name(other_types[name])])
        (scores if name.startswith(("validation_", "test_")) else variant_fields).append(field)
    return [*fixed[0], *variant_fields, *fixed[1], *scores, *fixed[2]]


def _arrow_type_name(values: set[type]) -> str:
    """Return the Arrow type of a column from the types of its values.

    All numbers become float64, because a later record may have a fraction.
    """
    values = values - {type(None)}
    if values == {bool}:
        return "bool"
    return "float64" if values <= {int, float} else "string"
