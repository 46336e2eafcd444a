"""Designs: rules that name the configurations of a study, in stages that may depend on earlier results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Protocol

from orchestrator.analyze.scores import finite_score
from orchestrator.record.schema import Record
from orchestrator.study.configuration import Configuration
from orchestrator.study.rates import refine_rates
from orchestrator.study.space import build_grid


class Design(Protocol):
    """The rule that names the configurations of a study.

    A design is a pure function of the records: the same records give the same configurations. A repeated
    command therefore trains nothing, and a larger design trains its additional configurations only.
    """

    def request(self, records: Mapping[str, Record]) -> list[Configuration]:
        """Return all configurations of the study that follow from the records so far.

        The caller trains them and calls `request` again, until no new configuration is returned.

        Args:
            records: Fingerprint -> record of a configuration that has ended: finished, diverged, stopped
                early, or failed too often to be tried again. Implementations may use `get` and `in` only.
        """
        ...

    def outline(self) -> list[Configuration]:
        """Return the expected configurations of all stages, for --plan, without any records."""
        ...


@dataclass(frozen=True)
class DesignInput:
    """Input of a design: the options, the templates and the grids of learning rates."""

    options: Any
    """Options of the script, an instance of a subclass of `StudyOptions`."""
    templates: tuple[Configuration, ...]
    """One configuration per task and variant, with placeholders for learning rate and seed."""
    learning_rates: Mapping[str, tuple[float, ...]]
    """Task -> grid of learning rates, ascending."""

    def refined(self, per_decade: int) -> DesignInput:
        """Return a copy whose grids have about `per_decade` rates a decade; 0 leaves the grids unchanged."""
        if not per_decade:
            return self
        grids = {task: refine_rates(rates, per_decade) for task, rates in self.learning_rates.items()}
        return replace(self, learning_rates=grids)

    def templates_by_task(self) -> dict[str, list[Configuration]]:
        """Return task -> templates, one per variant."""
        ordered = groupby(self.templates, key=lambda template: template.task.name)
        return {task: list(own) for task, own in ordered}


MakeDesign = Callable[[DesignInput], Design]
"""A function that makes the design of a script."""


@dataclass(frozen=True)
class FixedDesign:
    """A design with one stage, whose configurations do not depend on results."""

    configurations: tuple[Configuration, ...]

    def request(self, records: Mapping[str, Record]) -> list[Configuration]:
        """Return all configurations."""
        return list(self.configurations)

    def outline(self) -> list[Configuration]:
        """Return all configurations."""
        return list(self.configurations)


def validation_scores(records: Mapping[str, Record], configurations: Iterable[Configuration]) -> list[float]:
    """Return the finite validation scores of those configurations that have one.

    Args:
        records: Fingerprint -> record.
        configurations: The configurations.
    """
    found = [record for c in configurations if (record := records.get(c.fingerprint)) is not None]
    return [score for record in found if (score := finite_score(record, "validation")) is not None]


def grid_of(given: DesignInput, seeds: Sequence[int]) -> list[Configuration]:
    """Return every template at every learning rate of its task and with every seed."""
    return [
        configuration
        for task, templates in given.templates_by_task().items()
        for configuration in build_grid(templates, given.learning_rates[task], seeds)
    ]
