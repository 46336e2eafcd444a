"""The points that a search has asked for, and the number of points that remain. No Ray is imported."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path

from optuna.trial import FrozenTrial

from orchestrator.execution.search.journal import EARLIER_FILE, JOURNAL_FILE, Point, read_points
from orchestrator.execution.search.samplers import (
    NON_ADAPTIVE_SAMPLERS,
    SEED,
    BuildConfiguration,
    draw_design,
)
from orchestrator.execution.search.search_file import SEARCH_FILE, SearchFile, VariantUsage, space_specs
from orchestrator.record.store import Store
from orchestrator.study.configuration import Configuration
from orchestrator.study.space import Space, Value
from orchestrator.util.errors import UsageError


class SearchBudget:
    """The points of a search: the same number for each variant, counted over all runs of the study.

    Attributes:
        file: The settings of the search.
        configurations: The configurations of all points by fingerprint, in the order in which they were asked
            for.
        points: The points in the same order.
        num_asked: Number of points that were asked for, by variant.
        other_trials: Trials of variants that earlier runs have searched and this run does not, by variant.
        on_point: Called with the configuration of each new point after the point was written.
    """

    def __init__(
        self, file: SearchFile, folder: Path, space: Space, build: BuildConfiguration, steps_per_point: int
    ) -> None:
        """Make a budget without points.

        Args:
            file: The settings of the search.
            folder: The study's folder.
            space: The space that is searched now.
            build: Makes a configuration from a variant and values; returns None if the variant refuses them.
            steps_per_point: Optimizer steps of a point that is not stopped early.
        """
        self.file, self.folder, self.space, self.build = file, folder, space, build
        self.steps_per_point = steps_per_point
        self.configurations: dict[str, Configuration] = {}
        self.points: dict[str, Point] = {}
        self.num_asked: Counter[str] = Counter()
        self.other_trials: Mapping[str, list[FrozenTrial]] = {}
        self.on_point: Callable[[Configuration], None] = lambda configuration: None

    def restore(self) -> None:
        """Count the points of earlier runs.

        Raises:
            UsageError: The journal is damaged, or a point would be another configuration now.
        """
        points, self.other_trials = read_points(self.folder, self.space, self.file.spaces)
        for point in points:
            if point.fingerprint in self.configurations:
                continue
            configuration = self.build(point.variant, point.parameters)
            if configuration is None or configuration.fingerprint != point.fingerprint:
                reason = _mismatch_reason(point, configuration)
                raise UsageError(f"study {self.folder.name!r}: its search has asked for {reason}")
            self._register(point, configuration)

    def points_of(self, variant: str) -> list[Point]:
        """Return the points of one variant."""
        return [point for point in self.points.values() if point.variant == variant]

    def num_remaining(self, variant: str) -> int:
        """Return the number of points that the search may still sample of this variant."""
        if variant in self.file.exhausted:
            return 0
        budget = min(self.file.points, self.space.size(variant))
        return max(0, int(budget) - self.num_asked[variant])

    @property
    def total(self) -> int:
        """The number of points, including those that may still be asked for."""
        return len(self.configurations) + sum(map(self.num_remaining, self.space.variants))

    def add_point(self, variant: str, parameters: Mapping[str, Value], configuration: Configuration) -> None:
        """Count a new point, which the caller has written to the journal."""
        point = Point(variant, configuration.task.name, dict(parameters), configuration.fingerprint)
        self._register(point, configuration)
        self.on_point(configuration)

    def add_design(self) -> None:
        """Ask for all remaining points of a sampler that does not use results.

        The sampler's sequence changes when a further variant adds dimensions of its own. The other variants
        then take their missing points from the new sequence.
        """
        if not any(map(self.num_remaining, self.space.variants)):
            return
        design = draw_design(self.file.sampler, self.space, self.file.points, self.build)
        for variant, points in design.items():
            for parameters in points:
                configuration = self.build(variant, parameters)
                assert configuration is not None, "draw_design leaves these out"
                if self.num_remaining(variant) and configuration.fingerprint not in self.configurations:
                    self.add_point(variant, parameters, configuration)

    def mark_exhausted(self, variant: str) -> None:
        """Record in the settings that no further point of this variant was found."""
        self.file = replace(self.file, exhausted=(*self.file.exhausted, variant))
        self.save()

    def save(self) -> None:
        """Write the settings of the search."""
        self.file.write(self.folder)

    def update_usage(self, store: Store) -> Mapping[str, VariantUsage]:
        """Write down what each variant has spent, by the records in `store`, and return it."""
        usage = {variant: self._variant_usage(variant, store) for variant in self.space.variants}
        self.file = replace(self.file, spent={**self.file.spent, **usage})
        self.save()
        return usage

    def _variant_usage(self, variant: str, store: Store) -> VariantUsage:
        states: Counter[str] = Counter()
        steps, asked = 0, self.num_asked[variant]
        for point in self.points_of(variant):
            record = store.get(point.fingerprint)
            states["missing" if record is None else record.state] += 1
            steps += record.steps if record else 0
        budget = self.num_remaining(variant) + asked
        return VariantUsage(budget, asked, dict(states), steps, budget * self.steps_per_point)

    def _register(self, point: Point, configuration: Configuration) -> None:
        self.configurations[point.fingerprint], self.points[point.fingerprint] = configuration, point
        self.num_asked[point.variant] += 1


def _mismatch_reason(point: Point, now: Configuration | None) -> str:
    """Return the reason why a point of an earlier run is another configuration now."""
    if now is not None and (raised := _changed_numerics(point, now)):
        return (
            f"points under earlier numerics of the {raised}: this program computes otherwise, "
            "and their results do not count with new ones; take another --study."
        )
    return (
        "points with other settings (steps, rank, model, ...); repeat its options, or take another --study."
    )


def _changed_numerics(point: Point, now: Configuration) -> str:
    """Return the names of the numerics whose lower numbers would make the configuration that of the point.

    Returns an empty string if something else differs.
    """
    variant, task, loop = now.variant.numerics, now.task.numerics, now.loop_numerics
    for a, b, c in product(range(1, variant + 1), range(1, task + 1), range(1, loop + 1)):
        earlier = replace(
            now, variant=replace(now.variant, numerics=a), task=replace(now.task, numerics=b), loop_numerics=c
        )
        if earlier.fingerprint == point.fingerprint:
            pairs = ((f"variant {now.variant.name}", a < variant), ("task", b < task), ("loop", c < loop))
            return " and ".join(name for name, lower in pairs if lower)
    return ""


def open_search(
    folder: Path, sampler: str, points: int, space: Space, build: BuildConfiguration, steps_per_point: int
) -> SearchBudget:
    """Open the search of the study in `folder`, new or resumed. Writes nothing.

    A sampler that does not use results has asked for all its points at once.

    Args:
        folder: The study's folder.
        sampler: The sampler's name.
        points: Points of each variant.
        space: The space that is searched.
        build: Makes a configuration from a variant and values.
        steps_per_point: Optimizer steps of a point that is not stopped early.

    Raises:
        UsageError: The study has searched with other settings, or a file of its search is damaged or gone.
    """
    before = SearchFile.read(folder)
    if before is None:
        left = next((name for name in (JOURNAL_FILE, EARLIER_FILE) if (folder / name).exists()), None)
        if left is not None:
            raise UsageError(
                f"{folder / SEARCH_FILE}: is gone, and {left} is there; put it back, or take another --study"
            )
        file = SearchFile(sampler, SEED, points, space_specs(space))
    else:
        file = before.resume(sampler, points, space, folder.name)
    budget = SearchBudget(file, folder, space, build, steps_per_point)
    budget.restore()
    for variant, usage in file.spent.items():
        if variant in space.variants and budget.num_asked[variant] < usage.asked:
            raise UsageError(
                f"{folder / JOURNAL_FILE}: holds {budget.num_asked[variant]} points of {variant}, of "
                f"{usage.asked} that this search ({SEARCH_FILE}) has asked for; put the whole file back, or "
                "take another --study"
            )
    if sampler in NON_ADAPTIVE_SAMPLERS:
        budget.add_design()
    return budget
