"""Whether clocks agree: records and checkpoints of several nodes are told apart by their times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.cluster.preflight.check_result import Finding, failed, listed, ok
from orchestrator.cluster.preflight.check_result import nodes as count

NAME = "clock"
MOST_SECONDS = 2.0
TICKS = 3
"""How often a node is asked: the quickest answer counts."""


@dataclass(frozen=True)
class Tick:
    """A node's clock, asked once; seconds since the epoch."""

    sent: float
    said: float
    received: float

    @property
    def off(self) -> float:
        """By how much the node's clock is wrong at least: what it said lies between question and answer
        otherwise."""
        if self.said < self.sent:
            return self.said - self.sent
        return max(0.0, self.said - self.received)


def judge(nodes: Mapping[str, Sequence[Tick]]) -> Finding:
    """`nodes`: by address."""
    off = {node: min((t.off for t in ticks), key=abs) for node, ticks in nodes.items() if ticks}
    wrong = [f"{node} by {seconds:+.1f} s" for node, seconds in off.items() if abs(seconds) > MOST_SECONDS]
    if wrong:
        return failed(
            NAME,
            f"not this machine's time: {listed(wrong)}; at most {MOST_SECONDS:g} s are allowed; "
            "start chrony (or ntpd) on every node",
        )
    return ok(NAME, f"within {MOST_SECONDS:g} s of this machine's on {count(len(off))}")
