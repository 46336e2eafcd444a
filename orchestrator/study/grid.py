"""The configurations of a grid study, and the order in which they are trained."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

from orchestrator.study.configuration import Configuration


def build_grid(
    templates: Sequence[Configuration], learning_rates: Sequence[float], seeds: Iterable[int]
) -> list[Configuration]:
    """Return every template at every learning rate and seed.

    Args:
        templates: One configuration for each variant and task.
        learning_rates: The learning rates.
        seeds: The seeds.
    """
    return [
        replace(template, optimizer=replace(template.optimizer, learning_rate=rate), seed=seed)
        for template in templates
        for seed in seeds
        for rate in learning_rates
    ]


def training_order(configurations: Iterable[Configuration], lanes_per_group: int) -> list[Configuration]:
    """Return configurations in training order.

    They are trained in blocks of one variant and task. A block is the smallest number of full lane groups
    that holds all rates of a seed. Only the last block of a variant may be smaller. Blocks with the first
    seeds come first. The rates of a seed are shuffled deterministically, because early stopping would stop
    few lanes of a small grid in ascending order. Variants are not mixed, because lane groups would then be
    nearly empty.

    Args:
        configurations: The configurations of a study.
        lanes_per_group: Lanes in a full lane group.
    """
    by_variant: dict[tuple[str, str], dict[int, list[Configuration]]] = defaultdict(lambda: defaultdict(list))
    for c in sorted(configurations, key=lambda c: (c.seed, c.fingerprint)):
        by_variant[c.task.name, c.variant.name][c.seed].append(c)
    blocks: list[tuple[int, str, list[Configuration]]] = []
    for key, by_seed in by_variant.items():
        for seed, rates in by_seed.items():
            random.Random(f"{key}{seed}").shuffle(rates)
        members = [c for rates in by_seed.values() for c in rates]
        size = lanes_per_group * math.ceil(len(members) / len(by_seed) / lanes_per_group)
        blocks += [(start, str(key), members[start : start + size]) for start in range(0, len(members), size)]
    return [c for _, _, block in sorted(blocks, key=lambda block: block[:2]) for c in block]
