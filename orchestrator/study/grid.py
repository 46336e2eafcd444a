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

    They are trained in blocks of one variant and task, with all its rates and as many seeds as fill a lane
    group. Blocks with the first seeds come first. Inside a block the order is shuffled with a fixed seed,
    because early stopping keeps most of a small grid if the rates ascend. Variants are not mixed, because
    lane groups would then be nearly empty.

    Args:
        configurations: The configurations of a study.
        lanes_per_group: Lanes in a full lane group.
    """
    by_variant: dict[tuple[str, str], list[Configuration]] = defaultdict(list)
    for c in configurations:
        by_variant[c.task.name, c.variant.name].append(c)
    blocks: list[tuple[int, str, list[Configuration]]] = []
    for key, members in by_variant.items():
        seeds = sorted({c.seed for c in members})
        seeds_per_block = max(1, math.ceil(lanes_per_group / (len(members) / len(seeds))))
        for start in range(0, len(seeds), seeds_per_block):
            chosen = set(seeds[start : start + seeds_per_block])
            block = sorted((c for c in members if c.seed in chosen), key=lambda c: c.fingerprint)
            random.Random(f"{key}{start}").shuffle(block)
            blocks.append((start, str(key), block))
    return [c for _, _, block in sorted(blocks, key=lambda block: block[:2]) for c in block]
