"""Prepare the data of all configurations in the store before a trainer starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from orchestrator.finetune.models import loading
from orchestrator.finetune.resolve.data_lengths import report_truncation
from orchestrator.finetune.resolve.templates import check_positions, check_token_ids
from orchestrator.finetune.tasks import catalogue as tasks
from orchestrator.finetune.tasks.data_task import DataTask
from orchestrator.study.configuration import Configuration
from orchestrator.util.atomic_files import add_path_to_disk_errors


def prepare_datasets(
    configurations: Sequence[Configuration],
    bases: Path,
    folder: Path,
    progress: Callable[[str], None],
) -> None:
    """Write the examples and token ids of all configurations to the store, as far as they are missing.

    Args:
        configurations: The configurations; data that several of them share is prepared once.
        bases: The store's folder of base models.
        folder: The store's folder of prepared data.
        progress: Called with one line for each thing that takes time.

    Raises:
        UsageError: The data cannot be read or tokenised, or does not fit the model.
        OSError: The disk is full, or the folder cannot be written.
    """
    from orchestrator.finetune.data import dataset_cache
    from orchestrator.finetune.data.batches import compute_max_row_length

    for configuration in _with_distinct_data(configurations):
        task = tasks.get(configuration.task.name)
        processor = loading.load_processor(configuration.model, bases, task)
        with add_path_to_disk_errors(folder):
            prepared = dataset_cache.prepare_dataset(folder, configuration, task, processor, progress)
        if task.inputs != "image":
            check_token_ids(configuration, bases, dataset_cache.max_token_id(prepared))
            longest = dataset_cache.compute_max_sequence_length(prepared, task)
            # `check_attach` has compared lengths up to the limit of a training row.
            if longest > compute_max_row_length(task, configuration.batches.max_length):
                model, _ = loading.build_meta_model(configuration.model, bases, task)
                check_positions(model, configuration.model.name, longest, task)


def report_data(
    configurations: Sequence[Configuration], bases: Path, progress: Callable[[str], None], may_truncate: bool
) -> None:
    """Print a line that describes a user's data, and one with the number of rows that --max-length cuts.

    Args:
        configurations: The configurations; data that several of them share are reported once.
        bases: The store's folder of base models.
        progress: Called with one line for each thing to report.
        may_truncate: Whether rows may be longer than --max-length. All rows are then encoded once more. False
            if the limit was measured (see `measure_max_length`), so that no row is longer.
    """
    for configuration in _with_distinct_data(configurations):
        task = tasks.get(configuration.task.name)
        if isinstance(task, DataTask):
            progress(f"{task.name}: {task.describe()}")
            if may_truncate:
                processor = loading.load_processor(configuration.model, bases, task)
                report_truncation(task, processor, configuration.batches.max_length, progress)


def _with_distinct_data(configurations: Sequence[Configuration]) -> list[Configuration]:
    """Return one configuration for each task, base model and limit of the length of a row."""
    return list({(c.task, c.model, c.batches.max_length): c for c in configurations}.values())


def write_own_files(configurations: Sequence[Configuration], folder: Path) -> None:
    """Write the tasks and variants in users' files to the store, where workers read them.

    Args:
        configurations: Configurations with these tasks and variants.
        folder: The store's folder of prepared data.
    """
    for variant in {c.variant.revision: c.variant for c in configurations}.values():
        tasks.write_variant(variant, folder)
    for task in {c.task.content: c.task for c in configurations}.values():
        tasks.write_entry(tasks.get(task.name), folder)
