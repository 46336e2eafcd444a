"""How many lanes a seat trains at once, and who makes way when there are too many."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from orchestrator.finetune.engine.lane import Lane
from orchestrator.finetune.engine.lane_state import LaneState


@dataclass
class LaneSlots:
    """`count`: as many as the seat was told. A lane that was parked for `spill_seconds` makes way for one
    that waits."""

    count: int
    spill_seconds: float
    max_lanes_by_group_key: dict[str, int | None] = field(default_factory=dict)
    """Shape -> lanes that there is memory for, where that is known."""
    parked_at: dict[str, float] = field(default_factory=dict)

    def count_free(self, lanes: Collection[Lane], group_capacity: int) -> int:
        """Beside `lanes`, in a pack that has `pack` at most."""
        memory_capacity = next(
            (self.max_lanes_by_group_key.get(lane.configuration.group_key) for lane in lanes), None
        )
        return min(self.count, group_capacity, memory_capacity or self.count) - len(lanes)

    def list_long_parked(self, now: float) -> list[str]:
        return [name for name, since in self.parked_at.items() if now - since > self.spill_seconds]

    def park(self, lane: Lane) -> None:
        self.parked_at[lane.fingerprint] = time.monotonic()

    def unpark(self, name: str) -> None:
        self.parked_at.pop(name, None)

    def halve(self, lanes: Collection[Lane], mid_step: Sequence[Lane]) -> tuple[int, list[Lane]]:
        """So many had not enough memory, from now on half of them are the most of their shape. Returns how
        many these are, and those who leave beside the `torn`, which do in any case: first the ones of which
        there is least to lose, then the last that came."""
        group_key = next(iter(lanes)).configuration.group_key
        self.max_lanes_by_group_key[group_key] = max_lanes = max(1, len(lanes) // 2)
        eviction_priority = {LaneState.PARKED: 1, LaneState.LEASED: 2}
        staying = sorted(
            (lane for lane in lanes if lane not in mid_step),
            key=lambda lane: eviction_priority.get(lane.state, 0),
        )
        return max_lanes, staying[max_lanes:]
