"""Studies that join an existing cluster leave nothing on it, and end nothing of others."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray
import study
from machines import is_alive, no_room
from ray._private.state import actors
from ray.cluster_utils import Cluster
from ray.exceptions import ActorUnavailableError
from ray.util import placement_group, placement_group_table, remove_placement_group
from ray.util.placement_group import PlacementGroup
from session_settings import make_session

from orchestrator.execution.broker import TrainerPlace, Updates
from orchestrator.execution.broker_actor import start_broker
from orchestrator.execution.ray_cluster import Cluster as Nodes
from orchestrator.execution.ray_cluster import usable_nodes
from orchestrator.execution.trainers import TrainerPool, TrainerRun, end_controllers
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
    assert "No trainer is left: all failed 2 times in a row" in err.strip().splitlines()[-1]
    assert "Traceback" not in err
    study.wait_for(lambda: not left())


@pytest.fixture
def group_of_another_driver(connected: Cluster) -> Iterator[str]:
    """Return the id of a placement group that another driver has made for a trainer."""
    other = f"""
        import ray
        from ray.util import placement_group
        ray.init({connected.address!r}, namespace="other", logging_level="ERROR")
        print(placement_group([{{"CPU": 1}}], lifetime="detached").id.hex())
    """
    command = [sys.executable, "-c", textwrap.dedent(other)]
    number = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]
    yield number
    remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(number)))


def test_the_group_of_a_trainer_that_died_before_it_had_a_place_is_removed(
    connected: Cluster, group_of_another_driver: str, tmp_path: Path
) -> None:
    session = make_session(3, 4, cluster=Nodes(usable_nodes(), "space", local=False))
    broker = start_broker(Store(tmp_path), "none")
    pool = TrainerPool(session, broker)
    pool.num_started = 3
    for slot in range(3):
        run = TrainerRun(f"trainer-{slot}", slot, session.cluster.nodes, session.settings, "space")
        pool.running[run.name] = run
    pool.running["trainer-0"].error = ActorUnavailableError("the controller died", None)
    trains, starts, requested, lost = (
        placement_group([session.settings.resources_per_worker]) for _ in range(4)
    )
    trial = placement_group([{"memory": 1}])
    pool.requests = [requested]

    def removed() -> set[str]:
        return {key for key, group in placement_group_table().items() if group["state"] == "REMOVED"}

    waiting = Counter({"waiting": 8, "leased": 4, "trainers": 1})
    places = {"trainer-1": TrainerPlace(("n0",), "", trains)}
    pool.update(Updates(counts=waiting, places=places), ["trainer-0"], may_start=False)
    assert lost.id.hex() not in removed(), "it could be that of trainer-2, which is starting"
    places["trainer-2"] = TrainerPlace(("n0",), "", starts)
    pool.update(Updates(counts=waiting, places=places), may_start=False)
    kept = {group.id.hex() for group in (trains, starts, requested, trial)} | {group_of_another_driver}
    assert lost.id.hex() in removed()
    assert not kept & removed()
    for group in (trains, starts, trial, *pool.requests):
        remove_placement_group(group)
    ray.kill(broker)


@ray.remote(num_cpus=0)
class TrainController:
    """An actor whose process has the name of Ray Train's controllers."""

    def pid(self) -> int:
        return os.getpid()


def controller_of_another(job_id: str, *words: str) -> subprocess.Popen[bytes]:
    """Start a process that looks like a Train controller with this job id.

    Args:
        job_id: The id of its Ray job.
        words: Words in the command line of its parent.
    """
    title = "ray::TrainController.run"
    child = [title, "-c", "import sys; sys.stdin.read()"]  # it ends with its standard input
    code = f"import subprocess, sys; sys.exit(subprocess.call({child}, executable=sys.executable))"
    command = [sys.executable, "-c", code, *words]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, env={"RAY_JOB_ID": job_id})
    study.wait_for(lambda: any(title in each.cmdline() for each in psutil.Process(process.pid).children()))
    return process


def test_only_the_controllers_of_this_driver_are_ended(connected: Cluster) -> None:
    """A driver of another cluster may have the same job id, since each cluster counts from 1."""
    environment = {"env_vars": {"A": "1"}}  # as Ray Train's, so that Ray starts a process for it
    controller = TrainController.options(runtime_env=environment).remote()
    ours = psutil.Process(ray.get(controller.pid.remote()))
    context = ray.get_runtime_context()
    job_id = context.get_job_id()
    assert ours.environ()["RAY_JOB_ID"] == job_id
    (node,) = [node for node in ray.nodes() if node["NodeID"] == context.get_node_id()]
    others = [
        controller_of_another(job_id),
        controller_of_another("02020202", f"--raylet_socket_name={node['RayletSocketName']}"),
    ]
    end_controllers()
    study.wait_for(lambda: not is_alive(ours))
    for other in others:
        other.communicate(timeout=60)
        assert other.returncode == 0, "its child was not killed"
