"""MlflowLogger with a real MLflow on SQLite."""

from __future__ import annotations

import base64
import json
import math
import sqlite3
import zlib
from contextlib import closing
from dataclasses import replace
from multiprocessing.synchronize import Event

import pytest
from mlflow import MlflowClient
from mlflow_runs import PROCESSES, runs_of, stop_at
from mlflow_server import wait

from orchestrator.record.mlflow.child_run import MODEL_TYPE
from orchestrator.record.mlflow.log import MlflowLogger
from orchestrator.record.schema import Evaluation, Record
from orchestrator.util.sqlite_uri import sqlite_path


def test_a_child_run_has_the_content_of_its_record(uri, study, make_record):
    record = make_record(extra={"ratio": 16})
    log = MlflowLogger(uri)
    log.ensure_study(study, "Which rate is best?", {"task": "letters"})
    assert log.log_records(study, [record]) == 1
    log.finish_study(study)
    parent, children = runs_of(uri, study)
    assert parent.info.status == "FINISHED"
    assert parent.info.run_name == study
    assert parent.data.tags["mlflow.note.content"] == "Which rate is best?"
    child = children[record.fingerprint]
    assert child.info.status == "FINISHED"
    assert (child.info.start_time, child.info.end_time) == (10**12, 10**12 + 4000)
    assert child.info.run_name == "lora lr 0.001 seed 0"
    expected = {
        "variant": "lora",
        "axis": "baseline",
        "task": "letters",
        "model": "letters-base",
        "seed": "0",
    }
    expected |= {"state": "finished", "fingerprint": record.fingerprint, "study": study, "commit": "abc123"}
    assert expected.items() <= child.data.tags.items()
    assert "reused_from" not in child.data.tags
    assert child.data.tags["model_content"] == "c0ffee"
    flat = record.configuration.to_columns()
    assert child.data.params == {k: str(v) for k, v in flat.items() if v is not None}
    assert child.data.params["variant_ratio"] == "16"
    ends = {"validation_score": 0.5, "test_score": 0.45, "untrained_validation_score": 0.1, "seconds": 2.5}
    ends |= {"log10_learning_rate": -3.0, "mean_validation_score": 0.5}
    assert ends.items() <= child.data.metrics.items()
    assert next(iter(child.data.metrics)) == "validation_score", "which a comparison of runs shows"
    assert not child.data.metrics.keys() & child.data.params.keys()
    client = MlflowClient(uri, uri)
    history = client.get_metric_history(child.info.run_id, "train_loss")
    assert [(m.step, m.value) for m in history] == [(s.step, s.loss) for s in record.curve]
    assert [m.timestamp for m in history] == [10**12 + 200 * s for s in range(1, 21)]
    for key in ("scheduled_learning_rate", "gradient_norm"):
        assert len(client.get_metric_history(child.info.run_id, key)) == 20
    steps = [m.step for m in client.get_metric_history(child.info.run_id, "validation_exact_match")]
    assert steps == [5, 10, 15, 20]
    inputs = {i.dataset.name: i for i in child.inputs.dataset_inputs}
    assert set(inputs) == {"letters/train", "letters/validation", "letters/test"}
    train = inputs["letters/train"]
    assert train.dataset.digest == record.configuration.task.revision[:36]
    assert json.loads(train.dataset.source)["tags"]["revision"] == record.configuration.task.revision
    assert {t.key: t.value for t in train.tags} == {"mlflow.data.context": "training"}


def test_values_that_are_not_finite_are_logged_as_nan(uri, study, make_record):
    record = make_record(state="diverged")
    log = MlflowLogger(uri)
    log.ensure_study(study, "")
    log.log_records(study, [record])
    child = runs_of(uri, study)[1][record.fingerprint]
    assert child.info.status == "FINISHED"
    assert child.data.tags["state"] == "diverged"
    assert child.data.tags["mlflow.note.content"] == record.reason
    assert child.data.metrics["validation_score"] == 0.05
    values = [m.value for m in MlflowClient(uri, uri).get_metric_history(child.info.run_id, "train_loss")]
    assert len(values) == 20
    assert all(map(math.isfinite, values[:-2]))
    # MLflow would plot infinity as 1.8e308.
    assert all(map(math.isnan, values[-2:]))


def test_the_status_of_a_child_follows_from_the_state(uri, study, make_record):
    made = {
        t: make_record(seed=s, state=t) for s, t in enumerate(("finished", "diverged", "stopped", "failed"))
    }
    log = MlflowLogger(uri)
    log.ensure_study(study, "")
    log.log_records(study, made.values())
    children = runs_of(uri, study)[1]
    status = {state: children[r.fingerprint].info.status for state, r in made.items()}
    assert status == dict.fromkeys(("finished", "diverged", "stopped"), "FINISHED") | {"failed": "FAILED"}
    assert "no such tensor" in children[made["failed"].fingerprint].data.tags["mlflow.note.content"]
    assert "validation_score" not in children[made["stopped"].fingerprint].data.metrics


def test_logging_again_changes_nothing(uri, study, make_record):
    records = [make_record(seed=s) for s in range(3)]
    log = MlflowLogger(uri)
    log.ensure_study(study, "")
    assert log.log_records(study, records) == 3
    log.update_means(study)
    before = runs_of(uri, study)[1]
    assert log.log_records(study, records, reused={r.fingerprint for r in records}) == 0
    again = MlflowLogger(uri)
    again.ensure_study(study, "")
    assert again.log_records(study, records) == 0
    assert {f: r.to_dictionary() for f, r in runs_of(uri, study)[1].items()} == {
        f: r.to_dictionary() for f, r in before.items()
    }


def test_a_reused_record_is_tagged(uri, study, make_record):
    old, new = make_record(seed=0), make_record(seed=1)
    log = MlflowLogger(uri)
    log.ensure_study(study, "")
    log.log_records(study, [old, new], reused={old.fingerprint})
    children = runs_of(uri, study)[1]
    assert children[old.fingerprint].data.tags["reused_from"] == "2001-09-09 01:46:44 UTC, commit abc123"
    assert "reused_from" not in children[new.fingerprint].data.tags


def _log(uri: str, study: str, record: Record, stopped: Event) -> None:
    """Log a record, and halt in the middle of a transaction after a thousand metrics were written."""
    stop_at("INSERT INTO metrics", 3, stopped)
    log = MlflowLogger(uri)
    log.ensure_study(study, "")
    log.log_records(study, [record])


def test_an_incomplete_child_of_a_killed_driver_is_completed(uri, study, make_record):
    record = make_record(steps=1000)  # Its metrics take several calls.
    stopped = PROCESSES.Event()
    process = PROCESSES.Process(target=_log, args=(uri, study, record, stopped))
    process.start()
    wait(lambda: stopped.is_set() or not process.is_alive(), "the driver does not log")
    assert process.is_alive()
    process.kill()
    process.join()
    (left,) = runs_of(uri, study)[1].values()
    assert left.info.status == "RUNNING"
    log = MlflowLogger(uri)
    log.ensure_study(study, "")
    assert log.log_records(study, [record]) == 1
    log.finish_study(study)
    parent, children = runs_of(uri, study)
    child = children[record.fingerprint]
    assert child.info.run_id == left.info.run_id
    assert (child.info.status, parent.info.status) == ("FINISHED", "FINISHED")
    for key in ("train_loss", "scheduled_learning_rate", "gradient_norm"):
        history = MlflowClient(uri, uri).get_metric_history(child.info.run_id, key)
        assert [m.step for m in history] == list(range(1, 1001))  # Every step is there once.
    assert len(child.inputs.dataset_inputs) == 3


def test_every_run_of_a_group_has_the_mean_over_its_seeds(uri, study, make_record):
    low = make_record(seed=1, evaluations=(Evaluation(20, "validation", {"exact_match": 0.1, "loss": 2.0}),))
    other = make_record(seed=0, rate=1e-2)
    log = MlflowLogger(uri)
    log.ensure_study(study, "")
    log.log_records(study, [make_record(seed=0), low, other, make_record(seed=2, state="stopped")])
    log.update_means(study)
    means = {f: r.data.metrics["mean_validation_score"] for f, r in runs_of(uri, study)[1].items()}
    assert means.pop(other.fingerprint) == 0.5
    assert list(means.values()) == [0.3] * 3
    log.log_records(study, [make_record(seed=3)])
    log.finish_study(study)
    means = {f: r.data.metrics["mean_validation_score"] for f, r in runs_of(uri, study)[1].items()}
    assert means.pop(other.fingerprint) == 0.5
    assert list(means.values()) == [pytest.approx(1.1 / 3)] * 4


def test_a_run_that_a_killed_driver_left_without_parameters_joins_its_group(uri, study, make_record):
    low = make_record(seed=1, evaluations=(Evaluation(20, "validation", {"exact_match": 0.1, "loss": 2.0}),))
    MlflowLogger(uri).ensure_study(study, "")
    experiment = MlflowClient(uri, uri).get_experiment_by_name(study).experiment_id
    MlflowClient(uri, uri).create_run(experiment, tags={"study": study, "fingerprint": low.fingerprint})
    log = MlflowLogger(uri)
    log.ensure_study(study, "")
    log.log_records(study, [make_record(seed=0), low])
    log.finish_study(study)
    means = [run.data.metrics["mean_validation_score"] for run in runs_of(uri, study)[1].values()]
    assert means == [pytest.approx(0.3)] * 2


def test_the_experiment_has_the_saved_views_and_the_description(uri, study, make_record):
    log = MlflowLogger(uri)
    log.ensure_study(study, "Which rate is best?")
    worse = (Evaluation(20, "validation", {"exact_match": 0.2, "loss": 2.0}),)
    log.log_records(study, [make_record(rate=1e-2, evaluations=worse), make_record(rate=1e-3)])
    client = MlflowClient(uri, uri)
    experiment = client.get_experiment_by_name(study)
    assert experiment.tags["mlflow.note.content"] == "Which rate is best?"
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    log.finish_study(study, description="**Supported:** it does.\n\nMore.", metrics={"verdict_1": 1.0})
    experiment = client.get_experiment_by_name(study)
    parent = runs_of(uri, study)[0]
    for note in (experiment.tags["mlflow.note.content"], parent.data.tags["mlflow.note.content"]):
        first, _, rest = note.partition("\n")
        assert first.startswith(f"[Ranked table](#/experiments/{experiment.experiment_id}/runs?")
        assert first.endswith(" | **Supported:** it does.")
        assert rest == "\nMore.\n\n*Which rate is best?*"
    assert parent.data.metrics == {"verdict_1": 1.0}
    envelope = json.loads(experiment.tags["mlflow.sharedViewState.ranking"])
    state = json.loads(zlib.decompress(base64.b64decode(envelope["state"].removeprefix("deflate;"))))
    assert state["groupsExpanded"] == {
        f"param.variant.lora,param.learning_rate.{rate}": False for rate in ("0.01", "0.001")
    }
    assert log.view_link(study) == (
        f"http://127.0.0.1:5000/#/experiments/{experiment.experiment_id}/runs"
        "?workflowType=machine_learning&viewStateShareKey=ranking"
    )
    shown = client.search_runs(
        [experiment.experiment_id], state["searchFilter"], order_by=[f"{state['orderByKey']} DESC"]
    )
    assert [run.data.params["learning_rate"] for run in shown] == ["0.001", "0.01"], (
        "the runs, not the study's"
    )
    MlflowLogger(uri).ensure_study(study, "Which rate is best?")
    again = client.get_experiment_by_name(study)
    assert again.tags["mlflow.note.content"] == experiment.tags["mlflow.note.content"]


def test_names_that_mlflow_refuses_are_changed(uri, study, make_record):
    record = make_record(
        extra={"ratio/a%": 2},
        evaluations=(Evaluation(5, "validation", {"../hits@10": 0.5, "exact_match": 0.1}),),
    )
    log = MlflowLogger(uri)
    log.ensure_study(study, "")
    log.log_records(study, [record])
    data = runs_of(uri, study)[1][record.fingerprint].data
    assert data.params["variant_ratio_a_"] == "2"
    assert data.metrics["validation_.._hits_10"] == 0.5


def test_a_newer_record_replaces_its_child(uri, study, make_record):
    log = MlflowLogger(uri)
    log.ensure_study(study, "")
    for state, steps in (("failed", 5), ("stopped", 10), ("finished", 20)):
        record = make_record(state=state, steps=steps)
        assert log.log_records(study, [record]) == 1
        child = runs_of(uri, study)[1][record.fingerprint]
        assert child.data.tags["state"] == state
        history = MlflowClient(uri, uri).get_metric_history(child.info.run_id, "train_loss")
        assert len(history) == steps


def test_a_configuration_trained_again_after_damage_has_one_child(uri, study, make_record):
    """The child of the damaged record is deleted permanently, with its model."""
    first = make_record()
    again = replace(first, provenance=replace(first.provenance, ended=2e9))
    for record in (first, again):
        log = MlflowLogger(uri)
        log.ensure_study(study, "")
        assert log.log_records(study, [record]) == 1
        log.finish_study(study, models={first.fingerprint: {"variant": "lora"}})
    child = runs_of(uri, study)[1][first.fingerprint]
    assert child.info.end_time == 2_000_000_000_000
    models = MlflowClient(uri, uri).search_logged_models([child.info.experiment_id])
    assert [model.model_id for model in models] == [o.model_id for o in child.outputs.model_outputs]


def test_a_child_with_another_value_than_its_record_is_written_again(uri, study, make_record):
    """SQLite does not notice a flipped bit in the database that changes a value."""
    record = make_record()
    for changed, written in ((False, 1), (False, 0), (True, 1), (False, 0)):
        if changed:
            with closing(sqlite3.connect(sqlite_path(uri))) as database, database:
                for table in ("metrics", "latest_metrics"):
                    database.execute(f"update {table} set value = value + 1 where key = 'tokens'")
        log = MlflowLogger(uri)
        log.ensure_study(study, "")
        assert log.log_records(study, [record]) == written
    assert runs_of(uri, study)[1][record.fingerprint].data.metrics["tokens"] == record.cost.tokens


def test_two_runs_of_one_configuration_become_one(uri, study, make_record):
    record = make_record()
    first, second = MlflowLogger(uri), MlflowLogger(uri)
    first.ensure_study(study, "")
    second.ensure_study(study, "")
    first.log_records(study, [record])
    # The second logger has read the children before the first one wrote its child.
    assert second.log_records(study, [record]) == 1
    MlflowLogger(uri).ensure_study(study, "")
    assert set(runs_of(uri, study)[1]) == {record.fingerprint}


def test_a_deleted_experiment_comes_back(uri, study, make_record):
    log = MlflowLogger(uri)
    log.ensure_study(study, "")
    client = MlflowClient(uri, uri)
    client.delete_experiment(client.get_experiment_by_name(study).experiment_id)
    log = MlflowLogger(uri)
    log.ensure_study(study, "")
    assert log.log_records(study, [make_record()]) == 1
    assert len(runs_of(uri, study)[1]) == 1


def test_the_models_of_a_study_are_the_adapters_that_it_keeps(uri, study, make_record):
    """Each is linked once to its run, also after a driver was killed while it logged the model."""
    first, second = make_record(seed=0), make_record(seed=1)
    tags = {"variant": "lora", "export": "python -m orchestrator export s"}
    client = MlflowClient(uri, uri)
    for kept in ([first], [first], [second], []):
        log = MlflowLogger(uri)
        log.ensure_study(study, "")
        log.log_records(study, [first, second])
        log.finish_study(study, models={record.fingerprint: tags for record in kept})
        children = runs_of(uri, study)[1]
        models = client.search_logged_models([children[first.fingerprint].info.experiment_id])
        linked = []
        for model in models:
            assert (model.status.value, model.model_type) == ("READY", MODEL_TYPE)
            assert tags.items() <= model.tags.items()
            run = client.get_run(model.source_run_id)
            assert [output.model_id for output in run.outputs.model_outputs] == [model.model_id]
            linked.append(run.data.tags["fingerprint"])
        assert linked == [record.fingerprint for record in kept]
        if kept == [first]:
            leave_unfinished(client, models[0].model_id)


def leave_unfinished(client: MlflowClient, model_id: str) -> None:
    """Set a model to the state in which a killed driver leaves it."""
    client.finalize_logged_model(model_id, "PENDING")


def test_logging_before_ensure_study_is_an_error(uri, make_record):
    with pytest.raises(ValueError, match="ensure_study"):
        MlflowLogger(uri).log_records("never opened", [make_record()])
