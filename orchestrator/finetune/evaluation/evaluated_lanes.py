"""The lanes that are evaluated together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class EvaluatedLanes:
    """Lanes that are evaluated together, or the base model without adapters as a single lane."""

    seeds: Sequence[int]
    """The seed of each lane, which decides what is sampled for its answers."""
    activate: Callable[[], AbstractContextManager[Any]]
    """Makes a context in which the model treats its rows as those of the lanes, one lane after another, with
    an equal number of rows for each."""
