"""The slots of a trainer for lanes, and the choice of lanes to evict when memory runs out."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from orchestrator.finetune.engine.lane import Lane
from orchestrator.finetune.engine.lane_memory import LaneMemory
from orchestrator.finetune.engine.lane_state import LaneState
from orchestrator.util import timeouts


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
