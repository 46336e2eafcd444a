"""Whether the cluster has room for the study's trainers, now or after the autoscaler has started nodes."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.cluster.preflight.check_result import (
    CheckResult,
    failed_result,
    format_node_count,
    ok_result,
    undetermined_result,
)
from orchestrator.execution.ray.autoscaler import NodeType, worker_capacity
from orchestrator.execution.ray.runtime import Cluster
from orchestrator.study.options import StudyOptions
from orchestrator.util import timeouts
from orchestrator.util.errors import UsageError

CHECK_NAME = "nodes"


def check_capacity(
    cluster: Cluster, options: StudyOptions, startable_node_types: Sequence[NodeType]
) -> CheckResult:
    """Check whether the requested trainers have room.

    Args:
        cluster: The nodes that are running.
        options: The study's options.
        startable_node_types: Nodes that the autoscaler may start; empty without an autoscaler.

    Returns:
        A failure if not a single trainer can ever start.
    """
    workers_per_trainer = options.workers_per_trainer
    try:
        trainers, gpus_per_worker = cluster.plan_trainers(
            options.trainers, options.gpus_per_worker, workers_per_trainer
        )
    except UsageError as error:
        return failed_result(CHECK_NAME, str(error))
    summary = _summarize_cluster(cluster)
    uses_default_gpus = options.gpus_per_worker is None and not options.dry_run
    if not gpus_per_worker and uses_default_gpus and any(kind.has_gpus for kind in startable_node_types):
        return failed_result(
            CHECK_NAME,
            f"{summary}, and the cluster can start GPU nodes, but the study would train on CPUs; "
            "add --gpus-per-worker 1",
        )
    trainers_now = cluster.trainer_capacity(gpus_per_worker, workers_per_trainer)
    if trainers_now >= trainers:
        return ok_result(CHECK_NAME, f"{summary}: room for {trainers_now} trainers")
    max_trainers = _max_trainers(trainers_now, startable_node_types, gpus_per_worker, workers_per_trainer)
    if max_trainers == 0:
        needs = _describe_trainer(gpus_per_worker, workers_per_trainer)
        return _no_room_result(f"{summary}: no node has room for a trainer ({needs})", startable_node_types)
    if not startable_node_types:
        return ok_result(
            CHECK_NAME,
            f"{summary}: room for {trainers_now} of {trainers} trainers; the others wait for nodes to join",
        )
    names = ", ".join(f"{kind.max_nodes} {kind.name}" for kind in startable_node_types)
    later = (
        ""
        if max_trainers is None
        else f", then room for {min(max_trainers, trainers)} of {trainers} trainers"
    )
    timeout = options.trainer_timeout or timeouts.TRAINER_TIMEOUT_SECONDS
    return undetermined_result(
        CHECK_NAME,
        f"{summary}, room for {trainers_now} trainers; the autoscaler may start {names}{later}; "
        f"a study waits {timeout:g} s for its first trainer (--trainer-timeout)",
    )


def _no_room_result(problem: str, startable_node_types: Sequence[NodeType]) -> CheckResult:
    others = "and no autoscaler is known here to start one"
    if startable_node_types:
        others = "and none that the autoscaler may start has"
    advice = "start such a node (ray start --address), or change --gpus-per-worker or --workers-per-trainer"
    return failed_result(CHECK_NAME, f"{problem}, {others}; {advice}")


def _max_trainers(
    trainers_now: int, startable: Sequence[NodeType], gpus_per_worker: float, workers_per_trainer: int
) -> int | None:
    """Return the trainers with room after all nodes have started; None if a node type's size is not known."""
    if not startable:
        return trainers_now
    workers = worker_capacity(startable, gpus_per_worker)
    return None if workers is None else trainers_now + workers // workers_per_trainer


def _describe_trainer(gpus_per_worker: float, workers_per_trainer: int) -> str:
    worker = f"{gpus_per_worker:g} GPU and a CPU" if gpus_per_worker else "a CPU and 2 GiB"
    return f"{workers_per_trainer} times {worker}" if workers_per_trainer > 1 else worker


def _summarize_cluster(cluster: Cluster) -> str:
    cpus, gpus = sum(node.cpus for node in cluster.nodes), sum(node.gpus for node in cluster.nodes)
    location = "this machine" if cluster.local else format_node_count(len(cluster.nodes))
    return f"{location}, {cpus:g} CPUs, {gpus:g} GPUs"
