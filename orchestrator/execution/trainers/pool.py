"""The driver's pool of trainers: it starts them, follows the cluster's nodes and replaces dead ones."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray

from orchestrator.execution.broker.failure_policy import ExitKind
from orchestrator.execution.ray import private
from orchestrator.execution.ray.runtime import (
    CONTROLLER_BYTES,
    CONTROLLERS_SHARE,
    Cluster,
    driver_node_gib,
    usable_nodes,
)
from orchestrator.execution.settings import Session
from orchestrator.execution.trainers.exit_status import ExitStatus
from orchestrator.execution.trainers.storage_visibility import StorageVisibility
from orchestrator.execution.trainers.trainer_run import TrainerRun
from orchestrator.util import timeouts

MAX_SHOWN_DEVICES = 3
"""Number of excluded devices that the error line of a study names."""


@dataclass(frozen=True)
class BrokerState:
    """What one poll of the broker says about lanes and trainers; the defaults describe a new broker."""

    waiting: int = 0
    """Number of lanes without a trainer."""
    training: int = 0
    """Number of lanes on trainers."""
    live_trainers: int = 0
    """Number of trainers that call the broker for lanes."""
    placed: frozenset[str] = frozenset()
    """Names of all trainers that have ever called the broker, which means that Ray has placed them."""
    hung: Collection[str] = ()
    """Names of hung trainers."""
    excluded_devices: Mapping[str, str] = field(default_factory=dict)
    """Device that no trainer may use -> reason; see `broker/devices.py`."""
    holders: frozenset[str] = frozenset()
    """Names of the trainers that keep excluded devices reserved and train nothing."""
    abort_reason: str = ""
    """The reason to start no more trainers; empty while trainers should be started."""


class TrainerPool:
    """Keep as many trainers as the waiting lanes can use.

    A pool of fixed size has up to `num_trainers` trainers. An elastic pool has as many trainers as fit on the
    nodes. With an autoscaler, once the first trainer is placed, an elastic pool also requests trainers for
    nodes that may still be started, because an autoscaler starts a node only for waiting requests. Trainers
    without a place wait and reserve nothing.

    Args:
        session: The number of trainers, and the settings of each.
        broker: The handle of the broker's actor.
    """

    def __init__(self, session: Session, broker: Any) -> None:
        self.session, self.settings, self.broker = session, session.settings, broker
        self.notify = session.progress.notify
        self.visibility = StorageVisibility(self.settings.scratch, session.cluster.nodes, self.notify)
        self.running: dict[str, TrainerRun] = {}
        """The runs that have started and not ended, by trainer name."""
        self.placed: frozenset[str] = frozenset()
        """Names of trainers that have called the broker, which means that Ray has placed them."""
        self.holders: frozenset[str] = frozenset()
        """Names of the running trainers that keep excluded devices reserved and train nothing."""
        self.excluded_devices: Mapping[str, str] = {}
        self.num_started = 0
        self.no_trainer_since: float | None = None
        self.had_waiting_lanes = False
        self.failure_reason = ""
        """The reason why no trainer will start any more; empty while a trainer may still start."""
        self.cluster = Cluster(())
        """The nodes that can take a trainer."""
        self.max_trainers: int | None = None
        """Number of Train controllers that fit in half of the memory of the driver's node; trials use the
        other half. None until the nodes have been counted."""
        self._last_node_count = self._cleanup_until = -float("inf")

    def update(self, state: BrokerState) -> None:
        """Start, replace and remove trainers. The driver calls this at every poll of the broker.

        The first trainers start at once, since known results may be replayed before a lane waits. Later ones
        start when lanes have waited at two polls in a row.
        """
        now = time.monotonic()
        waiting, training = state.waiting, state.training
        self._note_excluded(state)
        self.failure_reason = self.failure_reason or state.abort_reason
        self._remove_ended_trainers(state.hung, now)
        if now - self._last_node_count > timeouts.NODE_COUNT_INTERVAL_SECONDS:
            self._last_node_count = now
            self._count_nodes()
        self._check_start_timeout(not state.live_trainers and bool(waiting or training), now)
        should_start = not self.num_started or (waiting and self.had_waiting_lanes)
        if should_start and not self.failure_reason:
            for _ in range(self.num_to_start(waiting, training, self._free_trainers())):
                run = TrainerRun(f"trainer-{self.num_started}", self.settings, self.session.cluster.namespace)
                run.start()
                self.num_started += 1
                self.running[run.name] = run
        self.had_waiting_lanes = bool(waiting)

    def _note_excluded(self, state: BrokerState) -> None:
        """Store which trainers are placed and which keep excluded devices reserved; report new devices."""
        self.placed = state.placed | state.holders
        self.holders = state.holders & self.running.keys()
        for device, reason in state.excluded_devices.items():
            if device not in self.excluded_devices:
                self.notify(f"{device} is left out of this study: {reason}")
        self.excluded_devices = {**self.excluded_devices, **state.excluded_devices}

    def _check_start_timeout(self, is_missing: bool, now: float) -> None:
        """Give up when lanes have been without any trainer for longer than the start timeout.

        If all devices are excluded and no node can join, give up at once.
        """
        is_left_out = bool(self.holders) and len(self.holders) == len(self.running)
        if not is_missing:
            self.no_trainer_since = None
        elif is_left_out and self.session.cluster.local and not self._replacements_with_room():
            self.failure_reason = self.failure_reason or (
                f"No device is left to train on. {self._format_excluded()}Run the command again when one "
                "works."
            )
        elif self.no_trainer_since is None:
            self.no_trainer_since = now
        elif now - self.no_trainer_since > self.settings.start_timeout and not self.failure_reason:
            workers, resources = self.settings.options.workers_per_trainer, self.settings.resources_per_worker
            need = ", ".join(f"{workers * value:g} {name}" for name, value in resources.items())
            self.failure_reason = (
                f"No trainer for {self.settings.start_timeout:g} s: a trainer needs {need}. "
                f"{self._format_excluded()}"
                "Free or add them, or give the cluster longer with --trainer-timeout."
            )

    def _format_excluded(self) -> str:
        """Return a sentence for the first excluded devices, and the number of the others; empty if none."""
        shown = [f"{device}: {reason}" for device, reason in self.excluded_devices.items()]
        more = f"; and {len(shown) - MAX_SHOWN_DEVICES} more" if len(shown) > MAX_SHOWN_DEVICES else ""
        return f"Left out: {'; '.join(shown[:MAX_SHOWN_DEVICES])}{more}. " if shown else ""

    def _replacements_with_room(self) -> int:
        """Return how many of the trainers on excluded devices can be replaced elsewhere."""
        return min(len(self.holders), max(0, self._capacity - len(self.running)))

    @property
    def _capacity(self) -> int:
        """The number of trainers that fit on the nodes, including those that are there."""
        settings = self.settings
        return self.cluster.trainer_capacity(settings.gpus_per_worker, settings.options.workers_per_trainer)

    @property
    def waiting_for(self) -> str:
        """The kind of node without which no trainer can start; empty if no node is missing."""
        if self._capacity:
            return ""
        return "a GPU node" if self.settings.gpus_per_worker else "a node"

    def shut_down(self, timeout: float, join_timeout: float = timeouts.TRAINER_THREAD_JOIN_SECONDS) -> None:
        """End all trainers, after the broker was told that no more lanes come.

        Args:
            timeout: Seconds that placed trainers get to end by themselves before they are killed.
            join_timeout: Seconds that all threads of killed trainers together get to end.
        """
        deadline = time.monotonic() + timeout
        for name, run in self.running.items():
            if name in self.placed - self.holders:
                run.join(max(0.0, deadline - time.monotonic()))
        for run in self.running.values():
            run.kill()
        # Ray may crash this process if a thread waits for a result while Ray is shut down.
        deadline = time.monotonic() + join_timeout
        for run in self.running.values():
            run.join(max(0.0, deadline - time.monotonic()))
        self.running.clear()

    def num_to_start(self, waiting: int, training: int, free: int) -> int:
        """Return how many trainers to start; 0 or less for none.

        Args:
            waiting: Number of lanes without a trainer.
            training: Number of lanes on trainers.
            free: Number of trainers that would find a place now. An elastic pool respects this number,
                because others may use the cluster too.
        """
        lanes, running, holders = self.settings.expected_lanes, len(self.running), len(self.holders)
        unplaced = sum(name not in self.placed for name in self.running)
        wanted = -(-waiting // lanes) - unplaced if self.num_started else self.session.num_trainers
        if self.max_trainers is not None:
            wanted = min(wanted, self.max_trainers - running)
        least = 0 if running > holders else 1  # one waiting trainer makes an autoscaler act
        if not self.session.is_elastic:
            possible = self.session.num_trainers - running + self._replacements_with_room()
            return max(least if holders else 0, min(wanted, possible))
        room = self._capacity
        startable_now = min(wanted, room - running, free - unplaced)
        # An autoscaler's nodes cost money. So the first trainer must be placed before more nodes are
        # requested, and no node is requested for lanes that a placed trainer is about to lease.
        more = max(0, self.session.autoscaler_capacity - room) if self.placed else 0
        about_to_be_leased = max(0, (running - holders - unplaced) * lanes - training)
        useful_later = min(wanted, -(-(waiting - about_to_be_leased) // lanes) - unplaced)
        startable_later = min(useful_later, room + more - running, free + more - unplaced)
        return max(least, startable_now, startable_later)

    def _free_trainers(self) -> int:
        """Estimate how many trainers the unused resources allow, without looking at single nodes."""
        free = ray.available_resources()
        needs = self.settings.resources_per_worker.items()
        workers = min(int(free.get(name, 0.0) / need + 1e-9) for name, need in needs)
        return workers // self.settings.options.workers_per_trainer

    def _count_nodes(self) -> None:
        """Read the cluster's nodes, and report those that joined or left."""
        before = {node.id for node in self.cluster.nodes}
        driver_node_id = ray.get_runtime_context().get_node_id()
        self.cluster = Cluster(self.visibility.visible_nodes(usable_nodes(), driver_node_id))
        self._limit_by_driver_memory(driver_node_id)
        now = {node.id for node in self.cluster.nodes}
        changes = (len(now - before), "joined"), (len(before - now), "left")
        parts = [f"{count} node{'s' if count > 1 else ''} {what}" for count, what in changes if count]
        if before and parts:
            self.notify(f"{', '.join(parts)}: {len(now)} there")
        if self.waiting_for and (parts or not before):
            self.notify(
                f"waiting for {self.waiting_for}, up to {self.settings.start_timeout:g} s "
                "(--trainer-timeout) while there is no trainer"
            )

    def _limit_by_driver_memory(self, driver_node_id: str) -> None:
        """Set `max_trainers` once, by the memory of the driver's node, where all Train controllers run."""
        memory = next((node.memory for node in self.cluster.nodes if node.id == driver_node_id), None)
        if memory is None or self.max_trainers is not None:  # the node is draining, or was counted before
            return
        self.max_trainers = max(1, int(memory * CONTROLLERS_SHARE / CONTROLLER_BYTES))
        wanted = self.session.num_trainers
        if self.session.is_elastic:
            wanted = max(wanted, self.session.autoscaler_capacity)
        if self.max_trainers < wanted:
            self.notify(
                f"{self.max_trainers} trainers at most, not {wanted}: each keeps "
                f"{CONTROLLER_BYTES / 2**30:g} GiB on the driver's node for its Train controller, and the "
                f"controllers may use half of the node's {memory / 2**30:.0f} GiB; take a node with "
                f"{driver_node_gib(wanted):g} GiB for Ray, or more --lanes-per-trainer"
            )

    def _remove_ended_trainers(self, hung: Collection[str], now: float) -> None:
        """Remove trainers that ended, and kill those that hang: they do not end by themselves."""
        for name, run in list(self.running.items()):
            exit_status = run.exit_status
            if exit_status is None and name in hung:
                exit_status = ExitStatus(ExitKind.FAILED, "it hung, and was ended")
            if exit_status is not None:
                self.running.pop(name).kill()
                self._handle_exit(name, exit_status, now)
        if now < self._cleanup_until:
            private.remove_orphaned_placement_groups()

    def _handle_exit(self, name: str, exit_status: ExitStatus, now: float) -> None:
        self.broker.trainer_exited.remote(name, exit_status.kind, exit_status.reason)
        if exit_status.kind is ExitKind.DONE:
            return
        self._cleanup_until = now + timeouts.PLACEMENT_GROUP_CLEANUP_SECONDS
        if exit_status.kind is ExitKind.PLACEMENT_TIMEOUT:
            self.notify(f"{name} found no room for {self.settings.start_timeout:g} s")
        elif exit_status.kind is ExitKind.NODE_LOST:
            self.notify(f"{name} was lost with a node; its lanes continue elsewhere")
        else:
            self.notify(f"{name} died: {exit_status.reason}")
