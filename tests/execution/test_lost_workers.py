"""The death of a worker as a real Ray reports it, with actors that own each other as in Ray Train.

One actor stands for the controller of Ray Train; the actor that it creates stands for a worker.
"""

from __future__ import annotations

import os
import signal
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
import ray
import study
from machines import Machines
from ray import cloudpickle
from ray._private.state import actors
from ray.cluster_utils import Cluster
from ray.exceptions import RayActorError
from ray.util import placement_group
from ray.util.placement_group import placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from orchestrator.execution.broker.failure_policy import ExitKind
from orchestrator.execution.ray.private import remove_orphaned_placement_groups
from orchestrator.execution.ray.runtime import driver_node_affinity
from orchestrator.execution.trainers.exit_status import has_worker_on_lost_node
from orchestrator.execution.trainers.trainer import TrainerSpec
from orchestrator.execution.trainers.trainer_run import TrainerRun

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200)]


class Worker:
    def ping(self) -> None: ...

    def crash(self) -> None:
        os._exit(1)


class Controller:
    """An actor that creates a worker on another node or in a placement group of its own."""

    def start(self, group: bool) -> tuple[int, Any]:
        actor: Any = ray.remote(Worker)
        options: dict[str, Any] = {"num_cpus": 0, "num_gpus": 1}
        if group:
            self.group = placement_group([{"GPU": 1}])
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(self.group)
        self.worker = actor.options(**options).remote()
        ray.get(self.worker.ping.remote())
        return os.getpid(), self.worker


def controller(group: bool = False) -> tuple[Any, int, Any]:
    """Return a controller actor on the head node, its process id, and the handle of its worker."""
    actor: Any = ray.remote(Controller)
    made = actor.options(num_cpus=0, scheduling_strategy=driver_node_affinity()).remote()
    return made, *ray.get(made.start.remote(group))


def is_dead(actor: Any) -> bool:
    return bool(actors(actor._actor_id.hex())["State"] == "DEAD")


def groups() -> int:
    return sum(group["state"] != "REMOVED" for group in placement_group_table().values())


def test_a_worker_is_lost_with_its_node_and_not_when_it_crashes(machines: Machines) -> None:
    node = machines.add(gpus=2)
    crashing, _, worker = controller()
    other, *_ = controller()
    assert not has_worker_on_lost_node(crashing), "nothing has died"
    with pytest.raises(RayActorError):
        ray.get(worker.crash.remote())

    def known() -> bool:
        assert not has_worker_on_lost_node(crashing), "the node lives: a crash must count against its trainer"
        return is_dead(worker)

    study.wait_for(known)  # Ray learns the details of a death one by one
    assert known()
    machines.lose(node)
    assert has_worker_on_lost_node(other), "seen before Ray marks the node as dead"


def test_the_place_of_a_killed_controller_is_free_again(machines: Machines) -> None:
    machines.add(gpus=2)
    lives, *_ = controller(group=True)
    _dying, process, worker = controller(group=True)
    assert groups() == 2
    os.kill(process, signal.SIGKILL)
    study.wait_for(lambda: is_dead(worker))  # a worker ends with its controller

    def clear() -> int:
        remove_orphaned_placement_groups()
        return groups()

    study.wait_for(lambda: clear() == 1)
    study.wait_for(lambda: ray.available_resources().get("GPU") == 1)
    assert clear() == 1, "the group of a living controller stays"
    ray.kill(lives)
    study.wait_for(lambda: clear() == 0)


@pytest.mark.parametrize("begun", [False, True])
def test_a_killed_run_ends_and_leaves_no_controller(connected: Cluster, tmp_path: Path, begun: bool) -> None:
    """The run would wait for an hour for a GPU that no node has."""
    plan = TrainerSpec(
        lanes_per_trainer=1,
        gpus_per_worker=1.0,
        store=str(tmp_path),
        scratch=str(tmp_path),
        start_timeout=3600,
    )
    run = TrainerRun("trainer-0", plan, uuid.uuid4().hex)

    def controllers(*states: str) -> int:
        rows = [actor for actor in actors().values() if actor["ActorClassName"] == "TrainController"]
        return sum(row["State"] in states for row in rows)

    if begun:
        run.start()
        study.wait_for(lambda: groups() == 1)
        assert run.is_alive()
        run.kill()
    else:
        run.kill()
        run.start()
    run.join(study.HANG_SECONDS)
    assert run.exit_status is not None
    assert run.exit_status.kind is ExitKind.FAILED
    study.wait_for(lambda: not controllers("ALIVE", "PENDING_CREATION", "DEPENDENCIES_UNREADY"))

    def clear() -> int:
        remove_orphaned_placement_groups()
        return groups()

    study.wait_for(lambda: clear() == 0)
