"""The driver's trainers: Ray Train runs that it starts where there is room, follows, and replaces.

A trainer runs in a slot. A slot whose trainers failed twice before their first step is closed.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from typing import Any

import psutil
import ray
from ray import PlacementGroupID
from ray.exceptions import RayActorError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.backend import BackendConfig
from ray.util import placement_group, placement_group_table, remove_placement_group
from ray.util.placement_group import PlacementGroup

from orchestrator.execution import private_ray
from orchestrator.execution.broker import ExitKind, TrainerPlace, Updates
from orchestrator.execution.ray_cluster import Node, format_ray_error, is_listening, usable_nodes
from orchestrator.execution.settings import Session, TrainerSettings
from orchestrator.execution.trainer_worker import train_loop_per_worker
from orchestrator.util import timeouts

MAX_SLOT_FAILURES = 2
"""Failures of a slot's trainers in a row, before a first step, after which the slot is closed."""
TRAIN_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how soon the end of a run is noticed
    "RAY_TRAIN_METRICS_ENABLED": "0",  # Prometheus metrics that nobody reads
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # one process per trainer; workers watch their node
}
"""Variables that Ray Train passes on to its controllers, unless the user has set them."""


@dataclass
class SingleWorkerConfig(BackendConfig):
    """Backend of a Train run with one worker, which needs no process group.

    A process group's TCP store would listen on all addresses of the machine without authentication.
    """

    backend: str = "none"
    """Read by `TorchTrainer`."""


class TrainerRun(threading.Thread):
    """A thread that runs one trainer, because `fit` blocks until the run ends.

    Args:
        name: The trainer's name, which the broker uses too.
        slot: The number of its slot.
        nodes: The nodes on which it may start.
        settings: The workers' number, resources and function.
        namespace: The Ray namespace of the study, which makes the name of the Train run unique.
    """

    def __init__(
        self, name: str, slot: int, nodes: Sequence[Node], settings: TrainerSettings, namespace: str
    ) -> None:
        super().__init__(name=name, daemon=True)
        self.slot, self.nodes, self.settings, self.namespace = slot, nodes, settings, namespace
        self.started_at = time.monotonic()
        self.error: Exception | None = None
        """The error with which the run ended."""

    def run(self) -> None:
        """Call `fit` of Ray Train's trainer."""
        try:
            self._make_trainer().fit()
        except Exception as error:
            self.error = error

    def _make_trainer(self) -> Any:
        settings = self.settings
        single = settings.options.workers_per_trainer == 1
        run_config: Any = RunConfig  # type checkers see the class of Train's first version
        # Ray Train retries nothing: the driver replaces a trainer. Older versions do not have all limits.
        limits = ("max_failures", "controller_failure_limit", "max_preemption_failures")
        none: dict[str, Any] = {each.name: 0 for each in fields(FailureConfig) if each.name in limits}
        return private_ray.trainer_class()(
            train_loop_per_worker,
            train_loop_config={"name": self.name, "settings": settings},
            torch_config=SingleWorkerConfig() if single else _process_group_config(settings),
            scaling_config=ScalingConfig(
                num_workers=settings.options.workers_per_trainer,
                use_gpu=settings.gpus_per_worker > 0,
                resources_per_worker=settings.resources_per_worker,
            ),
            run_config=run_config(
                name=f"{self.namespace}-{self.name}",
                storage_path=str(settings.scratch),
                failure_config=FailureConfig(**none),
            ),
        )


def _process_group_config(settings: TrainerSettings) -> BackendConfig:
    from ray.train.torch import TorchConfig

    backend = "nccl" if settings.uses_gpus else "gloo"
    return TorchConfig(backend, timeout_s=int(timeouts.LANE_START_SECONDS))


def classify_end(
    error: Exception | None,
    place: TrainerPlace | None,
    announced: tuple[ExitKind, str] | None,
    node_ids: Iterable[str] = (),
) -> tuple[ExitKind, str]:
    """Return why a trainer has ended, and the reason in one line.

    Args:
        error: The error that `fit` raised.
        place: Where the trainer was, if it has started.
        announced: What a worker told the broker before it ended.
        node_ids: The nodes on which a trainer without a place may have been starting.
    """
    if error is None:
        return ExitKind.DONE, ""
    failures = getattr(error, "worker_failures", None) or {0: getattr(error, "controller_failure", error)}
    causes = [getattr(each, "health_check_failure", each) for each in failures.values()]
    # After the death of one worker, the others fail in their next collective operation.
    failure = next((each for each in causes if isinstance(each, RayActorError)), causes[0])
    reason = format_ray_error(failure)
    if place is not None and any(map(is_lost, place.node_ids)):
        return ExitKind.LOST, "was lost with a node; its lanes continue elsewhere"
    if place is None and "Timeout" in type(failure).__name__:
        return ExitKind.LOST, "found no room"
    if place is None and any(map(is_lost, node_ids)):  # Ray Train raises errors of several kinds then
        return ExitKind.LOST, f"was lost with a node, or beside one, before it trained: {reason}"
    if announced is not None and not isinstance(failure, RayActorError):
        return announced
    if place is not None and "OutOfMemoryError" in repr(failure):
        reason = "its machine was short of memory, and Ray killed it"
    return ExitKind.FAILED if place is None else ExitKind.CRASHED, reason


def is_lost(node_id: str) -> bool:
    """Return whether a node is dead, draining or unreachable; Ray takes a while to notice that it is gone."""
    node = next((each for each in ray.nodes() if each["NodeID"] == node_id and each["Alive"]), None)
    if node is None or node_id in private_ray.draining_node_ids():
        return True
    return not is_listening(node["NodeManagerAddress"], node["NodeManagerPort"])


class TrainerPool:
    """Keep as many trainers as the waiting lanes can use and the nodes have room for.

    A pool of fixed size has up to `num_trainers` slots. An elastic pool has as many as fit on the nodes. If
    lanes wait for more trainers than have room, an autoscaler is asked for nodes.

    Args:
        session: The number of trainers, and the settings of each.
        broker: The handle of the broker's actor.
    """

    def __init__(self, session: Session, broker: Any) -> None:
        self.session, self.settings, self.broker = session, session.settings, broker
        self.notify = session.progress.notify
        self.running: dict[str, TrainerRun] = {}
        """The runs that have started and not ended, by trainer name."""
        self.places: Mapping[str, TrainerPlace] = {}
        """The broker's `Updates.places`: place of each trainer that has started and not ended."""
        self.failures: dict[int, list[str]] = {}
        """Slot -> failures in a row before a first step: the device, if it is known, and the reason."""
        self.requests: list[PlacementGroup] = []
        """Placement groups for trainers without room, on which an autoscaler acts."""
        self.has_left_group = False
        """True if a trainer without a place may have left its placement group behind."""
        self.num_started = 0
        self.is_shut_down = False
        self.has_started_one = False
        """True once a trainer has found a place."""
        self.no_trainer_since: float | None = None
        self.had_waiting_lanes = False
        self.failure_reason = ""
        """The reason why no trainer will start any more; empty while a trainer may still start."""
        self.cluster = session.cluster
        self._last_node_count = -float("inf")
        for name, value in TRAIN_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        start_timeout = str(max(60.0, self.settings.start_timeout))
        os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = start_timeout

    def list_ended(self) -> list[str]:
        """Return the trainers whose runs have ended, and which `update` has not removed yet."""
        return [name for name, run in self.running.items() if not run.is_alive()]

    def update(self, updates: Updates, ended: Sequence[str] = (), may_start: bool = True) -> None:
        """Start, replace and remove trainers. The driver calls this at every poll of the broker.

        The first trainers start at once, since known results may be replayed before a lane waits. Later ones
        start when lanes have waited at two polls in a row.

        Args:
            updates: The broker's answer.
            ended: Trainers that had ended before the broker was asked, so that `updates` has all they sent.
            may_start: False if no trainer shall start any more.
        """
        now = time.monotonic()
        self.places = updates.places
        self.has_started_one = self.has_started_one or bool(self.places)
        counts = updates.counts
        waiting, training = counts["waiting"], updates.num_training
        self.failure_reason = self.failure_reason or updates.abort_reason
        self._remove_ended_trainers(updates, ended)
        if self.has_left_group and not self._num_starting:
            self.has_left_group = False
            self._remove_left_groups()
        if now - self._last_node_count > timeouts.NODE_COUNT_INTERVAL_SECONDS:
            self._last_node_count = now
            self._count_nodes()
        self._check_start_timeout(not counts["trainers"] and bool(waiting or training), now)
        should_start = not self.num_started or (waiting and self.had_waiting_lanes)
        if should_start and may_start and not self.failure_reason:
            self._start(self._num_wanted(waiting, training))
        elif not waiting:
            self._request_nodes(0)
        self.had_waiting_lanes = bool(waiting)

    @property
    def open_slots(self) -> list[int]:
        """The numbers of the slots that are not closed."""
        limit = self._capacity if self.session.is_elastic else self.session.num_trainers
        closed = {slot for slot, failed in self.failures.items() if len(failed) >= MAX_SLOT_FAILURES}
        return [slot for slot in range(limit) if slot not in closed]

    @property
    def _num_starting(self) -> int:
        return sum(name not in self.places for name in self.running)

    @property
    def waiting_for(self) -> str:
        """The kind of node without which no trainer can start; empty if no node is missing."""
        if self._capacity:
            return ""
        return "a GPU node" if self.settings.gpus_per_worker else "a node"

    @property
    def _capacity(self) -> int:
        """The number of trainers that fit on the nodes, including those that are there."""
        settings = self.settings
        return self.cluster.trainer_capacity(settings.gpus_per_worker, settings.options.workers_per_trainer)

    def _num_wanted(self, waiting: int, training: int) -> int:
        """Return how many more trainers the lanes can use.

        Args:
            waiting: Number of lanes without a trainer.
            training: Number of lanes on trainers.
        """
        if not self.num_started:
            return self.session.num_trainers
        lanes = self.settings.expected_lanes
        starting = self._num_starting
        about_to_be_leased = max(0, (len(self.running) - starting) * lanes - training)
        return -(-(waiting - about_to_be_leased) // lanes) - starting

    def _start(self, wanted: int) -> None:
        """Start up to `wanted` trainers where there is room, and ask for nodes for the others."""
        if self.is_shut_down:
            return
        with_room = sum(placement_group_table(each)["state"] == "CREATED" for each in self.requests)
        free_slots = [slot for slot in self.open_slots if slot not in {r.slot for r in self.running.values()}]
        for slot in free_slots[: max(0, min(wanted, self._num_with_room() + with_room))]:
            name, namespace = f"trainer-{self.num_started}", self.session.cluster.namespace
            run = TrainerRun(name, slot, self.cluster.nodes, self.settings, namespace)
            run.start()
            self.num_started += 1
            self.running[name] = run
        if not self.session.cluster.local:  # a request could take the room of a trainer that starts
            latest = max((r.started_at for n, r in self.running.items() if n not in self.places), default=0.0)
            starts = time.monotonic() - latest < timeouts.TRAINER_PLACE_SECONDS
            self._request_nodes(0 if starts else wanted)

    def _num_with_room(self) -> int:
        """Return how many trainers the unused resources allow, without looking at single nodes."""
        if self.session.cluster.local and not self.num_started:
            return self._capacity  # Ray may not have reported its resources yet
        free = ray.available_resources()
        needs = self.settings.resources_per_worker.items()
        workers = min(int(free.get(name, 0.0) / need + 1e-9) for name, need in needs)
        return workers // self.settings.options.workers_per_trainer - self._num_starting

    def _request_nodes(self, more: int) -> None:
        """Ask an autoscaler for room for more trainers. A request is a placement group of this Ray job.

        Nodes cost money, so the first trainer must have started before room for more than one is requested.
        """
        total = max(0, more if self.has_started_one else min(more, 1))
        if not self.session.is_elastic:
            total = min(total, self.session.num_trainers - len(self.running))
        while len(self.requests) > total:
            remove_placement_group(self.requests.pop())
        while len(self.requests) < total:
            workers = self.settings.options.workers_per_trainer
            self.requests.append(placement_group([self.settings.resources_per_worker] * workers))

    def _check_start_timeout(self, is_missing: bool, now: float) -> None:
        """Give up when lanes have been without any trainer for longer than the start timeout."""
        if not is_missing:
            self.no_trainer_since = None
        elif self.no_trainer_since is None:
            self.no_trainer_since = now
        elif now - self.no_trainer_since > self.settings.start_timeout and not self.failure_reason:
            workers, resources = self.settings.options.workers_per_trainer, self.settings.resources_per_worker
            need = ", ".join(f"{workers * value:g} {name}" for name, value in resources.items())
            self.failure_reason = (
                f"No trainer for {self.settings.start_timeout:g} s: a trainer needs {need}. "
                "Free or add them, or give the cluster longer with --trainer-timeout."
            )

    def _count_nodes(self) -> None:
        """Read the cluster's nodes, and report those that joined or left."""
        before = {node.id for node in self.cluster.nodes}
        is_first = self.cluster is self.session.cluster
        self.cluster = replace(self.cluster, nodes=usable_nodes())
        now = {node.id for node in self.cluster.nodes}
        changes = (len(now - before), "joined"), (len(before - now), "left")
        parts = [f"{count} node{'s' if count > 1 else ''} {what}" for count, what in changes if count]
        if parts:
            self.failures.clear()  # other devices may take the slots
            self.notify(f"{', '.join(parts)}: {len(now)} there")
        if self.waiting_for and (parts or is_first):
            cpu = "; --device cpu would train on CPUs" if self.settings.uses_gpus else ""
            self.notify(
                f"waiting for {self.waiting_for}, up to {self.settings.start_timeout:g} s "
                f"(--trainer-timeout) while there is no trainer{cpu}"
            )

    def _remove_ended_trainers(self, updates: Updates, ended: Sequence[str]) -> None:
        """End the workers of hung trainers. Remove the trainers in `ended` from the pool and report them."""
        for name in updates.hung:
            self._end(name)
        for name in ended:
            run = self.running.pop(name)
            announced = updates.announced.get(name)
            if name in updates.hung:
                announced = ExitKind.FAILED, "it hung, and was ended"
            nodes = {node.id for node in (*run.nodes, *self.cluster.nodes)}
            end = classify_end(run.error, self.places.get(name), announced, nodes)
            self._handle_end(run, *end, updates)

    def _end(self, name: str) -> None:
        """End a trainer's workers. Train then ends its run, because `max_failures` is 0."""
        if name in self.places:
            remove_placement_group(self.places[name].placement_group)

    def _remove_left_groups(self) -> None:
        """Remove the placement groups that trainers without a place have left behind.

        Ray Train leaves a group behind if the trainer's controller died. The method must not be called while
        a trainer is starting: the group of such a trainer is unknown, and would be removed as well.

        A group is one of this driver's trainers if its id ends in the driver's Ray job id and it asks for a
        trainer's resources. The groups of Tune's trials ask for memory only.
        """
        job_id, resources = ray.get_runtime_context().get_job_id(), self.settings.resources_per_worker
        used = {group.id for group in (*self.requests, *(p.placement_group for p in self.places.values()))}
        for number, group in placement_group_table().items():
            found = PlacementGroup(PlacementGroupID.from_hex(number))
            is_ours = number.endswith(job_id) and group["bundles"][0].keys() == resources.keys()
            if is_ours and found.id not in used and group["state"] != "REMOVED":
                remove_placement_group(found)

    def _handle_end(self, run: TrainerRun, kind: ExitKind, reason: str, updates: Updates) -> None:
        if kind is not ExitKind.DONE:
            self._end(run.name)  # Train leaves its placement group if its controller died
            self.has_left_group = self.has_left_group or run.name not in self.places
        exited = self.broker.trainer_exited.remote(run.name, kind, reason)
        num_held = ray.get(exited, timeout=timeouts.TRAINER_SILENT_SECONDS)
        steps = updates.steps_taken
        if steps.get(run.name):
            self.failures.pop(run.slot, None)
        elif kind in (ExitKind.CRASHED, ExitKind.FAILED):
            # A trainer that crashes with lanes may do so because of them, unless other trainers train.
            others_train = any(steps.get(name) for name in self.running)
            if kind is ExitKind.FAILED or not num_held or others_train:
                place = self.places.get(run.name)
                failed = self.failures.setdefault(run.slot, [])
                failed.append(f"{place.device}: {reason}" if place else reason)
        if kind is not ExitKind.DONE:
            self.notify(f"{run.name} {'' if kind is ExitKind.LOST else 'died: '}{reason}")
        self._close_slot(run.slot)

    def _close_slot(self, slot: int) -> None:
        """Report a slot that has failed too often, and end the study if none is left."""
        failed = self.failures.get(slot, [])
        if len(failed) < MAX_SLOT_FAILURES or self.failure_reason:
            return
        self.notify(
            f"a trainer's slot is closed, since {len(failed)} trainers in a row failed there before their "
            f"first step, the last on {failed[-1]}"
        )
        if not self.open_slots:
            last = "; ".join(dict.fromkeys(each[-1] for each in self.failures.values() if each))
            self.failure_reason = (
                f"No trainer is left: all failed {MAX_SLOT_FAILURES} times in a row before their first step "
                f"({last}). Run the command again when that is mended."
            )

    def shut_down(self) -> None:
        """End all trainers. No lane is lost: those that have not ended resume from their checkpoints."""
        self.is_shut_down = True
        self._request_nodes(0)
        runs = dict(self.running)  # the monitor's thread may still be in `update`
        for name in runs:
            self._end(name)
        deadline = time.monotonic() + timeouts.TRAINER_THREAD_JOIN_SECONDS
        while any(run.is_alive() for run in runs.values()) and time.monotonic() < deadline:
            end_controllers()  # also those that have only just started
            for run in runs.values():
                run.join(0.2)


def end_controllers() -> None:
    """Kill the `TrainController` processes of this driver. Ray Train runs them on the driver's node.

    A trainer that is starting has not announced its placement group, so it can be ended only by its
    controller. A `TrainerRun` thread that still waits for its controller would crash this process when Ray is
    shut down.

    A process is this driver's if it has the driver's Ray job id and its parent is the driver's raylet. The
    job id alone is not enough: every Ray cluster on this machine counts its jobs from 1.
    """
    context = ray.get_runtime_context()
    job_id, node_id = context.get_job_id(), context.get_node_id()
    sockets = [node["RayletSocketName"] for node in ray.nodes() if node["NodeID"] == node_id]
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            is_controller = " ".join(process.cmdline()).startswith("ray::TrainController")
            if is_controller and process.environ().get("RAY_JOB_ID") == job_id:
                raylet = " ".join(psutil.Process(process.ppid()).cmdline())
                if any(socket in raylet for socket in sockets):
                    process.kill()
