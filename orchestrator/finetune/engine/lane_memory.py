"""The number of lanes of a group key, from the memory of steps with one and with two lanes."""

from __future__ import annotations

from dataclasses import dataclass, field

from orchestrator.record.lane_capacity import MeasuredLanes
from orchestrator.study.options import MAX_MEASURED_LANES

MEMORY_SHARE = 0.9
"""The share of a trainer's memory that its lanes may use. Later steps have longer rows than the measured
ones, and the allocator needs some memory between its blocks."""
MEASURED_STEPS = 3
"""Steps measured with one lane, and again with two; the largest peak is used. One warm-up step precedes
them."""
MIN_USEFUL_LANES = 2
"""Number of lanes that a trainer holds if they fit, however many tokens they have."""
SATURATING_TOKENS = 9_000
"""Number of tokens in one forward pass up to which more lanes save time on a GPU, because lanes share the
time in which the host launches kernels. For Qwen3-0.6B and 2,000 tokens a lane, the default study's steps are
predicted to take 41.9, 28.2 and 20.8 hours of an H200 with 1, 2 and 4 lanes (24.8, 17.0 and 12.6 with fused
kernels); 8 lanes save nothing more. The number leaves room for rows that are a little longer."""


def limit_lanes(fitting: int, tokens: int) -> int:
    """Return how many lanes a trainer should train at once.

    Args:
        fitting: The number of lanes that fit into memory.
        tokens: Mean number of tokens in a micro-batch of one lane.
    """
    useful = max(MIN_USEFUL_LANES, SATURATING_TOKENS // max(1, tokens))
    return max(1, min(fitting, useful, MAX_MEASURED_LANES))


@dataclass
class LaneMemory:
    """Peaks of memory of the steps of one group key, by the number of lanes."""

    peaks: dict[int, list[int]] = field(default_factory=lambda: {1: [], 2: []})
    """Number of lanes -> the peak of each step in bytes, in the order of the steps. The first one does not
    count, since it includes the initialization of a lane and lacks the state of its optimizer."""

    def is_known(self, num_lanes: int) -> bool:
        """Return whether enough steps with this number of lanes were measured; always true above 2 lanes."""
        return len(self.peaks.get(num_lanes, range(MEASURED_STEPS + 1))) > MEASURED_STEPS

    def choose(self, memory: int, tokens: int) -> MeasuredLanes:
        """Return the number of lanes, once the steps with one and with two lanes are known.

        Args:
            memory: The bytes of memory that the trainer may use.
            tokens: Mean number of tokens in a micro-batch of one lane.
        """
        one, two = (max(self.peaks[lanes][1:]) for lanes in (1, 2))
        fitting = max(1, 1 + int((MEMORY_SHARE * memory - one) // max(1, two - one)))
        return MeasuredLanes(limit_lanes(fitting, tokens), fitting, one, two, tokens)
