"""How many lanes a trainer holds at once, and which lanes leave when there are too many."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from orchestrator.finetune.engine.lane import Lane
from orchestrator.finetune.engine.lane_state import LaneState


@dataclass
class LaneSlots:
    """The slots of a trainer: its limit, what fits into memory, and which lanes are parked."""

    count: int
    """The largest number of lanes, as set by the user."""
    spill_seconds: float
    """A lane that has been parked for this long makes room for one that waits."""
    max_lanes_by_group_key: dict[str, int | None] = field(default_factory=dict)
    """Group key -> lanes that fit into memory; None if that is unknown."""
    parked_at: dict[str, float] = field(default_factory=dict)
    """Fingerprint -> time since which the lane has been parked, in the order of parking."""

    def count_free(self, lanes: Collection[Lane], group_capacity: int) -> int:
        """Return how many lanes fit in addition to `lanes`.

        Args:
            lanes: The lanes of the trainer, all of one group key.
            group_capacity: The largest number that the variant allows.
        """
        memory_capacity = next(
            (self.max_lanes_by_group_key.get(lane.configuration.group_key) for lane in lanes), None
        )
        return min(self.count, group_capacity, memory_capacity or self.count) - len(lanes)

    def list_long_parked(self, now: float) -> list[str]:
        """Return the lanes that may make room, the longest parked first."""
        return [name for name, since in self.parked_at.items() if now - since > self.spill_seconds]

    def park(self, lane: Lane) -> None:
        """Note that the lane is parked from now on."""
        self.parked_at[lane.fingerprint] = time.monotonic()

    def unpark(self, fingerprint: str) -> None:
        """Note that the lane is not parked."""
        self.parked_at.pop(fingerprint, None)

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
        staying = sorted(
            (lane for lane in lanes if lane not in mid_step),
            key=lambda lane: eviction_priority.get(lane.state, 0),
        )
        return max_lanes, staying[max_lanes:]
