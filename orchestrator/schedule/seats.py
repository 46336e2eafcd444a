"""The driver's side of the seats: starts them, replaces those that die, ends them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError

from orchestrator.schedule.cluster import Cluster
from orchestrator.schedule.seat import SeatHost, SeatPlan
from orchestrator.study.errors import BadInput

SEAT_MEMORY = 2 * 2**30  # bytes; a seat's worker, controller and cleaner hold about 1 GiB with a small model
DEATHS_ALLOWED = 3  # in a row, without a lane ending in between
LAST_SECONDS = 5.0  # what seats get to end by themselves


def how_many(cluster: Cluster, wanted: int | None, gpus_per_seat: float | None) -> tuple[int, float]:
    """Seats, and GPUs a seat: what was asked for if the cluster has it, else what it has room for.
    Raises BadInput for more than there is."""
    gpus = gpus_per_seat if gpus_per_seat is not None else (1.0 if cluster.gpus else 0.0)
    if gpus:
        room = int(cluster.gpus / gpus + 1e-9)
        unit = f"{gpus:g} GPU each and there are {cluster.gpus:g} GPUs"
    else:
        room = int(min(cluster.cpus, max(1.0, cluster.memory / SEAT_MEMORY)))
        unit = f"one CPU and 2 GiB each and there are {cluster.cpus:g} CPUs, {cluster.memory / 2**30:.0f} GiB"
    if room < 1 or (wanted or 0) > room:
        asked = f"--seats {wanted}" if wanted else f"--gpus-per-seat {gpus:g}"
        advice = f"take --seats {room}" if room else "leave --gpus-per-seat out, or join a cluster with GPUs"
        raise BadInput(f"{asked}: more than the cluster has room for ({unit}); {advice}.")
    return wanted or room, gpus


class Seats:
    """As many seats as `count`, kept so while lanes wait."""

    def __init__(
        self, plan: SeatPlan, count: int, namespace: str, broker: Any, say: Callable[[str], None]
    ) -> None:
        self.plan, self.count, self.namespace, self.broker, self.say = plan, count, namespace, broker, say
        self.running: dict[Any, tuple[str, Any]] = {}  # what `run` promised -> seat's name, its host
        self.started = 0
        self.deaths = 0
        self.began = time.monotonic()
        self.seen = False
        self.trouble = ""
        """Why no seat can be had; empty while one may still come."""

    def look(self, work_left: int, live: int) -> None:
        """Called now and then: `work_left` lanes wait or train, `live` seats have announced themselves."""
        if live:
            self.seen = True
        self._bury()
        while work_left and not self.trouble and len(self.running) < min(self.count, work_left):
            self._start()
        if not self.seen and time.monotonic() - self.began > self.plan.start_seconds:
            need = ", ".join(f"{value:g} {name}" for name, value in self.plan.resources.items())
            self.trouble = (
                f"No seat started within {self.plan.start_seconds:g} s: a seat needs {need}. "
                "Free or add them, or give the cluster longer with --seat-timeout."
            )

    def lane_ended(self) -> None:
        self.deaths = 0

    def end(self) -> None:
        """They were told that nothing more comes; those that do not go by themselves are killed."""
        if self.running:
            ray.wait(list(self.running), num_returns=len(self.running), timeout=LAST_SECONDS)
        for _, host in self.running.values():
            ray.kill(host)
        self.running.clear()

    def _start(self) -> None:
        name = f"seat-{self.started}"
        self.started += 1
        actor: Any = ray.remote(SeatHost)
        host = actor.options(num_cpus=0).remote()
        self.running[host.run.remote(name, self.plan, self.namespace)] = (name, host)

    def _bury(self) -> None:
        done, _ = (
            ray.wait(list(self.running), num_returns=len(self.running), timeout=0)
            if self.running
            else ([], [])
        )
        for promise in done:
            name, host = self.running.pop(promise)
            self.broker.seat_ended.remote(name)
            try:
                ray.get(promise)
            except (RayError, RuntimeError) as error:
                self.deaths += 1
                self.say(f"{name} died: {_reason(error)}")
                if self.deaths > DEATHS_ALLOWED:
                    self.trouble = (
                        f"Seats died {self.deaths} times in a row without ending a lane; see above."
                    )
            ray.kill(host)


def _reason(error: BaseException) -> str:
    """The last line that says something, of a chain of Ray's wrappers."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
