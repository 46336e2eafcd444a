"""The driver's side of the seats: starts them, follows the nodes, replaces those that die, ends them."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import Any

import ray

from orchestrator.execution.ray.runtime import Cluster, nodes_now
from orchestrator.execution.trainers import placement_groups
from orchestrator.execution.trainers.exit_status import How, SeatEnd
from orchestrator.execution.trainers.storage_visibility import Sight
from orchestrator.execution.trainers.trainer import SeatPlan
from orchestrator.execution.trainers.trainer_run import SeatRun
from orchestrator.util.watched_clock import WatchedClock

NODES_SECONDS = 2.0  # how often the cluster is counted
KILLED_SECONDS = 2.0  # how long all threads of killed runs together may take to end
ORPHAN_SECONDS = 20.0  # how long after a death its placement group is looked for
CONTROLLER_BYTES = 256 * 2**20  # memory of a seat's Train controller: 247 MiB measured on Linux x86-64


class Seats:
    """As many seats as `count`, kept so while lanes wait; where they `follow` the cluster, as many as its
    nodes have room for, `count` at the start. An autoscaler starts no node that nobody waits for: once one
    seat has found its place there are as many as its nodes would have room for (`to_come`, with those that
    are there). Seats that find no room wait, and hold nothing."""

    def __init__(
        self,
        plan: SeatPlan,
        count: int,
        namespace: str,
        broker: Any,
        sight: Sight,
        say: Callable[[str], None],
        follow: bool = False,
        to_come: int = 0,
    ) -> None:
        self.sight = sight
        self.plan, self.count, self.namespace, self.broker, self.say = plan, count, namespace, broker, say
        self.follow, self.to_come = follow, to_come
        self.running: dict[str, SeatRun] = {}
        """The seats that have started and not ended, by name."""
        self.spoken: frozenset[str] = frozenset()
        """Names of seats that have spoken to the broker: they have found their place."""
        self.started = 0
        self.clock = WatchedClock()
        self.without_since: float | None = None
        self.waited = False
        self.trouble = ""
        """Why no seat can be had; empty while one may still come."""
        self.nodes = Cluster(())
        """Those that can take a seat."""
        self.most: int | None = None
        """How many seats' controllers fit in half of the memory of the driver's node; the other half is the
        trials'. None before the nodes were counted."""
        self._counted = self._orphans_until = -float("inf")

    def look(
        self,
        waiting: int,
        training: int,
        live: int,
        spoken: Collection[str] = (),
        stuck: Collection[str] = (),
        hopeless: str = "",
    ) -> None:
        """Called now and then: lanes that wait and that train, seats that are there, the names of all that
        ever spoke and of those that hang, and why no more should be started, if so. The first seats start at
        once: known results may be replayed before a lane waits. A seat that has ended for want of work is
        replaced when lanes wait for longer than a moment."""
        now = self.clock()
        self.spoken = frozenset(spoken)
        self.trouble = self.trouble or hopeless
        self._bury(now)
        self._end_stuck(stuck, now)
        if now - self._counted > NODES_SECONDS:
            self._counted = now
            self._count()
        if not self.trouble and (not self.started or (waiting and self.waited)):
            for _ in range(self.lacking(waiting, training, self._free())):
                self._start()
        self.waited = bool(waiting)
        if live or not (waiting or training):
            self.without_since = None
        elif self.without_since is None:
            self.without_since = now
        elif now - self.without_since > self.plan.start_seconds and not self.trouble:
            need = ", ".join(
                f"{value * self.plan.workers:g} {name}" for name, value in self.plan.resources.items()
            )
            self.trouble = (
                f"No seat for {self.plan.start_seconds:g} s: a seat needs {need}. "
                "Free or add them, or give the cluster longer with --seat-timeout."
            )

    @property
    def waits_for(self) -> str:
        """What must come before a seat can start; empty when nothing must."""
        if self.nodes.room(self.plan.gpus, self.plan.workers):
            return ""
        return "a GPU node" if self.plan.gpus else "a node"

    def end(self, seconds: float) -> None:
        """They were told that nothing more comes; those that do not go by themselves within `seconds` are
        killed, at once where they have found no place yet."""
        until = time.monotonic() + seconds
        for name, run in self.running.items():
            if name in self.spoken:
                run.join(max(0.0, until - time.monotonic()))
        for run in self.running.values():
            run.kill()
        until = time.monotonic() + KILLED_SECONDS  # a thread that used Ray after its shutdown would fail
        for run in self.running.values():
            run.join(max(0.0, until - time.monotonic()))
        self.running.clear()

    def lacking(self, waiting: int, training: int, free: int) -> int:
        """How many to start, or less than 0: no more than what waits can fill. `free`: as many as would find
        a place now, which is of interest where they follow the cluster, which others may use too."""
        lanes, running = self.plan.lanes, len(self.running)
        unplaced = sum(name not in self.spoken for name in self.running)
        wanted = -(-waiting // lanes) - unplaced if self.started else self.count
        if self.most is not None:
            wanted = min(wanted, self.most - running)
        if not self.follow:
            return min(wanted, self.count - running)
        room = self.nodes.room(self.plan.gpus, self.plan.workers)
        now = min(wanted, room - running, free - unplaced)
        # An autoscaler's nodes cost something. One for the first seat: where that cannot start, more are no
        # help. None for lanes that a seat is about to take: it speaks before it has all of them.
        more = max(0, self.to_come - room) if self.spoken else 0
        untaken = max(0, (running - unplaced) * lanes - training)
        later = min(wanted, -(-(waiting - untaken) // lanes) - unplaced)
        least = 0 if running else 1  # it makes an autoscaler act
        return max(least, now, min(later, room + more - running, free + more - unplaced))

    def _free(self) -> int:
        """Seats that what nobody uses is enough for, about: the nodes are not looked at one by one."""
        free = ray.available_resources()
        units = [int(free.get(name, 0.0) / each + 1e-9) for name, each in self.plan.resources.items()]
        return min(units) // self.plan.workers

    def _count(self) -> None:
        """The nodes, and what has become of them since the last time."""
        before = {node.id for node in self.nodes.nodes}
        here = ray.get_runtime_context().get_node_id()
        self.nodes = Cluster(self.sight.of(nodes_now(), here))
        self._count_controllers(here)
        now = {node.id for node in self.nodes.nodes}
        news = (len(now - before), "joined"), (len(before - now), "left")
        said = [f"{count} node{'s' if count > 1 else ''} {what}" for count, what in news if count]
        if before and said:
            self.say(f"{', '.join(said)}: {len(now)} there")
        if self.waits_for and (said or not before):
            self.say(
                f"waiting for {self.waits_for}, up to {self.plan.start_seconds:g} s (--seat-timeout) "
                "while there is no seat"
            )

    def _count_controllers(self, here: str) -> None:
        """Compute `most` once, from the memory of the driver's node, on which all Train controllers run.

        Args:
            here: the id of the driver's node.
        """
        memory = next((node.memory for node in self.nodes.nodes if node.id == here), None)
        if memory is None or self.most is not None:  # it is about to go, or was counted before
            return
        self.most = max(1, int(memory / 2 / CONTROLLER_BYTES))
        if self.most < self.count:
            each = CONTROLLER_BYTES / 2**30
            self.say(
                f"{self.most} seats at most, not {self.count}: each keeps {each:g} GiB on the driver's node, "
                f"half of whose {memory / 2**30:.0f} GiB is for that; take a larger one, or more "
                "--lanes-per-seat"
            )

    def _start(self) -> None:
        name = f"seat-{self.started}"
        self.started += 1
        run = SeatRun(name, self.plan, self.namespace)
        run.start()
        self.running[name] = run

    def _end_stuck(self, names: Collection[str], now: float) -> None:
        """What hangs does not end by itself, and others could have its place."""
        for name in [name for name in self.running if name in names]:
            self.running.pop(name).kill()
            self._mourn(name, SeatEnd(How.FAILED, "it hung, and was ended"), now)

    def _bury(self, now: float) -> None:
        ended = {name: run.end for name, run in self.running.items() if run.end is not None}
        for name, end in ended.items():
            self.running.pop(name).kill()
            self._mourn(name, end, now)
        if now < self._orphans_until:
            placement_groups.remove_placement_groups()

    def _mourn(self, name: str, end: SeatEnd, now: float) -> None:
        self.broker.seat_ended.remote(name, end.how, end.reason)
        if end.how is How.DONE:
            return
        self._orphans_until = now + ORPHAN_SECONDS
        if end.how is How.NO_ROOM:
            self.say(f"{name} found no room for {self.plan.start_seconds:g} s")
        elif end.how is How.LOST:
            self.say(f"{name} was lost with a node; its lanes go on elsewhere")
        else:
            self.say(f"{name} died: {end.reason}")
