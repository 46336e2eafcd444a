"""The driver's side of the trainers: starts them, follows the nodes, replaces those that die, ends them."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import Any

import ray

from orchestrator.execution.ray.runtime import Cluster, usable_nodes
from orchestrator.execution.trainers import placement_groups
from orchestrator.execution.trainers.exit_status import ExitKind, ExitStatus
from orchestrator.execution.trainers.storage_visibility import StorageVisibility
from orchestrator.execution.trainers.trainer import TrainerSpec
from orchestrator.execution.trainers.trainer_run import TrainerRun
from orchestrator.util import timeouts
from orchestrator.util.watched_clock import SuspendTolerantClock

CONTROLLER_BYTES = 256 * 2**20  # memory of a trainer's Train controller: 247 MiB measured on Linux x86-64


class TrainerPool:
    """As many trainers as `count`, kept so while lanes wait; where they `follow` the cluster, as many as its
    nodes have room for, `count` at the start. An autoscaler starts no node that nobody waits for: once one
    trainer has found its place there are as many as its nodes would have room for (`to_come`, with those that
    are there). Trainers that find no room wait, and hold nothing."""

    def __init__(
        self,
        spec: TrainerSpec,
        size: int,
        namespace: str,
        broker: Any,
        visibility: StorageVisibility,
        notify: Callable[[str], None],
        elastic: bool = False,
        autoscaler_capacity: int = 0,
    ) -> None:
        self.visibility = visibility
        self.spec, self.size, self.namespace, self.broker, self.notify = spec, size, namespace, broker, notify
        self.elastic, self.autoscaler_capacity = elastic, autoscaler_capacity
        self.running: dict[str, TrainerRun] = {}
        """The trainers that have started and not ended, by name."""
        self.placed: frozenset[str] = frozenset()
        """Names of trainers that have spoken to the broker: they have found their place."""
        self.num_started = 0
        self.clock = SuspendTolerantClock()
        self.no_trainer_since: float | None = None
        self.had_waiting_lanes = False
        self.failure_reason = ""
        """Why no trainer can be had; empty while one may still come."""
        self.cluster = Cluster(())
        """Those that can take a trainer."""
        self.max_trainers: int | None = None
        """How many trainers' controllers fit in half of the memory of the driver's node; the other half is the
        trials'. None before the nodes were counted."""
        self._last_node_count = self._cleanup_until = -float("inf")

    def update(
        self,
        waiting_lanes: int,
        training_lanes: int,
        live_trainers: int,
        placed: Collection[str] = (),
        hung: Collection[str] = (),
        abort_reason: str = "",
    ) -> None:
        """Called now and then: lanes that wait and that train, trainers that are there, the names of all that
        ever spoke and of those that hang, and why no more should be started, if so. The first trainers start at
        once: known results may be replayed before a lane waits. A trainer that has ended for want of work is
        replaced when lanes wait for longer than a moment."""
        now = self.clock()
        self.placed = frozenset(placed)
        self.failure_reason = self.failure_reason or abort_reason
        self._remove_ended_trainers(now)
        self._kill_hung_trainers(hung, now)
        if now - self._last_node_count > timeouts.NODE_COUNT_INTERVAL_SECONDS:
            self._last_node_count = now
            self._count_nodes()
        if not self.failure_reason and (not self.num_started or (waiting_lanes and self.had_waiting_lanes)):
            for _ in range(self.num_to_start(waiting_lanes, training_lanes, self._free_trainers())):
                self._start_trainer()
        self.had_waiting_lanes = bool(waiting_lanes)
        if live_trainers or not (waiting_lanes or training_lanes):
            self.no_trainer_since = None
        elif self.no_trainer_since is None:
            self.no_trainer_since = now
        elif now - self.no_trainer_since > self.spec.start_timeout and not self.failure_reason:
            need = ", ".join(
                f"{value * self.spec.workers_per_trainer:g} {name}"
                for name, value in self.spec.resources_per_worker.items()
            )
            self.failure_reason = (
                f"No trainer for {self.spec.start_timeout:g} s: a trainer needs {need}. "
                "Free or add them, or give the cluster longer with --trainer-timeout."
            )

    @property
    def waiting_for(self) -> str:
        """What must come before a trainer can start; empty when nothing must."""
        if self.cluster.trainer_capacity(self.spec.gpus_per_worker, self.spec.workers_per_trainer):
            return ""
        return "a GPU node" if self.spec.gpus_per_worker else "a node"

    def shut_down(self, timeout: float) -> None:
        """They were told that nothing more comes; those that do not go by themselves within `seconds` are
        killed, at once where they have found no place yet."""
        until = time.monotonic() + timeout
        for name, run in self.running.items():
            if name in self.placed:
                run.join(max(0.0, until - time.monotonic()))
        for run in self.running.values():
            run.kill()
        until = (
            time.monotonic() + timeouts.TRAINER_THREAD_JOIN_SECONDS
        )  # a thread that used Ray after its shutdown would fail
        for run in self.running.values():
            run.join(max(0.0, until - time.monotonic()))
        self.running.clear()

    def num_to_start(self, waiting_lanes: int, training_lanes: int, free_trainers: int) -> int:
        """How many to start, or less than 0: no more than what waits can fill. `free`: as many as would find
        a place now, which is of interest where they follow the cluster, which others may use too."""
        lanes, running = self.spec.lanes_per_trainer, len(self.running)
        unplaced = sum(name not in self.placed for name in self.running)
        wanted = -(-waiting_lanes // lanes) - unplaced if self.num_started else self.size
        if self.max_trainers is not None:
            wanted = min(wanted, self.max_trainers - running)
        if not self.elastic:
            return min(wanted, self.size - running)
        room = self.cluster.trainer_capacity(self.spec.gpus_per_worker, self.spec.workers_per_trainer)
        startable_now = min(wanted, room - running, free_trainers - unplaced)
        # An autoscaler's nodes cost something. One for the first trainer: where that cannot start, more are no
        # help. None for lanes that a trainer is about to take: it speaks before it has all of them.
        more = max(0, self.autoscaler_capacity - room) if self.placed else 0
        lanes_about_to_be_leased = max(0, (running - unplaced) * lanes - training_lanes)
        useful_later = min(wanted, -(-(waiting_lanes - lanes_about_to_be_leased) // lanes) - unplaced)
        least = 0 if running else 1  # it makes an autoscaler act
        return max(
            least, startable_now, min(useful_later, room + more - running, free_trainers + more - unplaced)
        )

    def _free_trainers(self) -> int:
        """Trainers that what nobody uses is enough for, about: the nodes are not looked at one by one."""
        free = ray.available_resources()
        units = [
            int(free.get(name, 0.0) / each + 1e-9) for name, each in self.spec.resources_per_worker.items()
        ]
        return min(units) // self.spec.workers_per_trainer

    def _count_nodes(self) -> None:
        """The nodes, and what has become of them since the last time."""
        before = {node.id for node in self.cluster.nodes}
        driver_node_id = ray.get_runtime_context().get_node_id()
        self.cluster = Cluster(self.visibility.visible_nodes(usable_nodes(), driver_node_id))
        self._limit_by_driver_memory(driver_node_id)
        now = {node.id for node in self.cluster.nodes}
        news = (len(now - before), "joined"), (len(before - now), "left")
        said = [f"{count} node{'s' if count > 1 else ''} {what}" for count, what in news if count]
        if before and said:
            self.notify(f"{', '.join(said)}: {len(now)} there")
        if self.waiting_for and (said or not before):
            self.notify(
                f"waiting for {self.waiting_for}, up to {self.spec.start_timeout:g} s (--trainer-timeout) "
                "while there is no trainer"
            )

    def _limit_by_driver_memory(self, driver_node_id: str) -> None:
        """Compute `most` once, from the memory of the driver's node, on which all Train controllers run.

        Args:
            here: the id of the driver's node.
        """
        memory = next((node.memory for node in self.cluster.nodes if node.id == driver_node_id), None)
        if memory is None or self.max_trainers is not None:  # it is about to go, or was counted before
            return
        self.max_trainers = max(1, int(memory / 2 / CONTROLLER_BYTES))
        if self.max_trainers < self.size:
            each = CONTROLLER_BYTES / 2**30
            self.notify(
                f"{self.max_trainers} trainers at most, not {self.size}: each keeps {each:g} GiB on the driver's node, "
                f"half of whose {memory / 2**30:.0f} GiB is for that; take a larger one, or more "
                "--lanes-per-trainer"
            )

    def _start_trainer(self) -> None:
        name = f"trainer-{self.num_started}"
        self.num_started += 1
        run = TrainerRun(name, self.spec, self.namespace)
        run.start()
        self.running[name] = run

    def _kill_hung_trainers(self, names: Collection[str], now: float) -> None:
        """What hangs does not end by itself, and others could have its place."""
        for name in [name for name in self.running if name in names]:
            self.running.pop(name).kill()
            self._handle_exit(name, ExitStatus(ExitKind.FAILED, "it hung, and was ended"), now)

    def _remove_ended_trainers(self, now: float) -> None:
        ended = {name: run.exit_status for name, run in self.running.items() if run.exit_status is not None}
        for name, end in ended.items():
            self.running.pop(name).kill()
            self._handle_exit(name, end, now)
        if now < self._cleanup_until:
            placement_groups.remove_orphaned_placement_groups()

    def _handle_exit(self, name: str, exit_status: ExitStatus, now: float) -> None:
        self.broker.trainer_exited.remote(name, exit_status.kind, exit_status.reason)
        if exit_status.kind is ExitKind.DONE:
            return
        self._cleanup_until = now + timeouts.PLACEMENT_GROUP_CLEANUP_SECONDS
        if exit_status.kind is ExitKind.PLACEMENT_TIMEOUT:
            self.notify(f"{name} found no room for {self.spec.start_timeout:g} s")
        elif exit_status.kind is ExitKind.NODE_LOST:
            self.notify(f"{name} was lost with a node; its lanes go on elsewhere")
        else:
            self.notify(f"{name} died: {exit_status.reason}")
