"""Whether the seats have their nodes and GPUs, or may get them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.cluster.preflight.check_result import (
    CheckResult,
    failed_result,
    format_node_count,
    ok_result,
    undetermined_result,
)
from orchestrator.execution.ray.autoscaler import NodeType, worker_capacity
from orchestrator.execution.ray.runtime import Cluster
from orchestrator.study.options import DEFAULT_TRAINER_TIMEOUT, StudyOptions
from orchestrator.util.errors import UsageError

CHECK_NAME = "nodes"


@dataclass(frozen=True)
class TrainerAllocation:
    count: int
    gpus_per_worker: float
    """Of a worker."""


def check_capacity(
    cluster: Cluster, options: StudyOptions, startable_node_types: Sequence[NodeType]
) -> tuple[CheckResult, TrainerAllocation | None]:
    """`to_come`: what the autoscaler may start, empty without one. None when no seat can be had."""
    workers_per_trainer = options.workers_per_trainer
    try:
        trainers, gpus_per_worker = cluster.plan_trainers(
            options.trainers, options.gpus_per_worker, workers_per_trainer
        )
    except UsageError as error:
        return failed_result(CHECK_NAME, str(error)), None
    allocation = TrainerAllocation(trainers, gpus_per_worker)
    summary = _summarize_cluster(cluster)
    untyped = options.gpus_per_worker is None and not options.dry_run
    if not gpus_per_worker and untyped and any(kind.has_gpus for kind in startable_node_types):
        return failed_result(
            CHECK_NAME,
            f"{summary}, while the cluster may start GPU nodes: the study would train on CPUs; "
            "say --gpus-per-seat 1",
        ), None
    trainers_now = cluster.trainer_capacity(gpus_per_worker, workers_per_trainer)
    if trainers_now >= trainers:
        return ok_result(CHECK_NAME, f"{summary}: room for {trainers_now} seats"), allocation
    startable_workers = worker_capacity(startable_node_types, gpus_per_worker)
    max_trainers = (
        trainers_now
        if not startable_node_types
        else None
        if startable_workers is None
        else trainers_now + startable_workers // workers_per_trainer
    )
    worker_needs = f"{gpus_per_worker:g} GPU and a CPU" if gpus_per_worker else "a CPU and 2 GiB"
    multiplier = f"{workers_per_trainer} times " if workers_per_trainer > 1 else ""
    if max_trainers == 0:
        may = (
            "and none that may come has"
            if startable_node_types
            else "and no autoscaler is known here to start one"
        )
        advice = "start such a node (ray start --address), or change --gpus-per-seat or --workers-per-seat"
        return failed_result(
            CHECK_NAME,
            f"{summary}: no node has room for a seat ({multiplier}{worker_needs}), {may}; {advice}",
        ), None
    if not startable_node_types:
        return ok_result(
            CHECK_NAME,
            f"{summary}: room for {trainers_now} of {trainers} seats; the others wait for nodes to join",
        ), allocation
    names = ", ".join(f"{kind.max_nodes} {kind.name}" for kind in startable_node_types)
    at_most = (
        "" if max_trainers is None else f", room for {min(max_trainers, trainers)} of {trainers} seats then"
    )
    wait = f"a study waits {options.trainer_timeout or DEFAULT_TRAINER_TIMEOUT:g} s for its first seat (--seat-timeout)"
    return undetermined_result(
        CHECK_NAME,
        f"{summary}, room for {trainers_now} seats; the autoscaler may start {names}{at_most}; {wait}",
    ), allocation


def _summarize_cluster(cluster: Cluster) -> str:
    cpus, gpus = (sum(getattr(node, what) for node in cluster.nodes) for what in ("cpus", "gpus"))
    location = "this machine" if cluster.local else format_node_count(len(cluster.nodes))
    return f"{location}, {cpus:g} CPUs, {gpus:g} GPUs"
