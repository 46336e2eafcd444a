"""Two studies on one cluster of two GPUs (in Ray's books only: they train on CPUs), and one with a limit."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import study
from ray.cluster_utils import Cluster
from test_joined_cluster import left, workers

from orchestrator.record.store import Store

STAMP = len("2026-01-01 00:00:00")
STEPS = 300
AT_MOST = 1.01  # hours are told to three digits
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


def at_work(output: Path, name: str) -> tuple[str, str]:
    """From when until when the study had seats, or asked for them."""
    lines = (output / name / "study.log").read_text().splitlines()
    (began,) = [line[:STAMP] for line in lines if "joined Ray" in line]
    (ended,) = [line[:STAMP] for line in lines if re.search(r"\d+ trained in ", line)]
    return began, ended


@pytest.mark.timeout(900)
def test_two_studies_at_once_share_what_they_know_and_both_finish(gpus: Cluster, output: Path) -> None:
    before = study.rays()
    began = time.monotonic()
    # None diverges: each record has as many steps as were taken for it.
    rates = {"a": ("1e-3", "3e-3", "1e-2", "2e-3"), "b": ("3e-4", "3e-3", "1e-2", "5e-3")}
    taken = 0
    processes = {
        name: study.start(
            output,
            *GPU,
            "--steps",
            str(STEPS),
            "--study",
            name,
            "--learning-rates",
            *of,
            address=gpus.address,
        )
        for name, of in rates.items()
    }
    for process in processes.values():
        code, out, err = study.end(process, timeout=400)
        assert code == 0, out + err
        assert "Traceback" not in err
        assert "joined Ray" in out
        hours = re.search(r"(\d+) trained in .*, ([\d.e-]+) GPU hours", out)
        assert hours, out
        assert 0 < float(hours[2]) < AT_MOST * (time.monotonic() - began) / 3600, "of one GPU"
        known = re.search(r"(\d) of 4 known", out)  # by the other one, if it was much faster
        assert known
        assert int(hours[1]) + int(known[1]) == 4
        counted = re.search(r"(\d+) optimizer steps of", out)
        assert counted
        taken += int(counted[1])
    study.wait_for(nothing_left, 10)
    study.wait_for(lambda: not workers(before), 10)

    records = study.records(output)
    assert {(r.state, r.steps) for r in records.values()} == {("finished", STEPS)}
    by_rate = {f"{r.configuration.optimizer.learning_rate:g}": f for f, r in records.items()}
    assert len(records) == len(by_rate) == 6, "one record a configuration"
    store = Store(output / "store")
    assert len(list(store.records_folder.glob("*/*.json"))) == 6
    assert not list(store.checkpoints.iterdir())
    (a_began, a_ended), (b_began, b_ended) = at_work(output, "a"), at_work(output, "b")
    assert max(a_began, b_began) < min(a_ended, b_ended), "they were at work at once"
    # What both asked for is taken twice, if both trained it at once, or met by the other's record.
    twice = taken - len(records) * STEPS
    how = f"{twice} of {2 * STEPS} steps of what both asked for were taken twice, the rest was shared"
    print(how)
    assert 0 <= twice <= 2 * STEPS, how
    for name, of in rates.items():
        wanted = {by_rate[f"{float(rate):g}"] for rate in of}
        assert sorted(study.children(output, name)) == sorted((f, "FINISHED") for f in wanted)
        assert study.parents(output, name) == ["FINISHED"]


def saved_steps(output: Path) -> dict[str, int]:
    """The steps that every lane's newest checkpoint holds."""
    found = sorted((output / "store" / "checkpoints").glob("*/*/step-*.safetensors"))
    return {path.parts[-3]: int(path.stem.rpartition("-")[2]) for path in found}


@pytest.mark.timeout(900)
def test_a_limit_ends_a_study_cleanly_and_the_same_command_goes_on(gpus: Cluster, output: Path) -> None:
    before = study.rays()
    # So many steps that no machine gets through them, so much time that a busy one takes some.
    command = (*GPU, "--study", "limited", "--learning-rates", "3e-3", "1e-2", "--steps", "40000")
    began = time.monotonic()
    process = study.start(output, *command, "--max-gpu-hours", "0.01", address=gpus.address)
    code, out, err = study.end(process, timeout=400)
    hours = (time.monotonic() - began) / 3600
    assert code == 3, out + err
    assert "Traceback" not in err
    assert "--max-gpu-hours 0.01: the seats save their lanes" in out
    ended = re.fullmatch(
        r"Ended by --max-gpu-hours 0\.01: 0 of 2 configurations are done, ([\d.]+) GPU hours used; "
        r"to go on: python .*--max-gpu-hours 0\.01",
        out.strip().splitlines()[-1],
    )
    assert ended, out
    assert 0.01 <= float(ended[1]) < AT_MOST * hours
    study.wait_for(nothing_left, 10)
    study.wait_for(lambda: not workers(before), 10)
    assert study.parents(output, "limited") == ["KILLED"]
    assert (output / "limited" / "report.html").exists()
    saved = saved_steps(output)
    assert len(saved) == 2
    assert all(0 < step < 40000 for step in saved.values())

    # The other limit, of the command's whole time: where the first one left the lanes, this one goes on.
    process = study.start(output, *command, "--max-hours", "0.015", address=gpus.address)
    code, out, err = study.end(process, timeout=400)
    assert code == 3, out + err
    assert "Traceback" not in err
    assert "--max-hours 0.015: the seats save their lanes" in out
    last = out.strip().splitlines()[-1]
    assert re.fullmatch(
        r"Ended by --max-hours 0\.015: 0 of 2 .* GPU hours used; to go on: python .*--max-hours 0\.015", last
    )
    now = saved_steps(output)
    assert set(now) == set(saved)
    assert all(now[fingerprint] >= step for fingerprint, step in saved.items())
    steps = re.search(r"(\d+) optimizer steps of 80000", out)
    assert steps
    assert sum(now.values()) == sum(saved.values()) + int(steps[1]), "nothing is trained twice"
    assert study.parents(output, "limited") == ["KILLED"]
    study.wait_for(nothing_left, 10)


@pytest.mark.timeout(200)
def test_a_limit_on_gpus_is_refused_where_seats_hold_none(gpus: Cluster, output: Path) -> None:
    arguments = ("--gpus-per-seat", "0", "--max-gpu-hours", "1")
    code, _, err = study.run(output, *arguments, address=gpus.address)
    assert (code, len(err.splitlines())) == (2, 1)
    assert "take --max-hours" in err
