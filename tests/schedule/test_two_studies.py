"""Two studies on one cluster of two GPUs (in Ray's books only: they train on CPUs), and one with a limit."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import study
from ray.cluster_utils import Cluster
from test_joined_cluster import left, workers

from orchestrator.record.store import Store

GPU = ("--device", "cpu", "--gpus-per-seat", "1", "--seats", "1", "--variants", "lora", "--seeds", "1")


@pytest.fixture(scope="module")
def gpus() -> Iterator[Cluster]:
    head = {"num_cpus": 2, "num_gpus": 2, "include_dashboard": True}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def nothing_left() -> bool:
    free, there = ray.available_resources(), ray.cluster_resources()
    return not left() and free.get("GPU") == there["GPU"]


@pytest.mark.timeout(600)
def test_two_studies_at_once_share_what_they_know_and_both_finish(gpus: Cluster, output: Path) -> None:
    before = study.rays()
    rates = {"a": ("1e-3", "3e-3", "1e-2", "1e-1"), "b": ("3e-4", "3e-3", "1e-2", "3e-1")}
    processes = {
        name: study.start(
            output, *GPU, "--steps", "60", "--study", name, "--learning-rates", *of, address=gpus.address
        )
        for name, of in rates.items()
    }
    for process in processes.values():
        code, out, err = study.end(process, timeout=300)
        assert code == 0, out + err
        assert "joined Ray" in out
        hours = re.search(r"(\d+) trained in .*, ([\d.e-]+) GPU hours", out)
        assert hours, out
        assert 0 < float(hours[2]) < 0.1
        known = re.search(r"(\d) of 4 known", out)  # by the other one, if it was much faster
        assert known
        assert int(hours[1]) + int(known[1]) == 4
    study.wait_for(nothing_left, 10)
    study.wait_for(lambda: not workers(before), 10)

    records = study.records(output)
    assert {r.state for r in records.values()} <= {"finished", "diverged"}
    by_rate = {f"{r.configuration.optimizer.learning_rate:g}": f for f, r in records.items()}
    assert len(records) == len(by_rate) == 6, "one record a configuration"
    store = Store(output / "store")
    assert len(list(store.records_folder.glob("*/*.json"))) == 6
    assert not list(store.checkpoints.iterdir())
    for name, of in rates.items():
        wanted = {by_rate[f"{float(rate):g}"] for rate in of}
        assert sorted(study.children(output, name)) == sorted((f, "FINISHED") for f in wanted)
        assert study.parents(output, name) == ["FINISHED"]


@pytest.mark.timeout(600)
def test_a_limit_ends_a_study_cleanly_and_the_same_command_goes_on(gpus: Cluster, output: Path) -> None:
    before = study.rays()
    command = (*GPU, "--study", "limited", "--learning-rates", "3e-3", "1e-2", "--steps", "4000")
    # About nine seconds of one GPU: too short for 4000 steps, long enough for some.
    code, out, err = study.run(output, *command, "--max-gpu-hours", "0.0025", address=gpus.address)
    assert code == 3, out + err
    assert "Traceback" not in err
    assert "--max-gpu-hours 0.0025: the seats save their lanes" in out
    last = out.strip().splitlines()[-1]
    ended = re.fullmatch(
        r"Ended by --max-gpu-hours 0\.0025: 0 of 2 configurations are done, ([\d.]+) GPU hours used; "
        r"to go on: python .*--max-gpu-hours 0\.0025",
        last,
    )
    assert ended, out
    assert 0.0025 <= float(ended[1]) < 0.02
    study.wait_for(nothing_left, 10)
    study.wait_for(lambda: not workers(before), 10)
    assert study.parents(output, "limited") == ["KILLED"]
    assert (output / "limited" / "report.html").exists()
    store = Store(output / "store")
    saved = {p.parts[-3]: int(p.stem[5:]) for p in sorted(store.checkpoints.glob("*/*/step-*.safetensors"))}
    assert len(saved) == 2
    assert all(0 < step < 4000 for step in saved.values())

    # Hours of this run: a second one gets as many again, and goes on where the first was.
    code, out, err = study.run(output, *command, "--max-gpu-hours", "0.0025", address=gpus.address)
    assert code == 3, out + err
    assert "Traceback" not in err
    now = {p.parts[-3]: int(p.stem[5:]) for p in sorted(store.checkpoints.glob("*/*/step-*.safetensors"))}
    steps = re.search(r"(\d+) optimizer steps of 8000", out)
    assert steps
    assert sum(now.values()) == sum(saved.values()) + int(steps[1]), "nothing is trained twice"
    study.wait_for(nothing_left, 10)


@pytest.mark.timeout(200)
def test_a_limit_on_gpus_is_refused_where_seats_hold_none(gpus: Cluster, output: Path) -> None:
    arguments = ("--gpus-per-seat", "0", "--max-gpu-hours", "1")
    code, _, err = study.run(output, *arguments, address=gpus.address)
    assert (code, len(err.splitlines())) == (2, 1)
    assert "take --max-hours" in err
