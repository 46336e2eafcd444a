"""The trials of a grid, one after another, in the order given."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ray.tune.search.basic_variant import BasicVariantGenerator, _TrialIterator

from orchestrator.study.configuration import Configuration


class InOrder(BasicVariantGenerator):
    """What Tune does with `grid_search`, but for its cost: Ray 2.60 copies the whole grid for every trial,
    0.36 s a trial for 5,000 configurations."""

    _trial_generator: Any

    def __init__(self, configurations: Sequence[Configuration], at_once: int | None = None) -> None:
        """`at_once`: how many trials may be alive; None: as many as there is room for."""
        super().__init__(max_concurrent=at_once or 0)
        self.configurations = configurations

    def add_configurations(self, experiments: Any) -> None:
        """`experiments`: Tune's one; its trainable is what every trial runs."""
        (experiment,) = experiments
        self._total_samples = len(self.configurations)
        self._trial_generator = self._trials(experiment.spec)

    def _trials(self, spec: dict[str, Any]) -> Iterator[Any]:
        for number, configuration in enumerate(self.configurations):
            one = {**spec, "config": {"configuration": configuration.to_json()}}
            yield next(_TrialIterator(self._uuid_prefix, 1, one, start=number))

    def save_to_dir(self, dirpath: str, session_str: str = "", **more: Any) -> None:
        """A study is resumed from its records, never from Tune's files."""
