"""Whether clocks agree: records and checkpoints of several nodes are told apart by their times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.cluster.preflight.check_result import CheckResult, failed_result, ok_result, shorten_list
from orchestrator.cluster.preflight.check_result import format_node_count as count

CHECK_NAME = "clock"
MAX_OFFSET_SECONDS = 2.0
SAMPLES_PER_NODE = 3
"""How often a node is asked: the quickest answer counts."""


@dataclass(frozen=True)
class ClockSample:
    """A node's clock, asked once; seconds since the epoch."""

    sent_at: float
    node_time: float
    received_at: float

    @property
    def min_offset(self) -> float:
        """By how much the node's clock is wrong at least: what it said lies between question and answer
        otherwise."""
        if self.node_time < self.sent_at:
            return self.node_time - self.sent_at
        return max(0.0, self.node_time - self.received_at)


def check_clocks(samples: Mapping[str, Sequence[ClockSample]]) -> CheckResult:
    """`nodes`: by address."""
    offsets = {node: min((t.min_offset for t in ticks), key=abs) for node, ticks in samples.items() if ticks}
    wrong = [
        f"{node} by {seconds:+.1f} s"
        for node, seconds in offsets.items()
        if abs(seconds) > MAX_OFFSET_SECONDS
    ]
    if wrong:
        return failed_result(
            CHECK_NAME,
            f"not this machine's time: {shorten_list(wrong)}; at most {MAX_OFFSET_SECONDS:g} s are allowed; "
            "start chrony (or ntpd) on every node",
        )
    return ok_result(
        CHECK_NAME, f"within {MAX_OFFSET_SECONDS:g} s of this machine's on {count(len(offsets))}"
    )
