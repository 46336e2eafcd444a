"""Studies that join an existing cluster leave nothing on it, even if they fail or are interrupted."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import psutil
import pytest
import ray
import study
from machines import no_room
from ray._private.state import actors
from ray.cluster_utils import Cluster
from ray.util import list_named_actors
from ray.util.placement_group import placement_group_table
from steps import TASK, Steps

from orchestrator.execution.broker.client import BROKER_NAME
from orchestrator.finetune.engine import checkpoint
from orchestrator.record.store import Store

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200)]

TWO = ("--variants", "lora", "--trainers", "1", "--seeds", "1", "--learning-rates", "3e-3", "1e-2")


def left() -> list[str]:
    """Return descriptions of the actors, placement groups and resources that studies still hold."""
    there = [a for a in actors().values() if a["State"] != "DEAD"]
    found = [f"actor {a['ActorClassName']} {a['State']}" for a in there]
    groups = [group["state"] for group in placement_group_table().values()]
    found += [f"placement group {state}" for state in groups if state != "REMOVED"]
    free, all_of = ray.available_resources(), ray.cluster_resources()
    return found + [
        f"{all_of[k] - free.get(k, 0):g} {k}"
        for k in ("CPU", "GPU", "memory")
        if free.get(k, 0) < all_of.get(k, 0)
    ]


def workers(before: set[int]) -> set[int]:
    """Return the ids of Ray's processes that are not in `before`, without idle workers of the cluster."""
    found = set()
    for pid in study.rays() - before:
        try:
            line = " ".join(psutil.Process(pid).cmdline())
            if "ray::IDLE" not in line:
                found.add(pid)
        except psutil.Error:
            continue
    return found


def kill_broker(for_good: bool = False) -> None:
    (space,) = {a["namespace"] for a in list_named_actors(all_namespaces=True) if a["name"] == BROKER_NAME}
    ray.kill(ray.get_actor(BROKER_NAME, namespace=space), no_restart=for_good)


BROKER_LOST_SOON = """
from orchestrator.util import timeouts
timeouts.BROKER_LOST_SECONDS = 3.0
"""


@pytest.mark.nightly
def test_a_broker_that_dies_for_good_ends_the_study_with_one_line(
    connected: Cluster, output: Path, tmp_path: Path
) -> None:
    store = Store(output / "store")
    task = study.hold(tmp_path / "task", store, records=1, step=10)
    arguments = (*TWO, "--lanes-per-trainer", "1", "--steps", "24", "--task", str(task))
    script = study.altered(tmp_path, BROKER_LOST_SOON)
    process = study.start(output, *arguments, script=script, address=connected.address)
    study.wait_for(lambda: study.held(task), process)
    kill_broker(for_good=True)
    code, out, err = study.end(process)
    assert (code, len(err.splitlines())) == (1, 1), out + err
    assert err.startswith("error: The broker has been lost for 3 s")
    assert study.finals(output) == 1, "what is done is kept"
    study.release(task)
    study.wait_for(lambda: not left())


@pytest.mark.nightly
def test_a_broker_that_dies_in_the_middle_of_asha_loses_nothing(
    connected: Cluster, output: Path, steps: Steps
) -> None:
    """The broker is killed twice: after the first reports, and after the first lane was stopped."""
    store, length = Store(output / "store"), 100
    rates = ("--learning-rates", "1e-3", "3e-3", "1e-2", "1e-1", "3e-1")
    rates = ("--variants", "lora", "--seeds", "1", "--widen", "0", *rates)
    others = ("--task", str(TASK), "--steps", str(length), "--trainers", "2", "--lanes-per-trainer", "2")

    def stopped() -> bool:
        return "stopped" in store.states().values()

    steps.slow_after(1)
    process = study.start(output, *rates, *others, "--scheduler", "asha", address=connected.address)
    while not any(store.checkpoints.glob("*/*/*.safetensors")):
        steps.slow_after(steps.taken() + 4)
        study.wait_for(lambda: steps.taken() >= steps.limit, process)
    kill_broker()
    while not stopped():
        steps.slow_after(steps.taken() + 4)
        study.wait_for(lambda: stopped() or steps.taken() >= steps.limit, process)
    kill_broker()
    steps.run_free()
    code, out, err = study.end(process)
    assert code == 0, out + err
    found = list(store.records())
    assert len(found) == 5
    assert {r.state for r in found} == {"finished", "stopped"}
    for record in found:
        assert record.steps == [e.step for e in record.evaluations if e.split == "validation"][-1]
        assert record.stopped_at == (record.steps if record.state == "stopped" else None), "it ran ahead"
    counted = re.search(rf"(\d+) optimizer steps of {5 * length} for all", out)
    assert counted, out
    # If another trainer leases a lane before its holder has called the restarted broker, the lane is trained
    # again and the repeated steps are counted.
    assert sum(r.steps for r in found) <= int(counted[1]) < 5 * length
    study.wait_for(lambda: not left())


def test_a_second_ctrl_c_ends_at_once_and_leaves_nothing(
    connected: Cluster, output: Path, tmp_path: Path
) -> None:
    """The first Ctrl-C waits for lanes that are held, and would wait until the end of the test."""
    before = study.rays()
    store = Store(output / "store")
    task = study.hold(tmp_path / "task", store, records=0, step=10)
    script = study.altered(tmp_path, study.PATIENT)
    arguments = (*TWO, "--steps", "24", "--task", str(task))
    process = study.start(output, *arguments, script=script, address=connected.address)
    study.wait_for(lambda: study.held(task), process)
    os.killpg(process.pid, signal.SIGINT)
    study.wait_for(lambda: "the trainers save their lanes; again ends at once" in study.log(output), process)
    os.killpg(process.pid, signal.SIGINT)
    code, out, err = study.end(process)
    assert code == 130, out + err
    assert "Traceback" not in err
    assert "Stopped:" not in out, "this line is for an end that the study waits for"
    saved = study.saved(output)
    assert list(saved.values()) == [8, 8], "the two steps since then are lost"
    for fingerprint, step in saved.items():
        whole = checkpoint.read_newest(store.checkpoints / fingerprint, print)
        assert whole is not None
        assert whole.step == step, "nothing on disk is broken"
    study.release(task)
    study.wait_for(lambda: not left())
    study.wait_for(lambda: not workers(before))


def test_a_study_that_gets_no_trainer_says_so_in_one_line(connected: Cluster, output: Path) -> None:
    """A cluster may grow, so a study waits for resources that the cluster lacks."""
    code, out, err = study.run(
        output, *TWO, "--gpus-per-worker", "1", "--trainer-timeout", "1", address=connected.address
    )
    assert (code, len(err.splitlines())) == (1, 1), out + err
    assert err.startswith("error: No trainer for 1 s: a trainer needs 1 CPU, 1 GPU")
    assert "waiting for a GPU node" in out
    study.wait_for(lambda: not left())


@pytest.mark.nightly
def test_a_study_that_fails_leaves_nothing_and_says_so(connected: Cluster, output: Path) -> None:
    """Every lane fails, because the weights of the base model are deleted once the study has begun.

    The study gives up its trainers before all configurations have failed.
    """
    rates = ("--learning-rates", "1e-3", "3e-3", "1e-2", "3e-2")
    twenty = ("--variants", "lora", "--seeds", "5", "--widen", "0", *rates)
    (weights,) = (output / "store" / "bases").glob("letters-base-*/model.safetensors")
    with no_room():
        process = study.start(output, *twenty, "--trainers", "2", address=connected.address)
        study.wait_for(lambda: "joined Ray" in study.log(output), process)
        weights.unlink()
    code, out, err = study.end(process)
    assert code == 1, out + err
    assert "Trainers died" in err.strip().splitlines()[-1]
    assert "Traceback" not in err
    study.wait_for(lambda: not left())
