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
from orchestrator.cluster.node.imds import InterruptionNotice, MetadataClient, MetadataUnavailable
from orchestrator.cluster.node.raylets import Raylet
from orchestrator.cluster.node.supervisor import log_line
from orchestrator.util import timeouts


@dataclass(frozen=True)
class DrainRequest:
    """One node to drain now."""

    raylet: Raylet
    seconds_left: int
    message: str


@dataclass(frozen=True)
class WatcherState:
    """What the watcher remembers between two looks."""

    drained_node_ids: frozenset[str] = frozenset()
    """Ids of nodes whose draining Ray has accepted."""
    last_problem: str = ""
    """The last that was said to be wrong: said once, not every five seconds."""


def plan_drains(
    state: WatcherState, notice: InterruptionNotice | None, local_raylets: Iterable[Raylet], now: float
) -> tuple[DrainRequest, ...]:
    """What is to be drained: with a notice, each node of this machine for which Ray has not yet accepted it,
    also when the time named has passed and the machine is still there.
    """
    if notice is None:
        return ()
    seconds = notice.seconds_left(now)
    message = f"spot machine: AWS will {notice.action} it in {seconds} s"
    return tuple(
        DrainRequest(raylet, seconds, message)
        for raylet in local_raylets
        if raylet.node_id not in state.drained_node_ids
    )


def poll(
    state: WatcherState,
    metadata: MetadataClient,
    find_raylets: Callable[[], Iterable[Raylet]],
    drain: Callable[[Raylet, int, str], str],
    log_line: Callable[[str], None],
) -> tuple[WatcherState, float]:
    """One look: the new state, and how long to wait before the next."""

    def report_problem(problem: str) -> WatcherState:
        if problem and problem != state.last_problem:
            log_line(problem)
        return WatcherState(drained_node_ids, problem)

    drained_node_ids = state.drained_node_ids
    try:
        notice = metadata.fetch_notice()
    except MetadataUnavailable as away:
        return report_problem(str(away)), timeouts.SPOT_POLL_SECONDS
    if notice is None:
        return report_problem(""), timeouts.SPOT_POLL_SECONDS
    local_raylets = tuple(find_raylets())
    problem = "" if local_raylets else "a notice, and no Ray on this machine"
    for request in plan_drains(state, notice, local_raylets, time.time()):
        error = drain(request.raylet, request.seconds_left, request.message)
        if error:
            problem = error
        else:
            drained_node_ids |= {request.raylet.node_id}
            log_line(f"{request.message}: node {request.raylet.node_id[:12]} is drained")
    return report_problem(problem), timeouts.DRAIN_RETRY_SECONDS


def watch() -> None:
    """Looks until it is ended from outside."""
    metadata, state = MetadataClient(), WatcherState()
    log_line(f"watching {metadata.endpoint}")
    while True:
        state, pause = poll(state, metadata, raylets.find_local_raylets, raylets.drain, log_line)
        time.sleep(pause)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        watch()
