"""`search.json`: what a search may ask for and what it has asked, kept in the study's folder.

A point is written before anyone trains it, so that after a crash it is trained and not asked anew; what came
of it is its record, in the store.

<output>/<study>/search.json
{"sampler", "seed", "points", "spaces": {variant: {name: spec}}, "asked": [{"variant", "task", "parameters",
 "fingerprint"}, ...], "exhausted": [variant, ...], "spent": {variant: {...}}}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from orchestrator.record import files
from orchestrator.study.errors import BadInput
from orchestrator.study.space import Space

FILE = "search.json"


@dataclass(frozen=True)
class Point:
    variant: str
    task: str
    parameters: Mapping[str, float | int | str | bool]
    fingerprint: str


@dataclass(frozen=True)
class Spent:
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
    spent: Mapping[str, Spent] = field(default_factory=dict)

    def resumed(self, sampler: str, points: int, space: Space, study: str) -> SearchFile:
        """This search, to go on with the variants of `space` and `points` of each. Raises BadInput where it
        would be another search."""
        other = "take another --study"
        if sampler != self.sampler:
            raise BadInput(
                f"--search: study {study!r} has searched with {self.sampler}, not {sampler}; {other}."
            )
        for variant, spec in specs(space).items():
            before = self.spaces.get(variant, spec)
            for name in [*before, *spec]:
                then, now = before.get(name, "nothing"), spec.get(name, "nothing")
                if then != now:
                    raise BadInput(
                        f"--space: study {study!r} has searched {variant}'s {name} in {then}, now it would "
                        f"be {now}; {other}."
                    )
        more = points > self.points
        return replace(
            self,
            points=points,
            spaces={**self.spaces, **specs(space)},
            exhausted=() if more else self.exhausted,
        )

    def write(self, folder: Path) -> None:
        """Replaces `folder`/search.json at once."""
        files.replace(folder / FILE, (json.dumps(asdict(self), indent=1) + "\n").encode())

    @classmethod
    def read(cls, folder: Path) -> SearchFile | None:
        """None when the folder holds no search. Raises BadInput on a file that is not one."""
        path = folder / FILE
        try:
            text = path.read_text()
        except (FileNotFoundError, NotADirectoryError):
            return None
        from pydantic import TypeAdapter, ValidationError

        try:
            return TypeAdapter(cls).validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise BadInput(
                f"{path}: not a search ({where + ': ' if where else ''}{first['msg']}); take another --study"
            ) from error


def specs(space: Space) -> dict[str, dict[str, str]]:
    return {variant: {d.key: d.text for d in dimensions} for variant, dimensions in space.variants.items()}
