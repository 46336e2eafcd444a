"""The settings of a search and the points and steps that it has spent, kept in `<study>/search.json`.

The points themselves are in Optuna's journal beside it (journal.py).

    {"sampler", "seed", "points", "spaces": {variant: {name: spec}}, "exhausted": [variant, ...],
     "spent": {variant: {...}}}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from orchestrator.execution.search.samplers import MAX_ENUMERATED_POINTS
from orchestrator.study.space import Space
from orchestrator.util import atomic_files
from orchestrator.util.errors import UsageError

SEARCH_FILE = "search.json"


@dataclass(frozen=True)
class VariantUsage:
    """The points and steps that a search has spent on one variant so far."""

    points: int
    """Number of points that the variant may have."""
    asked: int
    """Number of points that were asked for."""
    states: Mapping[str, int]
    """Number of these points by the state of their record; "missing" without a record."""
    steps: int
    """Optimizer steps in these records."""
    most_steps: int
    """Optimizer steps that all points would take if none were stopped early."""


@dataclass(frozen=True)
class SearchFile:
    """The settings of a search."""

    sampler: str
    seed: int
    points: int
    """Points of each variant."""
    spaces: Mapping[str, Mapping[str, str]]
    """The space of each variant: the specification of each dimension by its name."""
    exhausted: tuple[str, ...] = ()
    """Variants whose space has no further points."""
    spent: Mapping[str, VariantUsage] = field(default_factory=dict)

    def resume(self, sampler: str, points: int, space: Space, study: str) -> SearchFile:
        """Return the settings for continuing this search with `points` points of each variant of `space`.

        Raises:
            UsageError: The sampler or the space differs, or there are fewer points.
        """
        other = "take another --study"
        if sampler != self.sampler:
            raise UsageError(
                f"--search: study {study!r} has searched with {self.sampler}, not {sampler}; {other}."
            )
        for variant, spec in space_specs(space).items():
            before = self.spaces.get(variant, spec)
            for name in [*before, *spec]:
                then, now = before.get(name, "nothing"), spec.get(name, "nothing")
                if then != now:
                    raise UsageError(
                        f"--space: study {study!r} has searched {variant}'s {name} in {then}, now it would "
                        f"be {now}; {other}."
                    )
        if points < self.points:
            raise UsageError(
                f"--points {points}: study {study!r} asks for {self.points} of each variant, and budgets "
                f"stay equal; take {self.points} or more, or another --study."
            )
        # A large space is not searched exhaustively, so another run may find further points.
        exhausted = tuple(
            v for v in self.exhausted if v not in space.variants or space.size(v) <= MAX_ENUMERATED_POINTS
        )
        return replace(self, points=points, spaces={**self.spaces, **space_specs(space)}, exhausted=exhausted)

    def write(self, folder: Path) -> None:
        """Replace `folder`/search.json atomically."""
        text = json.dumps(asdict(self), indent=1)
        atomic_files.write_atomically(folder / SEARCH_FILE, atomic_files.add_checksum(text))

    @classmethod
    def read(cls, folder: Path) -> SearchFile | None:
        """Read `folder`/search.json. Returns None if the file does not exist.

        Raises:
            UsageError: The file is damaged.
        """
        return atomic_files.read_json(folder / SEARCH_FILE, cls, "a search", "take another --study")


def space_specs(space: Space) -> dict[str, dict[str, str]]:
    """Return the specification of each dimension, as it was typed, by variant and name."""
    return {variant: {d.key: d.spec_text for d in each} for variant, each in space.variants.items()}
