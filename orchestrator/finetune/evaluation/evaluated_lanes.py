"""The lanes that are evaluated together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from variants.attach import Adapters


@dataclass(frozen=True)
class EvaluatedLanes:
    """Lanes that are evaluated together, or the base model without adapters as a single lane."""

    seeds: Sequence[int]
    """The seed of each lane, which decides what is sampled for its answers."""
    activate: Callable[[], AbstractContextManager[Any]]
    """Makes a context in which the model treats its rows as those of the lanes, one lane after another, with
    an equal number of rows for each."""

    @classmethod
    def of(cls, adapters: Adapters, names: Sequence[str], seeds: Sequence[int]) -> EvaluatedLanes:
        """Return the named lanes of `adapters`.

        Args:
            adapters: The adapters of the model.
            names: The names of the lanes.
            seeds: The seed of each lane.
        """
        return cls(seeds, partial(adapters.activate_lanes, names, None))

    @classmethod
    def without_adapters(cls, adapters: Adapters) -> EvaluatedLanes:
        """Return the base model, without adapters, as one lane."""
        return cls([0], adapters.disable_adapters)
