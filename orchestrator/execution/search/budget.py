"""What a search has asked so far and may still ask. Plain Python, without Tune."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path

from orchestrator.execution.search.samplers import (
    NON_ADAPTIVE_SAMPLERS,
    SEED,
    BuildConfiguration,
    draw_design,
)
from orchestrator.execution.search.search_file import Point, SearchFile, VariantUsage, space_specs
from orchestrator.record.store import Store
from orchestrator.study.configuration import Configuration
from orchestrator.study.space import Space, Value
from orchestrator.util.errors import UsageError


class SearchBudget:
    """Equal budgets: `points` of each variant of `space`, counting all that was ever asked. `asked` are their
    configurations, by fingerprint, in the order in which they were asked."""

    def __init__(
        self, file: SearchFile, folder: Path, space: Space, build: BuildConfiguration, steps_per_point: int
    ) -> None:
        """`horizon`: the optimizer steps of a point that is not stopped. Raises BadInput when the points of
        the past are not what they would be now."""
        self.file, self.folder, self.space, self.build = file, folder, space, build
        self.steps_per_point = steps_per_point
        self.configurations: dict[str, Configuration] = {}
        self.points: dict[str, Point] = {}
        self.num_asked: Counter[str] = Counter()
        """How many points each variant has been asked for."""
        self.on_point: Callable[[Configuration], None] = lambda configuration: None
        """Called with each new point, after it was written down."""
        for point in file.asked:
            if point.variant not in space.variants or point.fingerprint in self.configurations:
                continue
            configuration = build(point.variant, point.parameters)
            if configuration is None or configuration.fingerprint != point.fingerprint:
                raise UsageError(
                    f"study {folder.name!r}: its search has asked for {_mismatch_reason(point, configuration)}"
                )
            self._register(point, configuration)

    def points_of(self, variant: str) -> list[Point]:
        return [point for point in self.points.values() if point.variant == variant]

    def num_remaining(self, variant: str) -> int:
        """How many points of this variant may still be asked."""
        if variant in self.file.exhausted:
            return 0
        most = min(self.file.points, self.space.size(variant))
        return max(0, int(most) - self.num_asked[variant])

    @property
    def total(self) -> int:
        """All points, asked and still to be asked."""
        return len(self.configurations) + sum(self.num_remaining(variant) for variant in self.space.variants)

    def add_point(self, variant: str, parameters: Mapping[str, Value], configuration: Configuration) -> None:
        """Writes the point down, after `keep`. From now on it counts."""
        point = Point(variant, configuration.task.name, dict(parameters), configuration.fingerprint)
        self.file = self.file.append_point(self.folder, point)
        self._register(point, configuration)
        self.on_point(configuration)

    def add_design(self) -> None:
        """Asks for all that is left, of a sampler that learns nothing. Where another variant has brought
        dimensions of its own, the sequence is another one: a variant then gets what it lacks from that."""
        if not any(map(self.num_remaining, self.space.variants)):
            return
        drawn = draw_design(self.file.sampler, self.space, self.file.points, self.build)
        new: list[Point] = []
        for variant, points in drawn.items():
            for parameters in points:
                configuration = self.build(variant, parameters)
                assert configuration is not None  # the design left these out
                if self.num_remaining(variant) and configuration.fingerprint not in self.configurations:
                    point = Point(variant, configuration.task.name, parameters, configuration.fingerprint)
                    new.append(point)
                    self._register(point, configuration)
        self.file = replace(self.file, asked=(*self.file.asked, *new))

    def mark_exhausted(self, variant: str) -> None:
        """The variant's space has no point that was not asked (a large one: none was found at random)."""
        self._save_search_file(replace(self.file, exhausted=(*self.file.exhausted, variant)))

    def save(self) -> None:
        """Writes all down as it is."""
        self.file.write(self.folder)
        self.file.write_points(self.folder)

    def update_usage(self, store: Store) -> Mapping[str, VariantUsage]:
        """What each variant has spent, by the records of `store`. It is written down, too."""
        spent = {variant: self._variant_usage(variant, store) for variant in self.space.variants}
        self._save_search_file(replace(self.file, spent={**self.file.spent, **spent}))
        return spent

    def _variant_usage(self, variant: str, store: Store) -> VariantUsage:
        states: Counter[str] = Counter()
        steps = 0
        for point in self.points_of(variant):
            record = store.get(point.fingerprint)
            states["missing" if record is None else record.state] += 1
            steps += record.steps if record else 0
        most = self.num_remaining(variant) + len(self.points_of(variant))
        return VariantUsage(
            most, len(self.points_of(variant)), dict(states), steps, most * self.steps_per_point
        )

    def _register(self, point: Point, configuration: Configuration) -> None:
        self.configurations[point.fingerprint], self.points[point.fingerprint] = configuration, point
        self.num_asked[point.variant] += 1

    def _save_search_file(self, file: SearchFile) -> None:
        file.write(self.folder)
        self.file = file


def _mismatch_reason(point: Point, now: Configuration | None) -> str:
    """What tells the point of the past from what it would be now."""
    if now is not None and (raised := _changed_numerics(point, now)):
        return (
            f"points under earlier numerics of the {raised}: this program computes otherwise, "
            "and their results do not count with new ones; take another --study."
        )
    return (
        "points with other settings (steps, rank, model, ...) than these; repeat its options, or take "
        "another --study."
    )


def _changed_numerics(point: Point, now: Configuration) -> str:
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


def open_search(
    folder: Path, sampler: str, points: int, space: Space, build: BuildConfiguration, steps_per_point: int
) -> SearchBudget:
    """The search of the study in `folder`, new or resumed; nothing is written yet. A sampler that learns
    nothing has asked for all its points. Raises BadInput for a study that has searched otherwise."""
    before = SearchFile.read(folder)
    if before is None:
        file = SearchFile(sampler, SEED, points, space_specs(space))
    else:
        file = before.resume(sampler, points, space, folder.name)
    budget = SearchBudget(file, folder, space, build, steps_per_point)
    if sampler in NON_ADAPTIVE_SAMPLERS:
        budget.add_design()
    return budget
