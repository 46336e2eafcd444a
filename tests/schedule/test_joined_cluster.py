"""A study on a cluster that was there before it: it takes no more than there is and leaves nothing."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import study
from ray.cluster_utils import Cluster
from ray.util import list_named_actors
from ray.util.state import list_actors, list_placement_groups

from orchestrator.record.store import Store
from orchestrator.schedule.broker import NAME

TWENTY = (
    "--variants",
    "lora",
    "--seeds",
    "5",
    "--learning-rates",
    "1e-3",
    "3e-3",
    "1e-2",
    "3e-2",
    "--seats",
    "2",
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": True})
    ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


# Ray Train 2.60 starts it with the first Train run: one a cluster, detached, without resources. It is the
# cluster's own from then on, and the Train runs of others may be using it.
RAYS_OWN = "_AutoscalingCoordinatorActor"


def left() -> list[str]:
    """What of a study is still held, for people to read."""
    actors = [a for a in list_actors(limit=1000) if a.state != "DEAD" and a.class_name != RAYS_OWN]
    found = [f"actor {a.class_name} {a.state}" for a in actors]
    found += [f"placement group {g.state}" for g in list_placement_groups(limit=1000) if g.state != "REMOVED"]
    free, all_of = ray.available_resources(), ray.cluster_resources()
    return found + [
        f"{all_of[k] - free.get(k, 0):g} {k}" for k in ("CPU", "memory") if free.get(k, 0) < all_of[k]
    ]


def nothing_left() -> bool:
    return not left()


@pytest.mark.timeout(400)
def test_twenty_configurations_on_two_seats_leave_nothing_ten_seconds_after_they_end(
    cluster: Cluster, output: Path
) -> None:
    before = study.rays()
    code, out, err = study.run(output, *TWENTY, "--steps", "12", address=cluster.address)
    assert code == 0, out + err
    assert "joined Ray" in out
    assert study.finals(output) == 20
    study.wait_for(nothing_left, 10)
    study.wait_for(lambda: not workers(before), 10)


def workers(before: set[int]) -> set[int]:
    """Ray processes that came with the study, without the idle workers that a cluster keeps."""
    import psutil

    found = set()
    for pid in study.rays() - before:
        try:
            line = " ".join(psutil.Process(pid).cmdline())
            if "ray::IDLE" not in line and RAYS_OWN not in line:
                found.add(pid)
        except psutil.Error:
            continue
    return found


def kill_broker(for_good: bool = False) -> None:
    (space,) = {a["namespace"] for a in list_named_actors(all_namespaces=True) if a["name"] == NAME}
    ray.kill(ray.get_actor(NAME, namespace=space), no_restart=for_good)


@pytest.mark.timeout(300)
def test_a_broker_that_dies_for_good_ends_the_study_with_one_line(cluster: Cluster, output: Path) -> None:
    process = study.start(output, *TWENTY, "--steps", "400", address=cluster.address)
    study.wait_for(lambda: any((output / "store" / "checkpoints").glob("*/*/*.safetensors")), 120, process)
    kill_broker(for_good=True)
    code, out, err = study.end(process)
    assert (code, len(err.splitlines())) == (1, 1), out + err
    assert err.startswith("error: The broker has been lost for 30 s")
    study.wait_for(nothing_left, 10)


@pytest.mark.timeout(300)
def test_a_broker_that_dies_in_the_middle_of_asha_loses_nothing(cluster: Cluster, output: Path) -> None:
    arguments = ("--variants", "lora", "--seeds", "1", "--steps", "400", "--scheduler", "asha")
    rates = ("1e-3", "3e-3", "1e-2", "1e-1", "3e-1")
    store = Store(output / "store")

    def stopped() -> int:
        return sum(state == "stopped" for state in store.states().values())

    process = study.start(
        output, *arguments, "--lanes-per-seat", "2", "--learning-rates", *rates, address=cluster.address
    )
    study.wait_for(lambda: any(store.checkpoints.glob("*/*/*.safetensors")), 120, process)
    kill_broker()  # lanes have reported
    study.wait_for(lambda: stopped() > 0, 120, process)
    kill_broker()
    code, out, err = study.end(process)
    assert code == 0, out + err
    found = list(store.records())
    assert len(found) == 5
    assert {r.state for r in found} == {"finished", "stopped"}
    for record in found:
        assert record.steps == [e.step for e in record.evaluations if e.split == "validation"][-1]
        assert record.stopped_at == (record.steps if record.state == "stopped" else None), "it ran ahead"
    counted = re.search(r"(\d+) optimizer steps of 2000 for all", out)
    assert counted, out
    # A lane that another seat asked for before its holder had spoken again is trained again, and counted.
    assert sum(r.steps for r in found) <= int(counted[1]) < 2000
    study.wait_for(nothing_left, 10)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill -9"])
def test_interrupted_in_the_middle_it_leaves_nothing_either(
    cluster: Cluster, output: Path, how: signal.Signals
) -> None:
    before = study.rays()
    process = study.start(output, *TWENTY, "--steps", "400", address=cluster.address)
    study.wait_for(lambda: any((output / "store" / "checkpoints").glob("*/*/*.safetensors")), 200, process)
    os.kill(process.pid, how)
    code, _, _ = study.end(process, timeout=40)
    assert code == (130 if how is signal.SIGINT else -9)
    study.wait_for(nothing_left, 10)
    study.wait_for(lambda: not workers(before), 10)


@pytest.mark.timeout(200)
def test_a_study_that_gets_no_seat_says_so_in_one_line(cluster: Cluster, output: Path) -> None:
    """A cluster may grow: what it lacks is waited for."""
    code, out, err = study.run(
        output, *TWENTY, "--gpus-per-seat", "1", "--seat-timeout", "5", address=cluster.address
    )
    assert (code, len(err.splitlines())) == (1, 1), out + err
    assert err.startswith("error: No seat for 5 s: a seat needs 1 CPU, 1 GPU")
    assert "waiting for a GPU node" in out
    study.wait_for(nothing_left, 10)


@pytest.mark.timeout(300)
def test_a_study_that_fails_leaves_nothing_and_says_so(cluster: Cluster, output: Path) -> None:
    """Every lane fails (the base's weights vanish between the check and the training): the seats are given up
    before all configurations are spoilt."""
    process = study.start(output, *TWENTY, "--steps", "12", address=cluster.address)
    (weights,) = (output / "store" / "bases").glob("letters-base-*/model.safetensors")
    study.wait_for(lambda: any(output.glob("*/study.json")), 60, process)
    weights.unlink()
    code, out, err = study.end(process, timeout=250)
    assert code == 1, out + err
    assert "Seats died" in err.strip().splitlines()[-1]
    assert "Traceback" not in err
    study.wait_for(nothing_left, 10)
