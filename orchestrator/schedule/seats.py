"""The driver's side of the seats: starts them, follows the nodes, replaces those that die, ends them."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from orchestrator.schedule import orphans
from orchestrator.schedule.cluster import Cluster, beside_the_driver, nodes_now
from orchestrator.schedule.seat import SeatHost, SeatPlan
from orchestrator.schedule.seat_end import How, SeatEnd, reason
from orchestrator.schedule.sight import Sight

NODES_SECONDS = 2.0  # how often the cluster is counted
ORPHAN_SECONDS = 20.0  # how long after a death its placement group is looked for
HOST_BYTES = 512 * 2**20  # a seat's host and controller: 247 MiB each, measured on Linux x86-64


@dataclass(frozen=True)
class Running:
    name: str
    host: Any


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
        self.running: dict[Any, Running] = {}
        """By what `run` promised."""
        self.spoken: frozenset[str] = frozenset()
        """Names of seats that have spoken to the broker: they have found their place."""
        self.started = 0
        self.without_since: float | None = None
        self.waited = False
        self.trouble = ""
        """Why no seat can be had; empty while one may still come."""
        self.nodes = Cluster(())
        """Those that can take a seat."""
        self.most: int | None = None
        """Seats whose hosts half of the memory of the driver's node is enough for; the other half is the
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
        now = time.monotonic()
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
        placed = [promise for promise, seat in self.running.items() if seat.name in self.spoken]
        if placed:
            ray.wait(placed, num_returns=len(placed), timeout=seconds)
        for seat in self.running.values():
            ray.kill(seat.host)
        self.running.clear()

    def lacking(self, waiting: int, training: int, free: int) -> int:
        """How many to start, or less than 0: no more than what waits can fill. `free`: as many as would find
        a place now, which is of interest where they follow the cluster, which others may use too."""
        lanes, running = self.plan.lanes, len(self.running)
        unplaced = sum(seat.name not in self.spoken for seat in self.running.values())
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
        self._count_hosts(here)
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

    def _count_hosts(self, here: str) -> None:
        """`here`: the driver's node, where all hosts are."""
        memory = next((node.memory for node in self.nodes.nodes if node.id == here), None)
        if memory is None or self.most is not None:  # it is about to go, or was counted before
            return
        self.most = max(1, int(memory / 2 / HOST_BYTES))
        if self.most < self.count:
            self.say(
                f"{self.most} seats at most, not {self.count}: each keeps {HOST_BYTES / 2**30:g} GiB on the "
                f"driver's node, half of whose {memory / 2**30:.0f} GiB is for that; take a larger one, or "
                "more --lanes-per-seat"
            )

    def _start(self) -> None:
        name = f"seat-{self.started}"
        self.started += 1
        actor: Any = ray.remote(SeatHost)
        # Train puts its controller beside the host: what dies with a node is the workers that were on it, and
        # nothing else.
        host = actor.options(num_cpus=0, scheduling_strategy=beside_the_driver()).remote()
        self.running[host.run.remote(name, self.plan, self.namespace)] = Running(name, host)

    def _end_stuck(self, names: Collection[str], now: float) -> None:
        """What hangs does not end by itself, and others could have its place."""
        for promise in [promise for promise, seat in self.running.items() if seat.name in names]:
            seat = self.running.pop(promise)
            ray.kill(seat.host)
            self._mourn(seat.name, SeatEnd(How.FAILED, "it hung, and was ended"), now)

    def _bury(self, now: float) -> None:
        done, _ = (
            ray.wait(list(self.running), num_returns=len(self.running), timeout=0)
            if self.running
            else ([], [])
        )
        for promise in done:
            seat = self.running.pop(promise)
            try:
                end: SeatEnd = ray.get(promise)
            except RayError as error:  # its host died
                end = SeatEnd(How.FAILED, reason(error))
            self._mourn(seat.name, end, now)
            ray.kill(seat.host)
        if now < self._orphans_until:
            orphans.remove_placement_groups()

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
