"""Whether the lanes of a seat have memory: what was measured, and what follows from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.cluster.preflight.check_result import CheckResult, failed_result, ok_result
from orchestrator.finetune.engine.loop import OUT_OF_MEMORY_ADVICE

CHECK_NAME = "memory"
GIB = 2**30


@dataclass(frozen=True)
class MemoryMeasurement:
    """Of one variant, on one worker of a seat; all in bytes."""

    variant: str
    location: str
    """The device and its host."""
    requested_lanes: int
    """Lanes; one for a variant that trains alone."""
    limit_bytes: int
    """What the worker may take."""
    base_bytes: int
    """With the base loaded and no lane."""
    peaks: tuple[tuple[int, int], ...]
    """(lanes, what they took at most), more lanes last."""
    out_of_memory_lanes: int | None = None
    """So many lanes found no memory."""

    def estimate_bytes(self, lanes: int) -> int:
        """What so many take: measured, or on the line through the last two that were measured."""
        points = [(0, self.base_bytes), *self.peaks]
        (fewer_lanes, fewer_bytes), (more_lanes, more_bytes) = (
            points[-2:] if len(points) > 1 else (points[0], points[0])
        )
        if fewer_lanes == more_lanes:
            return more_bytes
        return more_bytes + (lanes - more_lanes) * max(0, more_bytes - fewer_bytes) // (
            more_lanes - fewer_lanes
        )

    @property
    def max_lanes(self) -> int:
        """Lanes that have memory, of those asked for."""
        if not self.peaks:
            return 0
        first_excluded = (
            self.out_of_memory_lanes if self.out_of_memory_lanes is not None else self.requested_lanes + 1
        )
        return max(
            (n for n in range(1, first_excluded) if self.estimate_bytes(n) <= self.limit_bytes), default=0
        )

    @property
    def fits(self) -> bool:
        return self.max_lanes >= self.requested_lanes


def check_memory(measurements: Sequence[MemoryMeasurement]) -> CheckResult:
    """On the variant that needs most, of its limit."""
    worst = min(
        measurements, key=lambda one: (one.fits, one.limit_bytes - one.estimate_bytes(one.requested_lanes))
    )
    available = f"a worker of a seat has {_gib(worst.limit_bytes)} ({worst.location})"
    if worst.fits:
        peaks_text = ", ".join(f"{lanes} lanes {_gib(peak)}" for lanes, peak in worst.peaks)
        return ok_result(
            CHECK_NAME, f"{worst.variant}: {peaks_text.replace('1 lanes', '1 lane')}; {available}"
        )
    if worst.max_lanes:
        return failed_result(
            CHECK_NAME,
            f"{worst.variant}: {worst.requested_lanes} lanes need about {_gib(worst.estimate_bytes(worst.requested_lanes))}, {available}; take "
            f"--lanes-per-seat {worst.max_lanes}, or {OUT_OF_MEMORY_ADVICE}",
        )
    needs_text = f"one lane needs {_gib(worst.estimate_bytes(1))}"
    if not worst.peaks:
        needs_text = f"one lane finds no memory beside the base, which takes {_gib(worst.base_bytes)}"
    return failed_result(CHECK_NAME, f"{worst.variant}: {needs_text}, {available}; {OUT_OF_MEMORY_ADVICE}")


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
