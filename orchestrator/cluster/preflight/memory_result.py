"""Whether the lanes of a seat have memory: what was measured, and what follows from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.cluster.preflight.check_result import Finding, failed, ok
from orchestrator.finetune.engine.loop import NEEDS_LESS

NAME = "memory"
GIB = 2**30


@dataclass(frozen=True)
class Measured:
    """Of one variant, on one worker of a seat; all in bytes."""

    variant: str
    place: str
    """The device and its host."""
    asked: int
    """Lanes; one for a variant that trains alone."""
    limit: int
    """What the worker may take."""
    base: int
    """With the base loaded and no lane."""
    peaks: tuple[tuple[int, int], ...]
    """(lanes, what they took at most), more lanes last."""
    short: int | None = None
    """So many lanes found no memory."""

    def needs(self, lanes: int) -> int:
        """What so many take: measured, or on the line through the last two that were measured."""
        points = [(0, self.base), *self.peaks]
        (few, less), (many, more) = points[-2:] if len(points) > 1 else (points[0], points[0])
        if few == many:
            return more
        return more + (lanes - many) * max(0, more - less) // (many - few)

    @property
    def most(self) -> int:
        """Lanes that have memory, of those asked for."""
        if not self.peaks:
            return 0
        least = self.short if self.short is not None else self.asked + 1
        return max((n for n in range(1, least) if self.needs(n) <= self.limit), default=0)

    @property
    def fits(self) -> bool:
        return self.most >= self.asked


def judge(found: Sequence[Measured]) -> Finding:
    """On the variant that needs most, of its limit."""
    worst = min(found, key=lambda one: (one.fits, one.limit - one.needs(one.asked)))
    has = f"a worker of a seat has {_gib(worst.limit)} ({worst.place})"
    if worst.fits:
        took = ", ".join(f"{lanes} lanes {_gib(peak)}" for lanes, peak in worst.peaks)
        return ok(NAME, f"{worst.variant}: {took.replace('1 lanes', '1 lane')}; {has}")
    if worst.most:
        return failed(
            NAME,
            f"{worst.variant}: {worst.asked} lanes need about {_gib(worst.needs(worst.asked))}, {has}; take "
            f"--lanes-per-seat {worst.most}, or {NEEDS_LESS}",
        )
    one = f"one lane needs {_gib(worst.needs(1))}"
    if not worst.peaks:
        one = f"one lane finds no memory beside the base, which takes {_gib(worst.base)}"
    return failed(NAME, f"{worst.variant}: {one}, {has}; {NEEDS_LESS}")


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
