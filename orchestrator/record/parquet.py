"""The Parquet projection of a store: one row per configuration."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.record.schema import SCHEMA_VERSION, Record
from orchestrator.record.store import Store
from orchestrator.util.atomic_files import replace_atomically

if TYPE_CHECKING:
    import pyarrow as pa

PARQUET_FILE = "records.parquet"

# Arrow types by column, in the order of the file. They are not inferred, so that a column that is empty today
# does not change its type later.
_CONFIGURATION = {
    "string": "variant task model model_content dtype targets schedule task_revision base_dropout "
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
    "float64": "seconds train_seconds evaluate_seconds",
    "int64": "tokens trainable_parameters pack_lanes workers attempt",
    "string": "commit device host versions scheduler",
    "list<int64>": "resumed_from",
    "timestamp": "started ended",
}


def write_parquet(store: Store) -> Path:
    """Write `records.parquet` in the store's folder.

    Columns: `fingerprint`; every hyperparameter under its name in `Configuration.to_columns()` (a variant's
    own as `variant_<name>`, numbers as float64); `state`, `reason`, `steps`; `validation_score` and
    `test_score` as in `Record.score`; the same metric for the untrained base; every score of the last
    evaluation of a split as `validation_<score>` and `test_<score>`, for any state; cost and provenance
    (`versions` is a JSON object, times are UTC). The file's metadata has the version of the schema under
    `record_schema_version`.

    Returns:
        The path of the file.
    """
    import pyarrow as pa
    import pyarrow.parquet

    rows = [to_row(record) for record in store.records()]
    fields = _arrow_fields(rows)
    schema = pa.schema(fields, metadata={"record_schema_version": str(SCHEMA_VERSION)})
    path = store.root / PARQUET_FILE
    with replace_atomically(path) as temporary:
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows, schema), temporary)
    return path


def to_row(record: Record) -> dict[str, Any]:
    """Return a record as named columns."""
    metric = record.configuration.task.metric
    cost, provenance = record.cost, record.provenance
    columns: dict[str, Any] = {"fingerprint": record.fingerprint, **record.configuration.to_columns()}
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
        "pack_lanes": columns.pop("lane_group_size"),
        "started": round(provenance.started * 1000),
        "ended": round(provenance.ended * 1000),
        "scheduler": record.stopping_settings,
    }
    return columns


def _arrow_fields(rows: Iterable[Mapping[str, Any]]) -> list[pa.Field]:
    import pyarrow as pa

    types = {t: pa.type_for_alias(t) for t in ("string", "int64", "float64", "bool")}
    types |= {"list<int64>": pa.list_(pa.int64()), "timestamp": pa.timestamp("ms", tz="UTC")}

    def typed_fields(group: Mapping[str, str]) -> list[pa.Field]:
        return [pa.field(name, types[t]) for t, names in group.items() for name in names.split()]

    fixed = (
        [pa.field("fingerprint", pa.string()), *typed_fields(_CONFIGURATION)],
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
    """Return the type of a column; float64 for all numbers, since the next record may have a fraction."""
    values = values - {type(None)}
    if values == {bool}:
        return "bool"
    return "float64" if values <= {int, float} else "string"
