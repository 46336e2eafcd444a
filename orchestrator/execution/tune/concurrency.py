"""The number of concurrent trials, and the memory that each of them reserves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ray.tune.search import ConcurrencyLimiter, Searcher

from orchestrator.execution.ray.runtime import Cluster
from orchestrator.execution.trainers.pool import PoolConfig
from orchestrator.execution.tune.trial import PAUSABLE_TRIAL_MEMORY_BYTES, TRIAL_MEMORY_BYTES

MIN_AUTOSCALED_TRAINERS = 8
"""Number of trainers that the limit for an autoscaled cluster allows for, as on one node with eight GPUs."""


class SearchLimiter(ConcurrencyLimiter):
    """Limit the unfinished points of a search to those that the trainers can train.

    The limit changes while the search runs: trainers on GPUs measure how many lanes they can hold, and points
    of different group keys cannot train together.

    Args:
        searcher: The searcher to limit.
        limit: Returns the limit for the lanes of each trainer, as in `trial_limits`.
    """

    def __init__(self, searcher: Searcher, limit: Callable[[Sequence[int]], Any]) -> None:
        super().__init__(searcher, limit(()))
        self._limit = limit

    def follow(self, capacities: Sequence[int]) -> None:
        """Set the limit for the lanes of each trainer; called from another thread."""
        self.max_concurrent = self._limit(capacities)

    def get_state(self) -> dict[str, Any]:
        """Return nothing, because a search is continued by the command of its study."""
        return {}

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its search algorithm into its scratch folder


def trial_limits(
    pool: PoolConfig,
    cluster: Cluster,
    scheduler: str,
    is_search: bool = False,
    capacities: Sequence[int] = (),
) -> tuple[int | None, int]:
    """Return the number of concurrent trials (None for no limit), and the bytes that each reserves in Ray.

    The number is that of the lanes of all trainers, plus one for each trainer: when a lane ends, the lane of
    the additional trial replaces it at once, while Tune starts the next trial in the free process. More
    trials would mean more processes to start before the first step. A search adds none, since a trial that
    waits was suggested without the results of the lanes that are in training. Where trainers measure their
    lanes, a search begins with `TrainerSpec.expected_lanes` and then follows `capacities`.

    The trial processes together may use half of the memory that Ray manages, also on nodes that an autoscaler
    may start; the other half is for trainers.
    An elastic pool on a joined cluster grows only if lanes wait. Its limit is therefore that of twice its
    trainers, of the trainers for which an autoscaler may start nodes, or of `MIN_AUTOSCALED_TRAINERS` with
    GPUs, whichever is largest.

    Hyperband pauses a trial until all trials of its bracket have reached the same evaluation, and Tune's
    limit counts paused trials. Under Hyperband the number is therefore None, and the reserved bytes limit the
    trials.

    Args:
        pool: The number of trainers and of their lanes.
        cluster: The nodes, with their memory.
        scheduler: The name of the scheduler.
        is_search: True if trials are suggested by a search.
        capacities: The number of lanes that a search may keep unfinished for each trainer, of those that have
            told their limit; see `count_usable_lanes` in `broker/assignment.py`.
    """
    num_trainers = pool.num_trainers
    if pool.elastic and not cluster.local:
        least = MIN_AUTOSCALED_TRAINERS if pool.spec.gpus_per_worker else 0
        num_trainers = max(least, 2 * num_trainers, pool.autoscaler_capacity)
    lanes = pool.spec.expected_lanes if is_search else pool.spec.lanes_per_trainer + 1
    measured = [min(one, pool.spec.lanes_per_trainer) for one in capacities[:num_trainers]]
    wanted = sum(measured) + (num_trainers - len(measured)) * lanes
    if scheduler == "hyperband":
        share = max(cluster.memory / wanted, 2 * PAUSABLE_TRIAL_MEMORY_BYTES)
        return None, int(min(share, max(node.memory for node in cluster.nodes)))
    memory = max(cluster.memory, pool.autoscaler_memory)
    return max(1, min(wanted, int(memory / 2 / TRIAL_MEMORY_BYTES))), TRIAL_MEMORY_BYTES
