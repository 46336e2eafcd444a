"""Drain this machine's Ray node when AWS announces that it will take the spot machine back.

    python -m orchestrator.cluster.node.spot_watcher

Open-source Ray does not look for spot notices. The watcher asks the machine's metadata service every few
seconds. After a notice, it makes Ray drain this machine's node (reason: preemption) with the seconds that are
left: trainers there save their lanes and return them (docs/faults.md). It continues while the service or Ray
is unavailable, and also drains a Ray that starts after the notice. On a machine that is not a spot machine,
there is never a notice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass

from orchestrator.cluster.node import raylets
from orchestrator.cluster.node.imds import InterruptionNotice, MetadataClient, MetadataUnavailableError
from orchestrator.cluster.node.raylets import Raylet
from orchestrator.cluster.node.supervisor import log_line
from orchestrator.util import timeouts


@dataclass(frozen=True)
class DrainRequest:
    """A node to be drained now."""

    raylet: Raylet
    seconds_left: int
    message: str


@dataclass(frozen=True)
class WatcherState:
    """What the watcher remembers between two polls."""

    drained_node_ids: frozenset[str] = frozenset()
    """Nodes whose draining Ray has accepted."""
    last_problem: str = ""
    """The problem that was logged last, so that a lasting problem is logged once."""


def plan_drains(
    state: WatcherState, notice: InterruptionNotice | None, local_raylets: Iterable[Raylet], now: float
) -> tuple[DrainRequest, ...]:
    """Return the nodes to drain: after a notice, each local node that is not drained yet.

    The announced time may have passed: a machine that still runs is drained as well.

    Args:
        state: The watcher's state.
        notice: The notice, or None.
        local_raylets: The Ray nodes on this machine.
        now: Seconds since the epoch.
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
    """Ask the metadata service once and drain the nodes that need it.

    Args:
        state: The state that the last poll returned.
        metadata: The metadata service.
        find_raylets: Returns the Ray nodes on this machine; see `raylets.find_local_raylets`.
        drain: Drains a node; see `raylets.drain`.
        log_line: Writes a line to the log.

    Returns:
        The new state, and the seconds to wait before the next poll.
    """

    def report_problem(problem: str) -> WatcherState:
        if problem and problem != state.last_problem:
            log_line(problem)
        return WatcherState(drained_node_ids, problem)

    drained_node_ids = state.drained_node_ids
    try:
        notice = metadata.fetch_notice()
    except MetadataUnavailableError as error:
        return report_problem(str(error)), timeouts.SPOT_POLL_SECONDS
    if notice is None:
        return report_problem(""), timeouts.SPOT_POLL_SECONDS
    local_raylets = tuple(find_raylets())
    problem = "" if local_raylets else "a notice, and no Ray on this machine"
    for request in plan_drains(state, notice, local_raylets, time.time()):
        refusal = drain(request.raylet, request.seconds_left, request.message)
        if refusal:
            problem = refusal
        else:
            drained_node_ids |= {request.raylet.node_id}
            log_line(f"{request.message}: node {request.raylet.node_id[:12]} is drained")
    return report_problem(problem), timeouts.DRAIN_RETRY_SECONDS


def watch() -> None:
    """Poll until the process is ended."""
    metadata, state = MetadataClient(), WatcherState()
    log_line(f"watching {metadata.endpoint}")
    while True:
        state, pause = poll(state, metadata, raylets.find_local_raylets, raylets.drain, log_line)
        time.sleep(pause)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        watch()
