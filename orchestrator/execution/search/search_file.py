"""`<study>/search.json`: the settings of a search, and the points and steps that it has spent.

The points themselves are in Optuna's journal beside it (journal.py).

    {"sampler", "points", "spaces": {group: {name: spec}}, "exhausted": [group, ...], "spent": {group: {...}},
     "task"}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from orchestrator.execution.search.groups import SearchGroup
from orchestrator.execution.search.samplers import MAX_ENUMERATED_POINTS
from orchestrator.util import atomic_files
from orchestrator.util.errors import UsageError

SEARCH_FILE = "search.json"


@dataclass(frozen=True)
class GroupUsage:
    """The points and steps that a search has spent on one group so far."""

    points: int
    """Number of points that the group may have."""
    asked: int
    """Number of points that were asked for."""
    states: Mapping[str, int]
    """State of the record, or "missing" without a record -> number of points."""
    steps: int
    """Optimizer steps in these records."""
    most_steps: int
    """Optimizer steps that all points would take if none were stopped early."""


@dataclass(frozen=True)
class SearchFile:
    """The settings of a search, and its usage so far."""

    sampler: str
    points: int
    """Number of points of each group."""
    spaces: Mapping[str, Mapping[str, str]]
    """Group -> name of a dimension -> its specification."""
    exhausted: tuple[str, ...] = ()
    """Groups whose space has no further points."""
    spent: Mapping[str, GroupUsage] = field(default_factory=dict)
    """Group -> its usage."""
    task: str = ""
    """Name of the first task of the search. `groups.group_name` leaves it out."""

    def resume(self, sampler: str, points: int, groups: Mapping[str, SearchGroup], study: str) -> SearchFile:
        """Return the settings for continuing this search.

        Args:
            sampler: The sampler's name.
            points: Number of points of each group.
            groups: The groups to be searched now, by name.
            study: The study's name, for the error messages.

        Raises:
            UsageError: The sampler or the space differs, or there are fewer points.
        """
        other = "take another --study"
        if sampler != self.sampler:
            raise UsageError(
                f"--search: study {study!r} has searched with {self.sampler}, not {sampler}; {other}."
            )
        specs = {name: group.specs for name, group in groups.items()}
        for group, spec in specs.items():
            before = self.spaces.get(group, spec)
            for name in [*before, *spec]:
                then, now = before.get(name, "nothing"), spec.get(name, "nothing")
                if then != now:
                    raise UsageError(
                        f"--space: study {study!r} has searched {group}'s {name} in {then}, now it would "
                        f"be {now}; {other}."
                    )
        if points < self.points:
            raise UsageError(
                f"--points {points}: study {study!r} asks for {self.points} of each variant, and budgets "
                f"stay equal; take {self.points} or more, or another --study."
            )
        # A large space is not searched exhaustively, so another run may find further points.
        exhausted = tuple(
            name
            for name in self.exhausted
            if name not in groups or groups[name].size <= MAX_ENUMERATED_POINTS
        )
        return replace(self, points=points, spaces={**self.spaces, **specs}, exhausted=exhausted)

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
