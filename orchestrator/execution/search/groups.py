"""The groups of a search: one for each task, variant and replicate, all with the same number of points."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from orchestrator.finetune.resolve.templates import find_settings_error
from orchestrator.study.configuration import Configuration, Value
from orchestrator.study.space import Dimension, Space, apply_values


@dataclass(frozen=True)
class SearchGroup:
    """The search of one variant on one task in one replicate."""

    name: str
    """The name in the search's files, see `group_name`."""
    template: Configuration
    """The configuration whose values a point replaces. Its seed is the replicate."""
    dimensions: tuple[Dimension, ...]
    """The dimensions of the variant's space."""

    @property
    def task(self) -> str:
        """The name of the task."""
        return self.template.task.name

    @property
    def replicate(self) -> int:
        """The replicate, which is the seed of its points."""
        return self.template.seed

    @property
    def size(self) -> float:
        """The number of points in the space; infinite if a dimension is an interval of real numbers."""
        return math.prod(d.size or math.inf for d in self.dimensions)

    @property
    def specs(self) -> dict[str, str]:
        """Name of each dimension -> its specification as it was typed."""
        return {d.key: d.spec_text for d in self.dimensions}

    def build(self, values: Mapping[str, Value]) -> Configuration | None:
        """Return the configuration of the point with these values; None if the variant refuses them."""
        configuration = apply_values(self.template, values)
        return None if find_settings_error(configuration) else configuration


def group_name(task: str, variant: str, replicate: int, first_task: str) -> str:
    """Return the name of a group in the files of a search.

    The name is task/variant/replicate, for example "digits/lora/3", without the task if it is the first task,
    and without the replicate if it is 0. A search of one task without replicates has the variants' names.

    Args:
        task: The task's name.
        variant: The variant's name.
        replicate: The replicate.
        first_task: The task that the study searched first.
    """
    parts = [] if task == first_task else [task]
    return "/".join([*parts, variant, *([str(replicate)] if replicate else [])])


def make_groups(
    spaces: Mapping[str, Space],
    templates: Sequence[Configuration],
    replicates: Iterable[int],
    first_task: str,
) -> dict[str, SearchGroup]:
    """Return the groups of a search by name, ordered by replicate, then by template.

    Args:
        spaces: Task -> the space of each variant.
        templates: One configuration for each task and variant.
        replicates: The replicates.
        first_task: The task that the study searched first.
    """
    groups: dict[str, SearchGroup] = {}
    for replicate in replicates:
        for template in templates:
            task, variant = template.task.name, template.variant.name
            name = group_name(task, variant, replicate, first_task)
            dimensions = spaces[task][variant]
            groups[name] = SearchGroup(name, replace(template, seed=replicate), dimensions)
    return groups
