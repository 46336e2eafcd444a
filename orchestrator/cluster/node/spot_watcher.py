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
from contextlib import suppress

from orchestrator.cluster.node import raylets
from orchestrator.cluster.node.imds import MetadataClient, MetadataUnavailableError
from orchestrator.cluster.node.supervisor import log_line
from orchestrator.util import timeouts


class SpotWatcher:
    """Client of the metadata service that drains nodes and remembers which of them are drained."""

    def __init__(self) -> None:
        self._metadata = MetadataClient()
        self._drained_node_ids: set[str] = set()
        self._last_problem = ""
        log_line(f"watching {self._metadata.endpoint}")

    def poll(self) -> float:
        """Ask the metadata service once and drain the nodes that need it.

        The announced time may have passed: a machine that still runs is drained as well.

        Returns:
            Seconds to wait before the next poll.
        """
        try:
            notice = self._metadata.fetch_notice()
        except MetadataUnavailableError as error:
            self._report_problem(str(error))
            return timeouts.SPOT_POLL_SECONDS
        if notice is None:
            self._report_problem("")
            return timeouts.SPOT_POLL_SECONDS
        local_raylets = raylets.find_local_raylets()
        problem = "" if local_raylets else "a notice, and no Ray on this machine"
        seconds = notice.seconds_left(time.time())
        message = f"spot machine: AWS will {notice.action} it in {seconds} s"
        for raylet in local_raylets:
            if raylet.node_id in self._drained_node_ids:
                continue
            if refusal := raylets.drain(raylet, seconds, message):
                problem = refusal
            else:
                self._drained_node_ids.add(raylet.node_id)
                log_line(f"{message}: node {raylet.node_id[:12]} is drained")
        self._report_problem(problem)
        return timeouts.DRAIN_RETRY_SECONDS

    def _report_problem(self, problem: str) -> None:
        """Log a problem, unless the last poll has met the same one. An empty text means no problem."""
        if problem and problem != self._last_problem:
            log_line(problem)
        self._last_problem = problem


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        watcher = SpotWatcher()
        while True:
            time.sleep(watcher.poll())
