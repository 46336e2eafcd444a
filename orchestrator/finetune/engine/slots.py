"""The slots of a trainer for lanes: how many follow from the memory of its steps, and which lanes leave."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from orchestrator.finetune.engine.lane import Lane
from orchestrator.finetune.engine.lane_state import LaneState
from orchestrator.study.options import MAX_MEASURED_LANES
from orchestrator.util import timeouts

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


@dataclass(frozen=True)
class MeasuredLanes:
    """The number of lanes that a trainer chose by measurement, and the reasons."""

    lanes: int
    """The number of lanes that train at once."""
    fitting: int
    """The number of lanes that fit into memory, by linear extrapolation."""
    one_lane_bytes: int
    """The peak memory of a step with one lane."""
    two_lanes_bytes: int
    """The peak memory of a step with two lanes."""
    tokens: int
    """Mean number of tokens in a micro-batch of one lane."""

    def __str__(self) -> str:
        one, two = self.one_lane_bytes / 2**30, self.two_lanes_bytes / 2**30
        reason = "" if self.lanes == self.fitting else f", {self.tokens} tokens per lane and micro-batch"
        return f"one lane needs {one:.1f} GiB, two {two:.1f}: {self.fitting} fit{reason}"


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


@dataclass
class LaneSlots:
    """The slots of a trainer: the limit of all lanes, the limits of group keys, and the parked lanes."""

    count: int
    """The largest number of lanes: the user's, or the largest that a measurement may choose."""
    is_measured: bool = False
    """If true, a group key without a known limit gets one by measurement. Until then its lane group has one
    lane, and two once the memory of a step with one lane is known."""
    max_lanes_by_group_key: dict[str, int | None] = field(default_factory=dict)
    """Group key -> lanes that fit into memory, or that a measurement chose; None if that is unknown."""
    evaluated_lanes_by_group_key: dict[str, int] = field(default_factory=dict)
    """Group key -> lanes that fit into memory in an evaluation, if more did not. An evaluation needs other
    memory than training: answers are generated with a cache of all their tokens."""
    memory_by_group_key: dict[str, LaneMemory] = field(default_factory=dict)
    """Group key -> the memory of its steps, as far as they are measured."""
    parked_at: dict[str, float] = field(default_factory=dict)
    """Fingerprint -> time since which the lane has been parked, in the order of parking."""

    def limit(self, group_key: str | None) -> int:
        """Return how many lanes this trainer may hold at once if they are of this group key."""
        known = self.max_lanes_by_group_key.get(group_key or "")
        if known is None and self.is_measured:
            memory = self.memory_by_group_key.get(group_key or "")
            known = 2 if memory is not None and memory.is_known(1) else 1
        return self.count if known is None else min(self.count, known)

    def needs_measurement(self, lanes: Collection[Lane]) -> bool:
        """Return whether the memory of a step with these lanes, all of the group, is to be measured."""
        group_key = next(iter(lanes)).configuration.group_key
        if not self.is_measured or self.max_lanes_by_group_key.get(group_key) is not None:
            return False
        memory = self.memory_by_group_key.get(group_key)
        return memory is None or not memory.is_known(len(lanes))

    def list_long_parked(self, now: float) -> list[str]:
        """Return the fingerprints of the lanes parked for more than SPILL_SECONDS, the longest first.

        Args:
            now: The time of `time.monotonic`, in seconds.
        """
        return [name for name, since in self.parked_at.items() if now - since > timeouts.SPILL_SECONDS]

    def max_lanes_to_evaluate(self, lane: Lane) -> int:
        """Return how many lanes of the group key of `lane` may be evaluated at once."""
        return self.evaluated_lanes_by_group_key.get(lane.configuration.group_key, self.count)

    def halve(self, lanes: Collection[Lane], mid_step: Sequence[Lane]) -> tuple[int, list[Lane]]:
        """Halve the lane group after an out-of-memory error.

        Args:
            lanes: The lanes of the group.
            mid_step: Lanes whose optimizer step was interrupted; they leave in any case.

        Returns:
            The new maximum for this group key, and the lanes to evict besides `mid_step`: first lanes that
            have not started, then parked ones, then the ones that were leased last.
        """
        group_key = next(iter(lanes)).configuration.group_key
        self.max_lanes_by_group_key[group_key] = max_lanes = max(1, len(lanes) // 2)
        eviction_priority = {LaneState.PARKED: 1, LaneState.LEASED: 2}
        staying = [lane for lane in lanes if lane not in mid_step]
        staying.sort(key=lambda lane: eviction_priority.get(lane.state, 0))
        return max_lanes, staying[max_lanes:]
