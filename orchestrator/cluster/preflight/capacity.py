"""Whether the seats have their nodes and GPUs, or may get them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.cluster.preflight.check_result import Finding, failed, later, nodes, ok
from orchestrator.execution.ray.autoscaler import Kind, room
from orchestrator.execution.ray.runtime import Cluster
from orchestrator.study.options import SEAT_TIMEOUT, StudyOptions
from orchestrator.util.errors import BadInput

NAME = "nodes"


@dataclass(frozen=True)
class Seats:
    count: int
    gpus: float
    """Of a worker."""


def judge(cluster: Cluster, options: StudyOptions, to_come: Sequence[Kind]) -> tuple[Finding, Seats | None]:
    """`to_come`: what the autoscaler may start, empty without one. None when no seat can be had."""
    workers = options.workers_per_seat
    try:
        count, gpus = cluster.seats(options.seats, options.gpus_per_seat, workers)
    except BadInput as error:
        return failed(NAME, str(error)), None
    seats = Seats(count, gpus)
    there = _there(cluster)
    untyped = options.gpus_per_seat is None and not options.dry_run
    if not gpus and untyped and any(kind.has_gpus for kind in to_come):
        return failed(
            NAME,
            f"{there}, while the cluster may start GPU nodes: the study would train on CPUs; "
            "say --gpus-per-seat 1",
        ), None
    now = cluster.room(gpus, workers)
    if now >= count:
        return ok(NAME, f"{there}: room for {now} seats"), seats
    more = room(to_come, gpus)
    most = now if not to_come else None if more is None else now + more // workers
    needs = f"{gpus:g} GPU and a CPU" if gpus else "a CPU and 2 GiB"
    times = f"{workers} times " if workers > 1 else ""
    if most == 0:
        may = "and none that may come has" if to_come else "and no autoscaler is known here to start one"
        advice = "start such a node (ray start --address), or change --gpus-per-seat or --workers-per-seat"
        return failed(NAME, f"{there}: no node has room for a seat ({times}{needs}), {may}; {advice}"), None
    if not to_come:
        return ok(NAME, f"{there}: room for {now} of {count} seats; the others wait for nodes to join"), seats
    names = ", ".join(f"{kind.most} {kind.name}" for kind in to_come)
    at_most = "" if most is None else f", room for {min(most, count)} of {count} seats then"
    wait = f"a study waits {options.seat_timeout or SEAT_TIMEOUT:g} s for its first seat (--seat-timeout)"
    return later(
        NAME, f"{there}, room for {now} seats; the autoscaler may start {names}{at_most}; {wait}"
    ), seats


def _there(cluster: Cluster) -> str:
    cpus, gpus = (sum(getattr(node, what) for node in cluster.nodes) for what in ("cpus", "gpus"))
    where = "this machine" if cluster.local else nodes(len(cluster.nodes))
    return f"{where}, {cpus:g} CPUs, {gpus:g} GPUs"
