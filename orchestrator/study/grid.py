"""A grid study: its configurations, and the order in which they are trained."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import groupby

from orchestrator.study.configuration import Configuration


def build_grid(
    templates: Sequence[Configuration], learning_rates: Sequence[float], seeds: Iterable[int]
) -> list[Configuration]:
    """Every template (one a variant and task) at every rate and seed."""
    return [
        replace(template, optimizer=replace(template.optimizer, learning_rate=rate), seed=seed)
        for template in templates
        for seed in seeds
        for rate in learning_rates
    ]


def training_order(configurations: Iterable[Configuration], lanes_per_group: int) -> list[Configuration]:
    """Blocks of one variant and task: all its rates, and as many seeds as it takes to fill a pack of `lanes`.

    Blocks with the first seeds come first. Inside a block the order is a seeded shuffle: early stopping that
    meets the rates in ascending order keeps most of a small grid, and a shuffle over variants would leave
    packs nearly empty.
    """

    def block_key(c: Configuration) -> tuple[str, str]:
        return (c.task.name, c.variant.name)

    blocks: list[tuple[int, str, list[Configuration]]] = []
    for key, group in groupby(sorted(configurations, key=block_key), key=block_key):
        members = list(group)
        seeds = sorted({c.seed for c in members})
        rates = len(members) / len(seeds)
        seeds_per_block = max(1, math.ceil(lanes_per_group / rates))
        for start in range(0, len(seeds), seeds_per_block):
            chosen = set(seeds[start : start + seeds_per_block])
            block = sorted((c for c in members if c.seed in chosen), key=lambda c: c.fingerprint)
            random.Random(f"{key}{start}").shuffle(block)
            blocks.append((start, str(key), block))
    blocks.sort(key=lambda block: block[:2])
    return [c for _, _, block in blocks for c in block]
