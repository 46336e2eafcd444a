"""Watches for AWS's notice that this spot machine will be taken away, and tells Ray.

    python -m orchestrator.cluster.node.spot_watcher

Open-source Ray polls no spot notice. This asks the machine's metadata service every few seconds and, at a
notice, has Ray drain this machine's node (reason: preemption) with the seconds that are left: seats there
save their lanes and give them back (docs/faults.md). It goes on while the service or Ray is away; a Ray that
is started again after the notice is drained too. On a machine that is not a spot one it only waits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass

from orchestrator.cluster.node import raylets
from orchestrator.cluster.node.imds import Away, Metadata, Notice
from orchestrator.cluster.node.raylets import Raylet
from orchestrator.cluster.node.supervisor import say

PAUSE_SECONDS = 5.0  # AWS asks for a look every five seconds
HURRIED_SECONDS = 1.0  # once there is a notice: a drain that failed is tried again, Ray may be starting


@dataclass(frozen=True)
class Drain:
    """One node to drain now."""

    raylet: Raylet
    seconds: int
    message: str


@dataclass(frozen=True)
class State:
    """What the watcher remembers between two looks."""

    drained: frozenset[str] = frozenset()
    """Ids of nodes whose draining Ray has accepted."""
    trouble: str = ""
    """The last that was said to be wrong: said once, not every five seconds."""


def due(state: State, notice: Notice | None, there: Iterable[Raylet], now: float) -> tuple[Drain, ...]:
    """What is to be drained: with a notice, each node of this machine for which Ray has not yet accepted it,
    also when the time named has passed and the machine is still there."""
    if notice is None:
        return ()
    seconds = notice.seconds_left(now)
    message = f"spot machine: AWS will {notice.action} it in {seconds} s"
    return tuple(Drain(raylet, seconds, message) for raylet in there if raylet.node_id not in state.drained)


def look(
    state: State,
    metadata: Metadata,
    there: Callable[[], Iterable[Raylet]],
    drain: Callable[[Raylet, int, str], str],
    say: Callable[[str], None],
) -> tuple[State, float]:
    """One look: the new state, and how long to wait before the next."""

    def troubled(line: str) -> State:
        if line and line != state.trouble:
            say(line)
        return State(drained, line)

    drained = state.drained
    try:
        notice = metadata.notice()
    except Away as away:
        return troubled(str(away)), PAUSE_SECONDS
    if notice is None:
        return troubled(""), PAUSE_SECONDS
    nodes = tuple(there())
    trouble = "" if nodes else "a notice, and no Ray on this machine"
    for job in due(state, notice, nodes, time.time()):
        refused = drain(job.raylet, job.seconds, job.message)
        if refused:
            trouble = refused
        else:
            drained |= {job.raylet.node_id}
            say(f"{job.message}: node {job.raylet.node_id[:12]} is drained")
    return troubled(trouble), HURRIED_SECONDS


def watch() -> None:
    """Looks until it is ended from outside."""
    metadata, state = Metadata(), State()
    say(f"watching {metadata.endpoint}")
    while True:
        state, pause = look(state, metadata, raylets.here, raylets.drain, say)
        time.sleep(pause)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        watch()
