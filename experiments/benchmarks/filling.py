"""Simulate how full the lane groups of a study are: the real broker on a virtual clock, without Ray.

    python experiments/benchmarks/filling.py
    python experiments/benchmarks/filling.py --open-trials 9 --early 0.3

The study has five variants, eleven rates and three seeds, in the training order of the program. Prints a
table with one row per number of trainers: the shares of the lane-steps that are trained in full groups and
alone, the hours of the study, and its hours if every group were full and no trainer idle.
"""

from __future__ import annotations

import argparse
import heapq
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count

from markdown_table import markdown_table
from scale import VARIANTS, template

from orchestrator.execution.broker.core import BrokerCore
from orchestrator.study.configuration import Configuration
from orchestrator.study.grid import build_grid, training_order
from orchestrator.util.command import main

RATES = [float(f"{10 ** (-5 + power / 3):.1e}") for power in range(11)]
STEPS = 1800
SECONDS_PER_LANE_STEP = (0.48, 0.29, 0.27, 0.255)
"""For one to four lanes, predicted for Qwen3-0.6B on an H100 with Liger's kernels."""
POLL_SECONDS = 5.0
TRIAL_SECONDS = 1.0
"""Seconds from the end of a trial until the next one has submitted its configuration."""


@dataclass
class SimulatedTrainer:
    """A trainer that asks for lanes as the fine-tuning loop does.

    A trainer without lanes asks for one lane first, and then for as many as still fit.
    """

    name: str
    max_lanes: int
    steps_left: dict[str, float] = field(default_factory=dict)
    """Fingerprint of each lane -> its steps to the end."""
    leased: dict[str, tuple[int, Configuration]] = field(default_factory=dict)
    known: set[str | None] = field(default_factory=set)
    """The group keys whose memory it has measured. The first lane of any other group key trains alone until
    the next poll."""
    since: float = 0.0
    """The time up to which the lanes have been trained."""

    @property
    def seconds_per_step(self) -> float:
        """The seconds in which every lane takes a step."""
        lanes = len(self.steps_left)
        return lanes * SECONDS_PER_LANE_STEP[min(lanes, len(SECONDS_PER_LANE_STEP)) - 1]

    def train_until(self, now: float) -> tuple[float, list[str]]:
        """Train the lanes up to `now`.

        Returns:
            The number of steps that each lane took, and the fingerprints of the lanes that have ended.
        """
        steps = (now - self.since) / self.seconds_per_step if self.steps_left else 0.0
        self.since = now
        for fingerprint in self.steps_left:
            self.steps_left[fingerprint] -= steps
        return steps, [fingerprint for fingerprint, left in self.steps_left.items() if left < 1e-6]

    def lease(self, core: BrokerCore, steps: dict[str, float], now: float) -> None:
        """Report the leases to the broker, and lease lanes until the group is full or the broker has none.

        Args:
            core: The broker.
            steps: Fingerprint -> number of steps of the lane.
            now: The time on the virtual clock, in seconds.
        """
        while (free := self.max_lanes - len(self.steps_left)) > 0:
            held = {name: (*lease, None) for name, lease in self.leased.items()}
            core.exchange(self.name, held, 0, now)
            core.trainers[self.name].max_lanes = self.max_lanes
            group_key = next((one.group_key for _, one in self.leased.values()), None)
            grant = core.lease(self.name, group_key, free if self.leased else 1, now)
            if not grant.leases:
                return
            for lease in grant.leases:
                fingerprint = lease.configuration.fingerprint
                self.leased[fingerprint] = (lease.attempt, lease.configuration)
                self.steps_left[fingerprint] = steps[fingerprint]
            group_key = grant.leases[0].configuration.group_key
            if group_key not in self.known:
                self.known.add(group_key)
                return

    def next_turn(self, now: float) -> float:
        """Return the time at which a lane ends, or of the next poll if that is earlier."""
        ends = [now + left * self.seconds_per_step for left in self.steps_left.values()]
        return min(ends if len(ends) == self.max_lanes else [*ends, now + POLL_SECONDS])


def simulate(
    order: Sequence[Configuration], trainers: int, lanes: int, open_trials: int, early: float = 0.0
) -> tuple[dict[int, float], float]:
    """Train a study on a virtual clock.

    Args:
        order: The configurations, in the order of their submission.
        trainers: The number of trainers.
        lanes: The lanes of each trainer.
        open_trials: The number of trials that are submitted at once.
        early: The share of lanes that diverge, after a random number of steps.

    Returns:
        The number of lane-steps by size of the lane group, and the hours from the first lane to the last.
    """
    core, draw, queue = BrokerCore(), random.Random(0), iter(order)
    steps = {c.fingerprint: STEPS * (draw.random() if draw.random() < early else 1.0) for c in order}
    lane_steps: dict[int, float] = defaultdict(float)
    numbers, pool = count(), [SimulatedTrainer(f"t{i}.0", lanes) for i in range(trainers)]
    turns = [(0.1 * i, next(numbers), one) for i, one in enumerate(pool)]
    submissions = [0.0] * open_trials
    num_left, now = len(order), 0.0
    while num_left:
        if submissions and (not turns or submissions[0] <= turns[0][0]):
            now = heapq.heappop(submissions)
            if (configuration := next(queue, None)) is not None:
                core.submit(configuration.fingerprint, configuration, now)
            continue
        now, _, trainer = heapq.heappop(turns)
        size = len(trainer.steps_left)
        taken, ended = trainer.train_until(now)
        lane_steps[size] += size * taken
        for fingerprint in ended:
            attempt, _ = trainer.leased.pop(fingerprint)
            del trainer.steps_left[fingerprint]
            core.end_lease(trainer.name, fingerprint, attempt, "finished", now)
            num_left -= 1
            heapq.heappush(submissions, now + TRIAL_SECONDS)
        trainer.lease(core, steps, now)
        heapq.heappush(turns, (trainer.next_turn(now), next(numbers), trainer))
    return lane_steps, now / 3600


def default_study(lanes: int) -> list[Configuration]:
    """Return the 165 configurations of the default study, in training order."""
    return training_order(build_grid([template(name, STEPS) for name in VARIANTS], RATES, range(3)), lanes)


def run() -> int:
    """Simulate the study with each number of trainers and print a table. Returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trainers", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--lanes", type=int, default=4, help="lanes of each trainer")
    parser.add_argument("--open-trials", type=int, help="trials per trainer; by default one more than lanes")
    parser.add_argument("--early", type=float, default=0.0, help="share of lanes that diverge")
    options = parser.parse_args()
    each = options.open_trials or options.lanes + 1
    order, rows = default_study(options.lanes), []
    for trainers in options.trainers:
        by_size, hours = simulate(order, trainers, options.lanes, trainers * each, options.early)
        total = sum(by_size.values())
        least = total * SECONDS_PER_LANE_STEP[-1] / trainers / 3600
        full, alone = (100 * by_size[size] / total for size in (options.lanes, 1))
        rows.append(
            (trainers, trainers * each, f"{full:.0f}", f"{alone:.0f}", f"{hours:.1f}", f"{least:.1f}")
        )
    header = ("trainers", "open trials", "full, %", "alone, %", "hours", "hours if always full")
    print(markdown_table(header, rows))
    return 0


if __name__ == "__main__":
    main(run)
