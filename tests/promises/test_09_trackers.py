"""Promise 9: MLflow's link opens the ranked runs, W&B and TensorBoard have all lanes, no outage loses a run.

One study serves all tests. Its lanes wait during training while the fixture reads their runs from MLflow's
server. The fixture then kills the server and lets the lanes continue.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import as_a_user
import pytest
from tracking_server import Run, Server, served

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1800)]

TASK = Path(__file__).with_name("waiting_task.py")
STUDY, STEPS, SEEN = "rates", 12, 6
"""The study's name, the steps of a lane, and the step of its first evaluation."""
WORDS = ["study", "--dry-run", "--task", TASK, "--variants", "lora", "--learning-rates", "1e-3", "1e-2"]
WORDS += ["--seeds", "2", "--steps", STEPS, "--evaluations", "2", "--widen", "0", "--study", STUDY]
OFFLINE = {"WANDB_MODE": "offline", "WANDB_API_KEY": "5ec7e7" * 6 + "5ec7"}


@dataclass
class Outage:
    """A study during which the tracking server was killed.

    Args:
        home: The working folder of the commands.
        server: The server, restarted after the study.
        live: A run as the server showed it while its lane trained.
        out: The standard output of the study.
        synced: Fingerprint -> run after `sync`; the key of the study's own run is "".
    """

    home: Path
    server: Server
    live: Run
    out: str
    synced: dict[str, Run]


def by_fingerprint(runs: list[Run]) -> dict[str, Run]:
    found = {run.fingerprint: run for run in runs}
    assert len(found) == len(runs), "one run a configuration, and one of the study"
    return found


def in_the_middle(server: Server) -> list[Run]:
    """Return the runs of lanes that have an evaluation."""
    return [r for r in server.runs(STUDY) if r.fingerprint and server.history(r.id, "validation_exact_match")]


@pytest.fixture(scope="module")
def study(with_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outage]:
    home = tmp_path_factory.mktemp("trackers") / "home"
    shutil.copytree(with_base, home)
    go = home / "go"
    with served(f"sqlite:///{home}/server.db", home / "server") as server:
        process = as_a_user.start(
            *WORDS,
            *("--tracker", "wandb", "tensorboard", "--tracking-uri", server.uri),
            cwd=home,
            WAITS_BEFORE=str(SEEN + 1),
            WAITS_FOR=str(go),
            **OFFLINE,
        )
        try:
            as_a_user.wait_until(lambda: bool(in_the_middle(server)), process)
            live = in_the_middle(server)[0]
            server.kill()
            go.touch()
            ended = as_a_user.end(process)
        finally:
            process.kill()
        assert ended.code == 0, ended
        server.start()
        as_a_user.succeed("sync", cwd=home)
        yield Outage(home, server, live, ended.out, by_fingerprint(server.runs(STUDY)))


def scores(record: dict[str, Any], split: str) -> dict[int, float]:
    """Return the scores of a record on a split: step -> exact match."""
    found = [each for each in record["evaluations"] if each["split"] == split]
    return {each["step"]: each["scores"]["exact_match"] for each in found}


def test_a_run_grows_while_its_lane_trains(study: Outage) -> None:
    assert study.live.status == "RUNNING"
    assert study.live.fingerprint in as_a_user.records(study.home)
    assert study.synced[study.live.fingerprint].id == study.live.id, "the same run is completed"


def test_a_server_that_goes_down_loses_nothing(study: Outage) -> None:
    records = as_a_user.records(study.home)
    assert [record["state"] for record in records.values()] == ["finished"] * 4
    assert "sync" in study.out, "the study says how the missing runs get there"
    assert study.synced.keys() == {*records, ""}


def test_a_run_has_what_its_record_has(study: Outage) -> None:
    records = as_a_user.records(study.home)
    for fingerprint, record in records.items():
        run, configuration = study.synced[fingerprint], record["configuration"]
        assert run.status == "FINISHED"
        assert float(run.params["learning_rate"]) == configuration["optimizer"]["learning_rate"]
        assert run.params["seed"] == run.tags["seed"] == str(configuration["seed"])
        assert (run.tags["variant"], run.tags["state"]) == ("lora", "finished")
        assert run.tags["study"] == STUDY
        assert study.server.history(run.id, "train_loss") == pytest.approx(
            {each["step"]: each["loss"] for each in record["curve"]}
        )
        validation, test = scores(record, "validation"), scores(record, "test")
        assert study.server.history(run.id, "validation_exact_match") == pytest.approx(validation)
        assert run.metrics["validation_score"] == pytest.approx(validation[STEPS])
        assert run.metrics["test_score"] == pytest.approx(test[STEPS])
        assert run.metrics["trainable_parameters"] == record["cost"]["trainable_parameters"]
    assert study.synced[""].status == "FINISHED"
    assert study.synced[""].tags["role"] == "study"


def linked(server: Server, out: str) -> str:
    """Return the name of the experiment to which the printed link leads."""
    (number,) = set(re.findall(r"http://\S+/#/experiments/(\d+)", out))
    names = {id_: name for name, id_ in server.experiments().items()}
    return names[number]


def ranked_rightly(server: Server, home: Path) -> None:
    """Check that MLflow orders the runs by the mean validation score of their rate in the records."""
    groups: dict[float, list[float]] = {}
    for record in as_a_user.records(home).values():
        rate = record["configuration"]["optimizer"]["learning_rate"]
        groups.setdefault(rate, []).append(scores(record, "validation")[STEPS])
    means = {rate: mean(values) for rate, values in groups.items()}
    runs = [run for run in server.runs(STUDY, "metrics.mean_validation_score DESC") if run.fingerprint]
    assert len(runs) == 4
    shown = [(float(run.params["learning_rate"]), run.metrics["mean_validation_score"]) for run in runs]
    assert [value for _, value in shown] == pytest.approx(sorted((means[rate] for rate, _ in shown))[::-1])
    assert [means[rate] for rate, _ in shown] == pytest.approx([value for _, value in shown])
    assert len(set(means.values())) == 2, "the rates differ, so that an order can be wrong"


def test_the_same_command_adds_no_run_and_its_link_leads_to_the_ranked_answer(study: Outage) -> None:
    out = as_a_user.succeed(*WORDS, "--tracking-uri", study.server.uri, cwd=study.home, **OFFLINE)
    assert study.server.uri in out
    assert linked(study.server, out) == STUDY
    ranked_rightly(study.server, study.home)
    again = by_fingerprint(study.server.runs(STUDY))
    assert {name: run.id for name, run in again.items()} == {n: run.id for n, run in study.synced.items()}


def test_a_database_that_was_removed_is_made_again(study: Outage) -> None:
    """Without --tracking-uri, a SQLite file in the store has the runs. The study prints how to open it."""
    out = as_a_user.succeed(*WORDS, cwd=study.home)
    (uri,) = re.findall(r"--backend-store-uri (sqlite:\S+)", out)
    database = study.home / "results" / "store" / "mlflow.db"
    assert uri == f"sqlite:///{database}"
    for path in database.parent.glob("mlflow.db*"):
        path.unlink()
    as_a_user.succeed("sync", cwd=study.home)
    with served(uri, study.home / "again") as server:
        assert linked(server, out) == STUDY
        runs = by_fingerprint(server.runs(STUDY))
        ranked_rightly(server, study.home)
    assert runs.keys() == study.synced.keys()
    for name, run in runs.items():
        was = study.synced[name]
        assert (run.params, run.metrics, run.status) == (was.params, pytest.approx(was.metrics), was.status)


def test_wandb_and_tensorboard_have_every_lane(study: Outage) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    records = as_a_user.records(study.home)
    folder = study.home / "results" / STUDY
    found = []
    for lane in {path.parent for path in (folder / "tensorboard").rglob("*tfevents*")}:
        events = EventAccumulator(str(lane))
        events.Reload()
        if "train_loss" in events.Tags()["scalars"]:
            found.append({event.step: event.value for event in events.Scalars("train_loss")})
    wanted = [{each["step"]: each["loss"] for each in record["curve"]} for record in records.values()]
    assert sorted(f[STEPS] for f in found) == pytest.approx(sorted(w[STEPS] for w in wanted), rel=1e-5)
    assert all(list(losses) == list(range(1, STEPS + 1)) for losses in found)
    assert all(math.isfinite(value) for losses in found for value in losses.values())

    offline = [path.read_bytes() for path in (folder / "wandb").rglob("*.wandb")]
    for fingerprint in records:
        lane = [data for data in offline if fingerprint.encode() in data]
        assert lane, "a run of W&B for each lane"
        assert all(b"train_loss" in data for data in lane)
    assert not any(OFFLINE["WANDB_API_KEY"].encode() in data for data in offline)
