"""The base class of tasks on datasets of the hub, whose settings are an entry of a TOML file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from orchestrator.finetune.sources.hub_data import CellType, Table, load_table
from orchestrator.finetune.tasks.base import Task

READ_BATCH_SIZE = 1000  # rows


class HubTask(Task):
    """A task on a dataset of the hub.

    Args:
        name: The name of the task.
        settings: Values of the attributes.
    """

    keys: ClassVar[tuple[str, ...]] = ("title", "floor", "metric", "default_model", "data", "train_split")
    """The attributes that an entry may set, beside those of `TaskDefaults`."""
    data: str
    """The dataset: `organization/dataset:subset@revision`, of which subset and revision may be missing.
    Without a revision the newest commit is taken when the task is first used in a store."""
    train_split: str = "train"
    test_split: str = "test"

    def __init__(self, name: str, settings: Mapping[str, Any]) -> None:
        self.name = name
        vars(self).update(settings)

    def table(self, split: str, columns: Mapping[str, CellType], data: str = "") -> Table:
        """Return a split of a dataset.

        Args:
            split: The name of the split on the hub.
            columns: The columns to read, with the type of their cells.
            data: The dataset in the form of `data`, which is the default.
        """
        source, _, revision = (data or self.data).partition("@")
        repository, _, subset = source.partition(":")
        return Table(repository, split, columns, subset or None, revision or None)

    def read_rows(self, table: Table) -> Iterator[dict[str, Any]]:
        """Yield the rows of a table.

        Raises:
            UsageError: As in `hub_data.load_table`.
        """
        for batch in load_table(table, self.name).iter(batch_size=READ_BATCH_SIZE):
            for values in zip(*batch.values(), strict=True):
                yield dict(zip(batch, values, strict=True))
