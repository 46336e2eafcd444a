"""How many lanes a seat trains at once, and who makes way when there are too many."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from orchestrator.finetune.engine.lane import Lane
from orchestrator.finetune.engine.lane_state import Phase


@dataclass
class Places:
    """`count`: as many as the seat was told. A lane that was parked for `spill_seconds` makes way for one
    that waits."""

    count: int
    spill_seconds: float
    most: dict[str, int | None] = field(default_factory=dict)
    """Shape -> lanes that there is memory for, where that is known."""
    parked_at: dict[str, float] = field(default_factory=dict)

    def free(self, lanes: Collection[Lane], pack: int) -> int:
        """Beside `lanes`, in a pack that has `pack` at most."""
        most = next((self.most.get(lane.configuration.shape) for lane in lanes), None)
        return min(self.count, pack, most or self.count) - len(lanes)

    def late(self, now: float) -> list[str]:
        return [name for name, since in self.parked_at.items() if now - since > self.spill_seconds]

    def park(self, lane: Lane) -> None:
        self.parked_at[lane.name] = time.monotonic()

    def unpark(self, name: str) -> None:
        self.parked_at.pop(name, None)

    def halve(self, lanes: Collection[Lane], torn: Sequence[Lane]) -> tuple[int, list[Lane]]:
        """So many had not enough memory, from now on half of them are the most of their shape. Returns how
        many these are, and those who leave beside the `torn`, which do in any case: first the ones of which
        there is least to lose, then the last that came."""
        shape = next(iter(lanes)).configuration.shape
        self.most[shape] = most = max(1, len(lanes) // 2)
        least = {Phase.PARKED: 1, Phase.LEASED: 2}
        staying = sorted(
            (lane for lane in lanes if lane not in torn), key=lambda lane: least.get(lane.phase, 0)
        )
        return most, staying[most:]
