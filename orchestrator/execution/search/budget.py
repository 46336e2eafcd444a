"""What a search has asked so far and may still ask. Plain Python, without Tune."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path

from orchestrator.execution.search.samplers import DESIGNS, SEED, Build, design
from orchestrator.execution.search.search_file import Point, SearchFile, Spent, specs
from orchestrator.record.store import Store
from orchestrator.study.configuration import Configuration
from orchestrator.study.space import Space, Value
from orchestrator.util.errors import BadInput


class Ledger:
    """Equal budgets: `points` of each variant of `space`, counting all that was ever asked. `asked` are their
    configurations, by fingerprint, in the order in which they were asked."""

    def __init__(self, file: SearchFile, folder: Path, space: Space, build: Build, horizon: int) -> None:
        """`horizon`: the optimizer steps of a point that is not stopped. Raises BadInput when the points of
        the past are not what they would be now."""
        self.file, self.folder, self.space, self.build = file, folder, space, build
        self.horizon = horizon
        self.asked: dict[str, Configuration] = {}
        self.points: dict[str, Point] = {}
        self.counts: Counter[str] = Counter()
        """How many points each variant has been asked for."""
        self.told: Callable[[Configuration], None] = lambda configuration: None
        """Called with each new point, after it was written down."""
        for point in file.asked:
            if point.variant not in space.variants or point.fingerprint in self.asked:
                continue
            configuration = build(point.variant, point.parameters)
            if configuration is None or configuration.fingerprint != point.fingerprint:
                raise BadInput(
                    f"study {folder.name!r}: its search has asked for {_why(point, configuration)}"
                )
            self._count(point, configuration)

    def of(self, variant: str) -> list[Point]:
        return [point for point in self.points.values() if point.variant == variant]

    def left(self, variant: str) -> int:
        """How many points of this variant may still be asked."""
        if variant in self.file.exhausted:
            return 0
        most = min(self.file.points, self.space.size(variant))
        return max(0, int(most) - self.counts[variant])

    @property
    def total(self) -> int:
        """All points, asked and still to be asked."""
        return len(self.asked) + sum(self.left(variant) for variant in self.space.variants)

    def ask(self, variant: str, parameters: Mapping[str, Value], configuration: Configuration) -> None:
        """Writes the point down, after `keep`. From now on it counts."""
        point = Point(variant, configuration.task.name, dict(parameters), configuration.fingerprint)
        self.file = self.file.with_point(self.folder, point)
        self._count(point, configuration)
        self.told(configuration)

    def ask_design(self) -> None:
        """Asks for all that is left, of a sampler that learns nothing. Where another variant has brought
        dimensions of its own, the sequence is another one: a variant then gets what it lacks from that."""
        if not any(map(self.left, self.space.variants)):
            return
        drawn = design(self.file.sampler, self.space, self.file.points, self.build)
        new: list[Point] = []
        for variant, points in drawn.items():
            for parameters in points:
                configuration = self.build(variant, parameters)
                assert configuration is not None  # the design left these out
                if self.left(variant) and configuration.fingerprint not in self.asked:
                    point = Point(variant, configuration.task.name, parameters, configuration.fingerprint)
                    new.append(point)
                    self._count(point, configuration)
        self.file = replace(self.file, asked=(*self.file.asked, *new))

    def exhaust(self, variant: str) -> None:
        """The variant's space has no point that was not asked (a large one: none was found at random)."""
        self._replace(replace(self.file, exhausted=(*self.file.exhausted, variant)))

    def keep(self) -> None:
        """Writes all down as it is."""
        self.file.write(self.folder)
        self.file.write_points(self.folder)

    def spent(self, store: Store) -> Mapping[str, Spent]:
        """What each variant has spent, by the records of `store`. It is written down, too."""
        spent = {variant: self._spent(variant, store) for variant in self.space.variants}
        self._replace(replace(self.file, spent={**self.file.spent, **spent}))
        return spent

    def _spent(self, variant: str, store: Store) -> Spent:
        states: Counter[str] = Counter()
        steps = 0
        for point in self.of(variant):
            record = store.get(point.fingerprint)
            states["missing" if record is None else record.state] += 1
            steps += record.steps if record else 0
        most = self.left(variant) + len(self.of(variant))
        return Spent(most, len(self.of(variant)), dict(states), steps, most * self.horizon)

    def _count(self, point: Point, configuration: Configuration) -> None:
        self.asked[point.fingerprint], self.points[point.fingerprint] = configuration, point
        self.counts[point.variant] += 1

    def _replace(self, file: SearchFile) -> None:
        file.write(self.folder)
        self.file = file


def _why(point: Point, now: Configuration | None) -> str:
    """What tells the point of the past from what it would be now."""
    if now is not None and (raised := _raised(point, now)):
        return (
            f"points under earlier numerics of the {raised}: this program computes otherwise, "
            "and their results do not count with new ones; take another --study."
        )
    return (
        "points with other settings (steps, rank, model, ...) than these; repeat its options, or take "
        "another --study."
    )


def _raised(point: Point, now: Configuration) -> str:
    """Whose numerics were raised since: with lower ones it would be the point."""
    variant, task, loop = now.variant.numerics, now.task.numerics, now.loop_numerics
    for a, b, c in product(range(1, variant + 1), range(1, task + 1), range(1, loop + 1)):
        of_then = replace(
            now,
            variant=replace(now.variant, numerics=a),
            task=replace(now.task, numerics=b),
            loop_numerics=c,
        )
        if of_then.fingerprint == point.fingerprint:
            pairs = ((f"variant {now.variant.name}", a < variant), ("task", b < task), ("loop", c < loop))
            return " and ".join(name for name, lower in pairs if lower)
    return ""


def opened(folder: Path, sampler: str, points: int, space: Space, build: Build, horizon: int) -> Ledger:
    """The search of the study in `folder`, new or resumed; nothing is written yet. A sampler that learns
    nothing has asked for all its points. Raises BadInput for a study that has searched otherwise."""
    before = SearchFile.read(folder)
    if before is None:
        file = SearchFile(sampler, SEED, points, specs(space))
    else:
        file = before.resumed(sampler, points, space, folder.name)
    ledger = Ledger(file, folder, space, build, horizon)
    if sampler in DESIGNS:
        ledger.ask_design()
    return ledger
