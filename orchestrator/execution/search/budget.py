"""The points that a search has asked for, and the number of points that remain. Imports no Ray."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from optuna.trial import FrozenTrial

from orchestrator.execution.search.groups import SearchGroup, make_groups
from orchestrator.execution.search.journal import JOURNAL_FILE, Point, read_points
from orchestrator.execution.search.samplers import NON_ADAPTIVE_SAMPLERS, draw_points
from orchestrator.execution.search.search_file import SEARCH_FILE, GroupUsage, SearchFile
from orchestrator.record.store import Store
from orchestrator.study.configuration import Configuration, Value
from orchestrator.study.space import Space
from orchestrator.util.errors import UsageError


class SearchBudget:
    """The points of a search. Each group has the same number of points, counted over all runs of the study.

    Attributes:
        file: The settings of the search.
        folder: The study's folder.
        groups: The groups that are searched now, by name.
        configurations: The configurations of all points by fingerprint, in the order in which they were asked
            for.
        points: The points in the same order.
        num_asked: Number of points that were asked for, by group.
        other_trials: Trials of groups that earlier runs have searched and this run does not, by group.
        on_point: Called with the configuration of each new point after the point was written.
    """

    def __init__(self, file: SearchFile, folder: Path, groups: Mapping[str, SearchGroup]) -> None:
        """Make a budget without points.

        Args:
            file: The settings of the search.
            folder: The study's folder.
            groups: The groups that are searched now, by name.
        """
        self.file, self.folder, self.groups = file, folder, groups
        self.configurations: dict[str, Configuration] = {}
        self.points: dict[str, Point] = {}
        self.num_asked: Counter[str] = Counter()
        self.other_trials: Mapping[str, list[FrozenTrial]] = {}
        self.on_point: Callable[[Configuration], object] = lambda configuration: None

    def restore(self) -> None:
        """Read the points of earlier runs from the journal.

        Raises:
            UsageError: The journal is damaged, or a point would be another configuration now.
        """
        points, self.other_trials = read_points(self.folder, self.groups, self.file.spaces)
        for point in points:
            if point.fingerprint in self.configurations:
                continue
            configuration = self.groups[point.group].build(point.parameters)
            if configuration is None or configuration.fingerprint != point.fingerprint:
                raise UsageError(
                    f"study {self.folder.name!r}: its search has asked for points with other settings "
                    "(steps, rank, model, the program, ...); repeat its options, or take another --study."
                )
            self._register(point, configuration)

    def points_of(self, group: str) -> list[Point]:
        """Return the points of one group, in the order in which they were asked for."""
        return [point for point in self.points.values() if point.group == group]

    def num_remaining(self, group: str) -> int:
        """Return the number of points that the search may still ask for in this group."""
        if group in self.file.exhausted:
            return 0
        budget = min(self.file.points, self.groups[group].size)
        return max(0, int(budget) - self.num_asked[group])

    @property
    def total(self) -> int:
        """The number of points, including those that may still be asked for."""
        return len(self.configurations) + sum(map(self.num_remaining, self.groups))

    def add_point(self, group: str, parameters: Mapping[str, Value], configuration: Configuration) -> None:
        """Add a new point, which the caller has written to the journal.

        Args:
            group: The name of its group.
            parameters: Its values by dimension.
            configuration: Its configuration.
        """
        point = Point(group, configuration.task.name, dict(parameters), configuration.fingerprint)
        self._register(point, configuration)
        self.on_point(configuration)

    def draw_ahead(self) -> None:
        """Draw and add all remaining points, for a sampler that does not use results.

        A variant that is added later may add dimensions, which changes the sampler's sequence. The other
        variants then take their missing points from the new sequence.
        """
        together: dict[tuple[str, int], list[SearchGroup]] = defaultdict(list)
        for group in self.groups.values():
            together[group.task, group.replicate].append(group)
        for groups in together.values():
            if any(self.num_remaining(group.name) for group in groups):
                self._add_points(draw_points(self.file.sampler, groups, self.file.points))

    def _add_points(self, drawn: Mapping[str, Iterable[Mapping[str, Value]]]) -> None:
        for group, points in drawn.items():
            for parameters in points:
                configuration = self.groups[group].build(parameters)
                assert configuration is not None, "draw_points leaves these out"
                if self.num_remaining(group) and configuration.fingerprint not in self.configurations:
                    self.add_point(group, parameters, configuration)

    def mark_exhausted(self, group: str) -> None:
        """Note in `search.json` that the space of this group has no further point."""
        self.file = replace(self.file, exhausted=(*self.file.exhausted, group))
        self.save()

    def save(self) -> None:
        """Write the settings of the search."""
        self.file.write(self.folder)

    def update_usage(self, store: Store) -> Mapping[str, GroupUsage]:
        """Compute the points and steps of each group from the records in `store`, save and return them."""
        usage = {name: self._group_usage(group, store) for name, group in self.groups.items()}
        self.file = replace(self.file, spent={**self.file.spent, **usage})
        self.save()
        return usage

    def _group_usage(self, group: SearchGroup, store: Store) -> GroupUsage:
        states: Counter[str] = Counter()
        steps, asked = 0, self.num_asked[group.name]
        for point in self.points_of(group.name):
            record = store.get(point.fingerprint)
            states["missing" if record is None else record.state] += 1
            steps += record.steps if record else 0
        budget = self.num_remaining(group.name) + asked
        return GroupUsage(budget, asked, dict(states), steps, budget * group.template.lr_schedule.steps)

    def _register(self, point: Point, configuration: Configuration) -> None:
        self.configurations[point.fingerprint], self.points[point.fingerprint] = configuration, point
        self.num_asked[point.group] += 1


def open_search(
    folder: Path,
    sampler: str,
    points: int,
    spaces: Mapping[str, Space],
    templates: Sequence[Configuration],
    replicates: int = 1,
) -> SearchBudget:
    """Open the search of the study in `folder`, new or resumed. Writes nothing.

    All remaining points of a sampler that does not use results are drawn at once.

    Args:
        folder: The study's folder.
        sampler: The sampler's name.
        points: Points of each variant, on each task and in each replicate.
        spaces: Task -> the space that is searched, by variant.
        templates: One configuration for each task and variant; a point's values replace theirs.
        replicates: Number of replicates. Replicate k trains with seed k, and has a sampler of its own.

    Raises:
        UsageError: The study has searched with other settings, or a file of its search is damaged or gone.
    """
    before = SearchFile.read(folder)
    first_task = before.task if before else templates[0].task.name
    groups = make_groups(spaces, templates, range(replicates), first_task)
    if before is None:
        if (folder / JOURNAL_FILE).exists():
            raise UsageError(
                f"{folder / SEARCH_FILE}: missing beside {JOURNAL_FILE}; restore the file, or take another "
                "--study"
            )
        specs = {name: group.specs for name, group in groups.items()}
        file = SearchFile(sampler, points, specs, task=first_task)
    else:
        file = before.resume(sampler, points, groups, folder.name)
    budget = SearchBudget(file, folder, groups)
    budget.restore()
    for name, usage in file.spent.items():
        if name in groups and budget.num_asked[name] < usage.asked:
            raise UsageError(
                f"{folder / JOURNAL_FILE}: holds {budget.num_asked[name]} points of {name}, of "
                f"{usage.asked} that this search ({SEARCH_FILE}) has asked for; put the whole file back, or "
                "take another --study"
            )
    if sampler in NON_ADAPTIVE_SAMPLERS:
        budget.draw_ahead()
    return budget
