"""Designs: the configurations that a study asks for, in stages that depend on earlier results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Protocol

from orchestrator.record.schema import Record
from orchestrator.study.configuration import Configuration
from orchestrator.study.grid import build_grid
from orchestrator.study.rates import refine_rates


class Design(Protocol):
    """The configurations of a study.

    A design is a pure function of the records: the same records give the same configurations, so that a
    repeated command trains nothing, and a wider design trains what is new.
    """

    def request(self, records: Mapping[str, Record]) -> list[Configuration]:
        """Return all configurations that can be named given the records so far.

        It is called again when all of them have ended; the study is complete when nothing new is returned.

        Args:
            records: Fingerprint -> record of a configuration that has ended: finished, diverged, stopped
                early, or failed too often to be tried again. Only `get` and `in` may be used.
        """
        ...

    def outline(self) -> list[Configuration]:
        """Return as many configurations as the whole study will have, with later choices guessed."""
        ...


@dataclass(frozen=True)
class DesignInput:
    """What a design is made from: the options, and one template per task and variant."""

    options: Any
    """The options of the script, a subclass of `StudyOptions`."""
    templates: tuple[Configuration, ...]
    """Configurations that are complete but for the learning rate and the seed."""
    learning_rates: Mapping[str, tuple[float, ...]]
    """Task -> the grid of learning rates, ascending."""

    def refined(self, per_decade: int) -> DesignInput:
        """Return this input with grids of about `per_decade` rates a decade; 0: with the same grids."""
        if not per_decade:
            return self
        grids = {task: refine_rates(rates, per_decade) for task, rates in self.learning_rates.items()}
        return replace(self, learning_rates=grids)

    def templates_by_task(self) -> dict[str, list[Configuration]]:
        """Return task -> its templates, one per variant."""
        ordered = groupby(self.templates, key=lambda template: template.task.name)
        return {task: list(own) for task, own in ordered}


MakeDesign = Callable[[DesignInput], Design]
"""A function that makes the design of a script."""


@dataclass(frozen=True)
class FixedDesign:
    """A design of one stage: the configurations do not depend on results."""

    configurations: tuple[Configuration, ...]

    def request(self, records: Mapping[str, Record]) -> list[Configuration]:
        """Return all configurations."""
        return list(self.configurations)

    def outline(self) -> list[Configuration]:
        """Return all configurations."""
        return list(self.configurations)


def grid_of(given: DesignInput, seeds: Sequence[int]) -> list[Configuration]:
    """Return every template at every learning rate of its task, with every seed."""
    return [
        configuration
        for task, templates in given.templates_by_task().items()
        for configuration in build_grid(templates, given.learning_rates[task], seeds)
    ]
