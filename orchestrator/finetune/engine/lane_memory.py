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
SATURATING_TOKENS = 4_000
"""Number of tokens in one forward pass beyond which more lanes save no time on a GPU. Predicted for an H100
and Qwen3-0.6B: a step of one lane alone takes 0.38 s, and of each of four lanes together 0.36 s."""


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
        useful = max(MIN_USEFUL_LANES, SATURATING_TOKENS // max(1, tokens))
        return MeasuredLanes(min(fitting, useful, MAX_MEASURED_LANES), fitting, one, two, tokens)
