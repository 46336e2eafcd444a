"""MLflow runs of lanes in training, with a real MLflow on SQLite."""

from __future__ import annotations

from dataclasses import replace

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow_runs import runs_of

from orchestrator.record.mlflow.log import MlflowLogger
from orchestrator.record.schema import LaneProgress, Record


def _progress(record: Record, *steps: int) -> list[LaneProgress]:
    """Return the start of a record's lane, and its evaluations at these steps, as the driver sees them.

    Of the training curve every other step is shown.
    """
    scores = {e.step: e.scores for e in record.evaluations if e.split == "validation"}
    losses = {step.step: step.loss for step in record.curve}
    configuration = record.configuration
    found, previous = [LaneProgress(configuration)], 0
    for step in steps:
        shown = tuple(s for s in record.curve if previous < s.step <= step and s.step % 2 == 0)
        found.append(LaneProgress(configuration, step, scores[step], losses[step], shown))
        previous = step
    return found


def _history(uri: str, run: Run, key: str) -> list[tuple[int, float]]:
    """Return (step, value) in MLflow's order, which is that of the times."""
    return [(m.step, m.value) for m in MlflowClient(uri, uri).get_metric_history(run.info.run_id, key)]


def test_a_lane_in_training_has_a_run_that_its_record_completes(uri, study, make_record):
    record = make_record()
    log = MlflowLogger(uri)
    log.ensure_study(study, "")
    start, first, second = _progress(record, 5, 10)
    log.log_progress(study, start)
    (run,) = runs_of(uri, study)[1].values()
    assert (run.info.status, run.data.tags["state"]) == ("RUNNING", "training")
    assert run.info.run_name == "lora lr 0.001 seed 0"
    assert run.data.params["learning_rate"] == "0.001"
    assert run.data.metrics == {}
    for progress in (first, first, second):  # the broker repeats its reports after a restart
        log.log_progress(study, progress)
    assert _history(uri, run, "validation_exact_match") == [(5, 0.125), (10, 0.25)]
    losses = {s.step: s.loss for s in record.curve}
    assert _history(uri, run, "train_loss") == [(s, losses[s]) for s in (2, 4, 5, 6, 8, 10)]
    norms = {s.step: s.gradient_norm for s in record.curve}
    assert _history(uri, run, "gradient_norm") == [(s, norms[s]) for s in (2, 4, 6, 8, 10)]
    assert log.log_records(study, [record]) == 1
    log.log_progress(study, second)  # a report that comes after the record changes nothing
    log.finish_study(study)
    (child,) = runs_of(uri, study)[1].values()
    assert child.info.run_id == run.info.run_id
    assert (child.info.status, child.data.tags["state"]) == ("FINISHED", "finished")
    assert child.info.end_time >= child.info.start_time, "the trainer's clock is years behind the driver's"
    assert child.data.tags["commit"] == "abc123"
    assert _history(uri, child, "train_loss") == [(s.step, s.loss) for s in record.curve]
    assert [step for step, _ in _history(uri, child, "validation_exact_match")] == [5, 10, 15, 20]
    assert next(iter(child.data.metrics)) == "validation_exact_match", "which a comparison of runs shows"
    assert child.data.metrics["log10_learning_rate"] == -3.0
    assert MlflowLogger(uri).ensure_study(study, "") is None
    assert log.log_records(study, [record]) == 0


def test_a_lane_that_trained_when_its_driver_was_killed_keeps_its_run(uri, study, make_record):
    record, untrained = make_record(seed=0), make_record(seed=1)
    log = MlflowLogger(uri)
    log.ensure_study(study, "")
    for progress in (*_progress(record, 5, 10), *_progress(untrained)):
        log.log_progress(study, progress)
    before = runs_of(uri, study)[1]
    log = MlflowLogger(uri)  # of the next driver
    log.ensure_study(study, "")
    for progress in _progress(record, 10, 15):
        log.log_progress(study, progress)
    assert log.log_records(study, [record]) == 1
    log.finish_study(study)
    after = runs_of(uri, study)[1]
    assert {f: r.info.run_id for f, r in after.items()} == {f: r.info.run_id for f, r in before.items()}
    assert _history(uri, after[record.fingerprint], "train_loss") == [(s.step, s.loss) for s in record.curve]
    assert after[record.fingerprint].info.status == "FINISHED"
    assert after[untrained.fingerprint].info.status == "KILLED", "no record came"
    log.ensure_study(study, "")
    log.log_progress(study, _progress(untrained)[0])
    assert runs_of(uri, study)[1][untrained.fingerprint].info.status == "RUNNING"


def test_a_run_in_training_with_other_values_than_the_record_is_replaced(uri, study, make_record):
    record = make_record()
    log = MlflowLogger(uri)
    log.ensure_study(study, "")
    start, first = _progress(record, 5)
    log.log_progress(study, start)
    log.log_progress(study, replace(first, scores={**first.scores, "exact_match": 0.9}))
    assert log.log_records(study, [record]) == 1
    (child,) = runs_of(uri, study)[1].values()
    assert _history(uri, child, "validation_exact_match")[0] == (5, 0.125)
