"""Report a study's records to the head's MLflow, and check what MLflow holds. Runs on the head.

    python reporter.py report COUNT HALT ...  report records; after HALT of them, wait for the file `HALT.go`
    python reporter.py check COUNT            print the errors as JSON
    python reporter.py spoil                  introduce errors that the check must find

Like a study's driver, the script puts each record into the store and passes it to the writer without waiting.
The file `logged` holds the number of records that the writer has logged.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from records import record as make_record

from orchestrator.record.mlflow import run_content
from orchestrator.record.mlflow.log import MlflowLogger
from orchestrator.record.mlflow.saved_view import MEAN_METRIC
from orchestrator.record.mlflow.writer import MlflowWriter
from orchestrator.record.schema import Record
from orchestrator.record.store import Store
from orchestrator.record.study_file import StudyFile
from orchestrator.record.trackers.tracker import StudyEnd

URI, STUDY = "http://127.0.0.1:5000", "rates"
RESULTS, HERE = Path("/shared/results"), Path(__file__).parent
STATES = ("finished", "finished", "diverged", "failed")


def records(count: int) -> Iterator[Record]:
    for seed in range(count):
        state = STATES[seed % len(STATES)]
        yield make_record(seed=seed, rate=10 ** -(1 + seed % 4), state=state)


def report(count: int, *halts: int) -> int:
    store = Store(RESULTS / "store")
    names = tuple(record.fingerprint for record in records(count))
    study = StudyFile(STUDY, "Which rate?", "python rates.py", names, (), URI)
    study.write(RESULTS / STUDY)
    writer = MlflowWriter(MlflowLogger(URI), store, study, tags={"commit": "none"})

    def write_progress(number: int) -> None:
        time.sleep(0.1)
        (HERE / "logged").write_text(str(number - writer.pending_count))

    for number, record in enumerate(records(count), 1):
        store.put(record)
        writer.put(record)
        while number in halts and not (HERE / f"{number}.go").exists():
            write_progress(number)
    while writer.pending_count:  # a study trains other lanes meanwhile
        write_progress(count)
    writer.begin_close(StudyEnd(), 600)
    late = writer.wait_closed()
    print(f"{late} late, {'' if writer.is_finished else 'not '}ended; last error: {writer.error or 'none'}")
    return int(bool(late) or not writer.is_finished)


def check(count: int) -> list[str]:
    """Return the errors that MLflow's client and the number of rows in its database show."""
    from mlflow import MlflowClient

    client = MlflowClient(URI, URI)
    experiment = client.get_experiment_by_name(STUDY).experiment_id
    runs = client.search_runs([experiment], max_results=10 * count)
    parents = [run for run in runs if run.data.tags.get("role") == "study"]
    children: dict[str, list] = {}
    for run in runs:
        if run not in parents:
            children.setdefault(run.data.tags["fingerprint"], []).append(run)
    wrong = [] if len(parents) == 1 else [f"{len(parents)} runs of the study"]
    wrong += [f"the study's run is {run.info.status}" for run in parents if run.info.status != "FINISHED"]
    wrong += [f"{run.info.run_id} is RUNNING" for run in runs if run.info.status == "RUNNING"]
    expected = {record.fingerprint: record for record in records(count)}
    wrong += [f"{name} is not of the study" for name in children if name not in expected]
    rows = _rows()
    for name, record in expected.items():
        found = children.get(name, [])
        if len(found) != 1:
            wrong.append(f"{name}: {len(found)} children")
            continue
        (run,) = found
        expected_metrics: dict[str, list[tuple[int, float]]] = {}
        for metric in run_content.metrics(record):
            expected_metrics.setdefault(metric.key, []).append((metric.step, metric.value))
        for what, actual, wanted in (
            ("status", run.info.status, run_content.STATUS[record.state]),
            ("state", run.data.tags["state"], record.state),
            ("params", run.data.params, {p.key: p.value for p in run_content.params(record.configuration)}),
            ("metrics", set(run.data.metrics), {*expected_metrics, MEAN_METRIC}),
            (
                "rows",
                rows[run.info.run_id],
                sum(len(set(map(str, points))) for points in expected_metrics.values()),
            ),
            ("inputs", len(run.inputs.dataset_inputs), 3),
        ):
            if actual != wanted:
                wrong.append(f"{name}: {what} {actual}, not {wanted}")
        curve = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "train_loss")]
        if not _is_same_curve(curve, expected_metrics["train_loss"]):
            wrong.append(f"{name}: train_loss {curve}")
    return wrong


def _is_same_curve(first: list[tuple[int, float]], second: list[tuple[int, float]]) -> bool:
    return len(first) == len(second) and all(
        one == other and (math.isclose(a, b) or (math.isnan(a) and math.isnan(b)))
        for (one, a), (other, b) in zip(sorted(first), second, strict=True)
    )


def _rows() -> Counter[str]:
    # The mean over the seeds is logged again after each seed.
    query = f"select run_uuid, count(*) from metrics where key <> '{MEAN_METRIC}' group by 1"
    rows = subprocess.check_output(
        ["psql", "-At", "-h", "/var/run/postgresql", "mlflow", "-c", query], text=True
    )
    return Counter({run: int(number) for run, number in (line.split("|") for line in rows.split())})


def spoil() -> None:
    """Delete one child run, set a second to RUNNING, duplicate a third, delete a metric's row of a fourth."""
    from mlflow import MlflowClient

    client = MlflowClient(URI, URI)
    experiment = client.get_experiment_by_name(STUDY).experiment_id
    first, second, third, fourth, *_ = client.search_runs([experiment], "tags.state = 'finished'")
    client.delete_run(first.info.run_id)
    client.update_run(second.info.run_id, "RUNNING")
    client.create_run(experiment, tags=third.data.tags)
    query = f"delete from metrics where run_uuid = '{fourth.info.run_id}' and key = 'train_loss' and step = 3"
    subprocess.check_call(["psql", "-q", "-h", "/var/run/postgresql", "mlflow", "-c", query])


if __name__ == "__main__":
    what, *numbers = sys.argv[1:]
    if what == "report":
        sys.exit(report(*map(int, numbers)))
    if what == "check":
        print(json.dumps(check(*map(int, numbers))))
    else:
        spoil()
