"""Whether the nodes' clocks agree: records and checkpoints of several nodes are ordered by their times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.cluster.preflight.check_result import (
    CheckResult,
    failed_result,
    format_node_count,
    ok_result,
    shorten_list,
)
from orchestrator.util import timeouts

CHECK_NAME = "clock"
SAMPLES_PER_NODE = 3
"""Readings per node. The one with the smallest proven offset counts."""


@dataclass(frozen=True)
class ClockSample:
    """One reading of a node's clock. All times are seconds since the epoch."""

    sent_at: float
    """Time of this machine when the node was asked."""
    node_time: float
    """Time of the node."""
    received_at: float
    """Time of this machine when the answer arrived."""

    @property
    def min_offset(self) -> float:
        """The smallest offset of the node's clock, in seconds, that explains the reading.

        A correct clock is read between question and answer, so any time in between gives 0.
        """
        if self.node_time < self.sent_at:
            return self.node_time - self.sent_at
        return max(0.0, self.node_time - self.received_at)


def check_clocks(samples: Mapping[str, Sequence[ClockSample]]) -> CheckResult:
    """Check that no clock is off by more than `MAX_CLOCK_OFFSET_SECONDS`: node address -> readings."""
    offsets = {
        node: min((sample.min_offset for sample in readings), key=abs)
        for node, readings in samples.items()
        if readings
    }
    limit = timeouts.MAX_CLOCK_OFFSET_SECONDS
    wrong = [f"{node} by {offset:+.1f} s" for node, offset in offsets.items() if abs(offset) > limit]
    if wrong:
        return failed_result(
            CHECK_NAME,
            f"clocks differ from this machine's: {shorten_list(wrong)}; at most {limit:g} s are allowed; "
            "start chrony (or ntpd) on every node",
        )
    return ok_result(CHECK_NAME, f"within {limit:g} s of this machine's on {format_node_count(len(offsets))}")
