"""The driver's side of the seats: starts them, replaces those that die, ends them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError

from orchestrator.schedule.seat import SeatHost, SeatPlan

DEATHS_ALLOWED = 3  # in a row, without a lane finishing in between
LAST_SECONDS = 5.0  # what seats get to end by themselves


class Seats:
    """As many seats as `count`, kept so while lanes wait."""

    def __init__(
        self, plan: SeatPlan, count: int, namespace: str, broker: Any, say: Callable[[str], None]
    ) -> None:
        self.plan, self.count, self.namespace, self.broker, self.say = plan, count, namespace, broker, say
        self.running: dict[Any, tuple[str, Any]] = {}  # what `run` promised -> seat's name, its host
        self.started = 0
        self.deaths = 0
        self.without_since: float | None = None
        self.waited = False
        self.trouble = ""
        """Why no seat can be had; empty while one may still come."""

    def look(self, waiting: int, training: int, live: int) -> None:
        """Called now and then: lanes that wait and that train, seats that have announced themselves. The
        first seats start at once: known results may be replayed before a lane waits. A seat that has ended
        for want of work is replaced when lanes wait for longer than a moment."""
        self._bury()
        if not self.started or (waiting and self.waited):
            while not self.trouble and len(self.running) < self.count:
                self._start()
        self.waited = bool(waiting)
        if live or not (waiting or training):
            self.without_since = None
        elif self.without_since is None:
            self.without_since = time.monotonic()
        elif time.monotonic() - self.without_since > self.plan.start_seconds and not self.trouble:
            need = ", ".join(
                f"{value * self.plan.workers:g} {name}" for name, value in self.plan.resources.items()
            )
            self.trouble = (
                f"No seat for {self.plan.start_seconds:g} s: a seat needs {need}. "
                "Free or add them, or give the cluster longer with --seat-timeout."
            )

    def lane_finished(self) -> None:
        """A seat can train after all."""
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
                self.say(f"{name} died: {reason(error)}")
                if self.deaths > DEATHS_ALLOWED:
                    self.trouble = (
                        f"Seats died {self.deaths} times in a row without ending a lane; see above."
                    )
            ray.kill(host)


def reason(error: BaseException) -> str:
    """The last line that says something, of a chain of Ray's wrappers."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
