"""Check whether the cluster has room for the trainers, now or after the autoscaler has started nodes."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.cluster.preflight.check_result import UndeterminedError, format_node_count
from orchestrator.execution.ray.autoscaler import NodeType, worker_capacity
from orchestrator.execution.ray.runtime import Cluster
from orchestrator.study.options import StudyOptions
from orchestrator.util import timeouts
from orchestrator.util.errors import UsageError


def check_capacity(cluster: Cluster, options: StudyOptions, startable: Sequence[NodeType]) -> str:
    """Check whether the requested trainers have room.

    Args:
        cluster: The nodes that are running.
        options: The study's options.
        startable: Node types that the autoscaler may start; empty without an autoscaler.

    Returns:
        The text of the check's line.

    Raises:
        UsageError: Not a single trainer can ever start, or the study would not use the cluster's GPUs.
        UndeterminedError: Trainers wait for the autoscaler.
    """
    workers = options.workers_per_trainer
    trainers, gpus_per_worker = cluster.plan_trainers(options.trainers, options.gpus_per_worker, workers)
    cpus, gpus = sum(node.cpus for node in cluster.nodes), sum(node.gpus for node in cluster.nodes)
    location = "this machine" if cluster.local else format_node_count(len(cluster.nodes))
    summary = f"{location}, {cpus:g} CPUs, {gpus:g} GPUs"
    uses_default_gpus = options.gpus_per_worker is None and not options.dry_run
    if not gpus_per_worker and uses_default_gpus and any(kind.has_gpus for kind in startable):
        raise UsageError(
            f"{summary}, and the cluster can start GPU nodes, but the study would train on CPUs; "
            "add --gpus-per-worker 1"
        )
    room = cluster.trainer_capacity(gpus_per_worker, workers)
    if room >= trainers:
        return f"{summary}: room for {room} trainers"
    startable_workers = worker_capacity(startable, gpus_per_worker)
    max_trainers = None if startable_workers is None else room + startable_workers // workers
    if max_trainers == 0:
        needs = f"{gpus_per_worker:g} GPU and a CPU" if gpus_per_worker else "a CPU and 2 GiB"
        needs = f"{workers} times {needs}" if workers > 1 else needs
        others = "none that the autoscaler may start has"
        others = others if startable else "no autoscaler is known here to start one"
        raise UsageError(
            f"{summary}: no node has room for a trainer ({needs}), and {others}; start such a node "
            "(ray start --address), or change --gpus-per-worker or --workers-per-trainer"
        )
    if not startable:
        return f"{summary}: room for {room} of {trainers} trainers; the others wait for nodes to join"
    names = ", ".join(f"{kind.max_nodes} {kind.name}" for kind in startable)
    later = f", then room for {min(max_trainers, trainers)} of {trainers} trainers" if max_trainers else ""
    timeout = options.trainer_timeout or timeouts.TRAINER_TIMEOUT_SECONDS
    raise UndeterminedError(
        f"{summary}, room for {room} trainers; the autoscaler may start {names}{later}; "
        f"a study waits {timeout:g} s for its first trainer (--trainer-timeout)"
    )
