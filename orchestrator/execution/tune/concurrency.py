"""How many trials run at once, and how much memory each of them reserves."""

from __future__ import annotations

from orchestrator.execution.ray.runtime import Cluster
from orchestrator.execution.trainers.pool import PoolConfig
from orchestrator.execution.tune.trial import TRIAL_MEMORY_BYTES

MIN_AUTOSCALED_TRAINERS = 8
"""Number of trainers that a growing cluster is planned for: those of one node with eight GPUs."""


def trial_limits(pool: PoolConfig, cluster: Cluster, scheduler: str) -> tuple[int | None, int]:
    """Return the number of trials that run at once, and the bytes that each reserves in Ray.

    The number covers the lanes of all trainers and one lane group each to lease next. It is limited by the
    memory of the trial processes, which get half of what Ray may promise; the trainers get the other half.
    Tune's limit cannot be raised later, so an elastic pool on a cluster of GPUs gets one for twice its
    trainers.

    Hyperband pauses a trial until all of its bracket have come as far, and Tune's limit counts paused trials.
    There the number is None, and the reserved bytes keep the same limit.
    """
    num_trainers = pool.num_trainers
    if pool.elastic and not cluster.local and pool.spec.gpus_per_worker:
        num_trainers = max(MIN_AUTOSCALED_TRAINERS, 2 * num_trainers, pool.autoscaler_capacity)
    wanted = 2 * num_trainers * pool.spec.lanes_per_trainer
    if scheduler == "hyperband":
        share = max(cluster.memory / wanted, 2 * TRIAL_MEMORY_BYTES)
        return None, int(min(share, max(node.memory for node in cluster.nodes)))
    return max(1, min(wanted, int(cluster.memory / 2 / TRIAL_MEMORY_BYTES))), TRIAL_MEMORY_BYTES
