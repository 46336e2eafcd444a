"""A few variants for the default run, where a test has every variant of the catalogue."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

KINDS = (
    "adalora",
    "dora",
    "eva",
    "full",
    "head_only",
    "hira",
    "lora",
    "lora_moe",
    "pissa",
    "relora",
    "vera",
)
"""Variants of which each uses another part of the contract."""


def others_slow(names: Iterable[str]) -> list[Any]:
    """Return all names; those that are not in `KINDS` are marked `slow`."""
    return [name if name in KINDS else pytest.param(name, marks=pytest.mark.slow) for name in names]
