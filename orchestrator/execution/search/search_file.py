"""What a search may ask for and what it has asked, kept in the study's folder.

A point is written before anyone trains it, so that after a crash it is trained and not asked anew; what came
of it is its record, in the store. One more point is one more line: a long search writes no file again.

<output>/<study>/search.json
{"sampler", "seed", "points", "spaces": {variant: {name: spec}}, "exhausted": [variant, ...],
 "spent": {variant: {...}}}
<output>/<study>/search.jsonl, a line each
{"variant", "task", "parameters", "fingerprint"}
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from orchestrator.execution.search.samplers import MAX_ENUMERATED_POINTS
from orchestrator.study.space import Space
from orchestrator.util import atomic_files
from orchestrator.util.errors import UsageError

SEARCH_FILE, POINTS_FILE = "search.json", "search.jsonl"
_READ_ERROR_WORDS = ("a search", "take another --study")  # what is said of such a file
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Point:
    variant: str
    task: str
    parameters: Mapping[str, float | int | str | bool]
    fingerprint: str


@dataclass(frozen=True)
class VariantUsage:
    """What a variant's part of a search has cost so far. `asked` of `points`, by state; the optimizer steps
    that its records hold, of those that all `points` to the end would take."""

    points: int
    asked: int
    states: Mapping[str, int]
    steps: int
    most_steps: int


@dataclass(frozen=True)
class SearchFile:
    sampler: str
    seed: int
    points: int
    """Of each variant."""
    spaces: Mapping[str, Mapping[str, str]]
    asked: tuple[Point, ...] = ()
    exhausted: tuple[str, ...] = ()
    """Variants whose space has no more points."""
    spent: Mapping[str, VariantUsage] = field(default_factory=dict)

    def resume(self, sampler: str, points: int, space: Space, study: str) -> SearchFile:
        """This search, to go on with the variants of `space` and `points` of each. Raises BadInput where it
        would be another search."""
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
        # A large space was not looked through: its next points may be found.
        sure = [
            v for v in self.exhausted if v not in space.variants or space.size(v) <= MAX_ENUMERATED_POINTS
        ]
        return replace(
            self, points=points, spaces={**self.spaces, **space_specs(space)}, exhausted=tuple(sure)
        )

    def write(self, folder: Path) -> None:
        """Replaces `folder`/search.json at once; without the points."""
        atomic_files.write_atomically(
            folder / SEARCH_FILE,
            atomic_files.add_checksum(json.dumps(asdict(replace(self, asked=())), indent=1)),
        )

    def write_points(self, folder: Path) -> None:
        """Replaces `folder`/search.jsonl at once."""
        atomic_files.write_atomically(folder / POINTS_FILE, b"".join(map(_point_line, self.asked)))

    def append_point(self, folder: Path, point: Point) -> SearchFile:
        """This search with one more point, which is then in `folder`/search.jsonl."""
        with (folder / POINTS_FILE).open("ab") as file:
            file.write(_point_line(point))
            file.flush()
            os.fsync(file.fileno())
        return replace(self, asked=(*self.asked, point))

    @classmethod
    def read(cls, folder: Path) -> SearchFile | None:
        """None when the folder holds no search. Raises BadInput on files that are not one. A last line that
        is cut off, by a crash while it was written, was given to nobody: it is left out, with a warning."""
        file: SearchFile | None = atomic_files.read_json(folder / SEARCH_FILE, cls, *_READ_ERROR_WORDS)
        if file is None:
            if (folder / POINTS_FILE).exists():
                raise UsageError(
                    f"{folder / SEARCH_FILE}: is gone, and {POINTS_FILE} is there; put it back, or take another --study"
                )
            return None
        path = folder / POINTS_FILE
        try:
            *lines, rest = path.read_bytes().split(b"\n")
        except FileNotFoundError:
            lines, rest = [], b""
        if rest:
            _log.warning("%s: its last line is torn: left out", path)
        points = (
            atomic_files.parse_json(line, Point, f"{path}, line {n}", *_READ_ERROR_WORDS)
            for n, line in enumerate(lines, 1)
        )
        found = replace(file, asked=(*file.asked, *points))
        counts = Counter(point.variant for point in found.asked)
        for variant, spent in file.spent.items():
            if counts[variant] < spent.asked:
                raise UsageError(
                    f"{path}: holds {counts[variant]} points of {variant}, of {spent.asked} that this search "
                    "has asked for; put the whole file back, or take another --study"
                )
        return found


def _point_line(point: Point) -> bytes:
    return atomic_files.add_checksum(json.dumps(asdict(point)))


def space_specs(space: Space) -> dict[str, dict[str, str]]:
    return {
        variant: {d.key: d.spec_text for d in dimensions} for variant, dimensions in space.variants.items()
    }
