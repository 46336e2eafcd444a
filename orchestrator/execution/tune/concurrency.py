"""The number of concurrent trials."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ray.tune.search import ConcurrencyLimiter

from orchestrator.execution.settings import Session
from orchestrator.execution.tune.trial import TRIAL_MEMORY_BYTES

MIN_AUTOSCALED_TRAINERS = 8
"""Number of trainers that the limit for an autoscaled cluster allows for, as on one node with eight GPUs."""


class SearchLimiter(ConcurrencyLimiter):
    """Limit the unfinished points of a search; `max_concurrent` may change while the search runs."""

    def get_state(self) -> dict[str, Any]:
        """Return nothing, because a search is continued by the command of its study."""
        return {}

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its search algorithm into its scratch folder


def trial_limit(session: Session, is_search: bool = False, capacities: Sequence[int] = ()) -> int:
    """Return the largest number of concurrent trials.

    It is the number of lanes of all trainers, plus one for each trainer. When a lane ends, the lane of the
    additional trial replaces it at once, while Tune starts the next trial in the free process. A search has
    no additional trials, because a waiting trial was suggested without the results of the lanes in training.

    The lanes of a trainer are those in `capacities`. A trainer that has not reported its limit counts with
    `TrainerSettings.expected_lanes`. In a grid on this machine alone, such a trainer counts with one trial,
    because the processes of more trials would delay its start.

    All trial processes together may use half of the memory that Ray manages, including the memory of nodes
    that an autoscaler may start. The other half is for trainers. An elastic pool on a joined cluster grows
    only if lanes wait, so its limit is computed for more trainers than it has. Their number is the largest of
    twice its trainers, the trainers for which an autoscaler may start nodes, and, with GPUs,
    `MIN_AUTOSCALED_TRAINERS`.

    Args:
        session: The number of trainers and of their lanes, and the nodes with their memory.
        is_search: True if trials are suggested by a search.
        capacities: For each trainer that has reported its limit, the number of lanes that it can hold. In a
            search, it is the number of lanes that may be unfinished for the trainer; see
            `count_usable_lanes` in `broker/assignment.py`.
    """
    num_trainers, trainers, cluster = session.num_trainers, session.trainers, session.cluster
    if session.is_elastic and not cluster.local:
        least = MIN_AUTOSCALED_TRAINERS if trainers.gpus_per_worker else 0
        num_trainers = max(least, 2 * num_trainers, session.autoscaler_capacity)
    expected, most = trainers.expected_lanes, trainers.max_lanes
    if is_search:
        told = [min(one, most) for one in capacities[:num_trainers]]
    else:
        told = [max(expected, min(one, most)) + 1 for one in capacities[:num_trainers]]
        expected += 1
    if cluster.local and not is_search:
        expected = 1
    wanted = sum(told) + max(0, num_trainers - len(told)) * expected
    memory = max(cluster.memory, session.autoscaler_memory)
    return max(1, min(wanted, int(memory / 2 / TRIAL_MEMORY_BYTES)))
