from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestrator.record import schema
from orchestrator.record.run_values import untimed_values
from orchestrator.record.schema import Cost, Provenance
from orchestrator.record.store import Store
from orchestrator.record.study_file import StudyFile, read_studies
from orchestrator.record.tables import CURVES_FILE, write_parquet


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path)


def test_each_configuration_has_one_row_with_every_hyperparameter(store, make_record):
    made = [make_record(seed=s, state=t) for s, t in enumerate(("finished", "diverged", "stopped", "failed"))]
    for record in made:
        store.put(record)
    rows = {r["fingerprint"]: r for r in pq.read_table(write_parquet(store)).to_pylist()}
    assert len(rows) == 4
    for record in made:
        row = rows[record.fingerprint]
        for name, value in record.configuration.to_columns().items():
            assert row[name] == value, name
        assert (row["state"], row["reason"], row["steps"]) == (record.state, record.reason, 20)
        assert row["untrained_validation_score"] == 0.1
        assert row["untrained_test_score"] == 0.125
        assert (row["seconds"], row["tokens"], row["trainable_parameters"]) == (2.5, 4096, 1234)
        assert row["peak_memory"] == 3 * 2**20
        assert json.loads(row["versions"]) == {"torch": "2.9", "ray": "2.60"}
        assert (row["commit"], row["device"], row["host"]) == ("abc123", "cpu", "box")
        assert row["ended"] == datetime.fromtimestamp(1e9 + 4, UTC)
    scores = {r["state"]: (r["validation_score"], r["test_score"]) for r in rows.values()}
    assert scores == {
        "finished": (0.5, 0.45),
        "diverged": (0.05, 0.05),
        "stopped": (None, None),
        "failed": (None, None),
    }
    assert rows[made[0].fingerprint]["validation_accuracy"] == pytest.approx(20 / 30)
    assert rows[made[0].fingerprint]["test_loss"] == 0.2
    assert rows[made[2].fingerprint]["validation_loss"] == 0.1  # This is the last evaluation before the stop.
    assert rows[made[2].fingerprint]["test_loss"] is None


def test_column_types_do_not_depend_on_the_records(store, make_record):
    empty, curves = pq.read_schema(write_parquet(store)), pq.read_schema(store.root / CURVES_FILE)
    assert curves.names == ["fingerprint", "step", "train_loss", "learning_rate", "gradient_norm"]
    assert curves.metadata[b"record_schema_version"] == b"1"
    store.put(make_record(state="failed", evaluations=(), baseline_scores={}))
    one = pq.read_schema(write_parquet(store))
    store.put(make_record(seed=1))
    more = pq.read_schema(write_parquet(store))
    for older, newer in ((empty, one), (one, more)):
        for name in older.names:
            assert newer.field(name).type == older.field(name).type
    assert empty.field("test_score").type == pa.float64()
    assert empty.field("resumed_from").type == pa.list_(pa.int64())
    assert pa.null() not in more.types
    assert more.metadata[b"record_schema_version"] == b"1"
    # All columns of a configuration have a fixed type.
    assert set(make_record().configuration.to_columns()) <= set(empty.names)


def test_a_field_is_a_column_and_a_cost_is_a_metric(store, make_record):
    record = make_record()
    store.put(record)
    costs = {field.name for field in fields(Cost)}
    assert costs | {field.name for field in fields(Provenance)} <= set(
        pq.read_schema(write_parquet(store)).names
    )
    assert costs <= {name for name, _, _ in untimed_values(record, ())}
    store.put(make_record(state="stopped", seed=1, stopped_at=10))
    assert pq.read_table(write_parquet(store))["stopped_at"].drop_null().to_pylist() == [10]


def test_a_field_whose_type_has_no_column_must_say_that_it_is_none():
    @dataclass
    class Part:
        steps: int
        is_shared: bool

    with pytest.raises(TypeError, match=r"^Part.is_shared: "):
        schema._find_columns(Part)


def test_every_configuration_has_the_names_of_its_studies(store, make_record, tmp_path):
    both, one, none = (make_record(seed=seed) for seed in range(3))
    for record in (both, one, none):
        store.put(record)
    for name, records in (("a", (both, one)), ("b", (both,))):
        StudyFile(name, "", "x", tuple(r.fingerprint for r in records)).write(tmp_path / "output" / name)
    rows = pq.read_table(write_parquet(store, read_studies(tmp_path / "output").values())).to_pylist()
    assert {row["seed"]: row["studies"] for row in rows} == {0: ["a", "b"], 1: ["a"], 2: []}


def test_the_curves_have_one_row_per_step_with_the_evaluations_after_it(store, make_record):
    finished, failed = make_record(seed=0), make_record(seed=1, state="failed", curve=(), evaluations=())
    for record in (finished, failed):
        store.put(record)
    write_parquet(store)
    curves = pq.read_table(store.root / CURVES_FILE).to_pandas()
    assert set(curves["fingerprint"]) == {finished.fingerprint}
    assert list(curves["step"]) == list(range(1, 21))
    for name, field in (("train_loss", "loss"), ("gradient_norm",) * 2, ("learning_rate",) * 2):
        assert list(curves[name]) == [getattr(step, field) for step in finished.curve]
    evaluated = curves.dropna(subset="validation_exact_match")
    assert list(evaluated["step"]) == [5, 10, 15, 20]
    assert list(evaluated["validation_loss"]) == [0.4, 0.2, 2 / 15, 0.1]
    assert list(curves["test_loss"].dropna()) == [0.2]


def test_a_variants_own_hyperparameters_have_columns(store, make_record):
    store.put(make_record(seed=0, extra={"ratio": 16, "exact": True, "start": "svd"}))
    store.put(make_record(seed=1, extra={"ratio": 0.5}))
    table = pq.read_table(write_parquet(store))
    assert [table.schema.field(f"variant_{n}").type for n in ("ratio", "exact", "start")] == [
        pa.float64(),
        pa.bool_(),
        pa.string(),
    ]
    by_seed = {r["seed"]: r for r in table.to_pylist()}
    assert [by_seed[s]["variant_ratio"] for s in (0, 1)] == [16.0, 0.5]
    assert by_seed[1]["variant_exact"] is None


def test_a_hyperparameter_of_several_types_has_a_column_of_text(store, make_record):
    """`initial` is a ratio in AdaLoRA, a whole number in IncreLoRA, and a word in DeLoRA."""
    for seed, value in enumerate((1.5, 1, "kaiming")):
        store.put(make_record(seed=seed, extra={"initial": value}))
    store.put(make_record(seed=3))
    table = pq.read_table(write_parquet(store))
    assert table.schema.field("variant_initial").type == pa.string()
    by_seed = {r["seed"]: r["variant_initial"] for r in table.to_pylist()}
    assert by_seed == {0: "1.5", 1: "1", 2: "kaiming", 3: None}


def test_scores_that_are_not_finite_are_kept(store, make_record):
    bad = make_record().evaluations[0]
    bad = type(bad)(5, "validation", {"loss": math.inf, "exact_match": math.nan})
    store.put(make_record(state="diverged", evaluations=(bad,)))
    (row,) = pq.read_table(write_parquet(store)).to_pylist()
    assert row["validation_loss"] == math.inf
    assert math.isnan(row["validation_exact_match"])
