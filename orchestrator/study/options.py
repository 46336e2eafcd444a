"""The options that every study script shares."""

from __future__ import annotations

import os
from dataclasses import MISSING, dataclass, fields

from orchestrator.study.data_options import DataOptions
from orchestrator.study.option_groups import (
    GridOptions,
    LimitOptions,
    OutputOptions,
    ResourceOptions,
    SearchOptions,
    TrainingOptions,
)
from orchestrator.util.errors import UsageError, describe_disk_error
from variants.variant_names import canonical_key

DEFAULT_GRID_SEEDS, DEFAULT_POINTS = 3, 16
DEFAULT_LANES_PER_TRAINER = 4
"""The number on a CPU, where more lanes save little time unless they are short, and the number to expect
before it is measured."""
SHORT_LANES_PER_TRAINER = 8
"""The number on a CPU for lanes of few tokens, which share the time of Python and of the kernels' calls."""
MAX_MEASURED_LANES = 8
"""The largest number that a trainer chooses by measurement on its GPU."""
OPTION_OF_HYPERPARAMETER = {
    "learning_rate": "learning_rates",
    "schedule": "lr_schedule",
    **{
        name: name
        for name in ("head_learning_rate", "rank", "alpha", "dropout", "targets", "steps", "train_size")
    },
}
"""Hyperparameter -> field of `StudyOptions` that sets it; --set and --space cannot set it as well. The batch
size is not in this table, because --batch-size may be given together with batch sizes in --space."""


@dataclass(frozen=True, kw_only=True)
class StudyOptions(
    GridOptions, DataOptions, SearchOptions, TrainingOptions, ResourceOptions, OutputOptions, LimitOptions
):
    """All options of a study.

    Raises:
        UsageError: An option has a value that is wrong whatever the base model and the cluster are.
    """

    def __post_init__(self) -> None:
        self.check_grid()
        self.check_data()
        self.check_search()
        self.check_training()
        self.check_resources()
        self.check_output_options()
        self.check_limits()
        if self.search != "grid" and (self.seeds or 1) > 1:
            raise UsageError(
                f"--seeds {self.seeds}: a search trains each point once; take --seeds 1, or repeat whole "
                f"searches with `lora-orchestrator tuned --replicates {self.seeds}`."
            )
        if self.select == "published" and (self.search != "grid" or self.scheduler != "none"):
            raise UsageError(
                "--select published: the survey chose among the runs of a whole grid; take --search grid and "
                "--scheduler none."
            )
        if self.data is not None and (self.task is not None or self.preset is not None):
            other = "--preset" if self.task is None else "--task"
            raise UsageError(
                f"--data {self.data[0]} and {other} both say what to train on; take one of the two away."
            )
        self._check_conflicting_values()
        if self.batch_size is not None:
            self.check_batch_size(self.batch_size)
        if self.max_gpu_hours is not None and self.gpus_per_worker == 0:
            limit = f"--max-gpu-hours {self.max_gpu_hours:g}"
            raise UsageError(f"{limit} with --gpus-per-worker 0: no GPU is held; take --max-hours.")
        if self.plan_gpu is not None and (self.device == "cpu" or self.gpus_per_worker == 0):
            cpu = "--device cpu" if self.device == "cpu" else "--gpus-per-worker 0"
            raise UsageError(f"--plan-gpu {self.plan_gpu!r} with {cpu}: take one of the two away.")

    @property
    def search_method(self) -> str:
        """Name of the sampler of a search, or `grid`."""
        return (self.sampler or "tpe") if self.search == "optuna" else self.search

    @property
    def seed_count(self) -> int:
        """Number of seeds per point."""
        if self.search != "grid":
            return 1
        return DEFAULT_GRID_SEEDS if self.seeds is None else self.seeds

    @property
    def point_count(self) -> int:
        """Number of points that a search gives each variant and task."""
        return DEFAULT_POINTS if self.points is None else self.points

    def _check_conflicting_values(self) -> None:
        """Check that --set and --space name no hyperparameter that another option sets as well.

        Raises:
            UsageError: Two options set the same hyperparameter.
        """
        for option, words in (("--set", self.set), ("--space", self.space or ())):
            for word in words:
                name = setting_key(word)
                own_option = OPTION_OF_HYPERPARAMETER.get(name)
                if name == "steps" and self.epochs is not None:
                    raise UsageError(
                        f"{option} {word!r} and --epochs both set steps; take one of the two away."
                    )
                if own_option and getattr(self, own_option) != _DEFAULTS[own_option]:
                    both = f"{option} {word!r} and --{own_option.replace('_', '-')}"
                    raise UsageError(f"{both} both set {name}; take one of the two away.")

    def check_batch_size(self, batch_size: int) -> None:
        """Check that a batch can be split into micro-batches and between workers.

        Args:
            batch_size: Examples per optimizer step: --batch-size, or the task's.

        Raises:
            UsageError: --accumulation does not divide it, or it has fewer rows than there are workers.
        """
        parts = self.accumulation or 1
        if batch_size % parts:
            divisor = max(n for n in range(1, min(parts, batch_size + 1)) if batch_size % n == 0)
            raise UsageError(
                f"--accumulation {parts}: must divide the batch size, {batch_size}; take {divisor}."
            )
        if self.workers_per_trainer > batch_size:
            rule = f"every worker needs a row of the {batch_size} in a batch; take {batch_size}"
            raise UsageError(f"--workers-per-trainer {self.workers_per_trainer}: {rule}.")

    def check_output(self) -> None:
        """Create the output folder and the store folder, and write a test file into each.

        Raises:
            UsageError: One of them is not a folder, or cannot be written.
            OSError: The disk is full or cannot be used (see `describe_disk_error`). The error names the
                folder.
        """
        for name, folder in (("--output", self.output), ("--store", self.store_folder)):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                probe = folder / f".probe-{os.getpid()}"
                probe.touch()
                probe.unlink()
            except OSError as error:
                error.filename = str(folder)
                if describe_disk_error(error):
                    raise
                raise UsageError(
                    f"{name} {str(folder)!r} cannot be written ({error.strerror}); name a folder that can."
                ) from None


def setting_key(word: str) -> str:
    """Return the key (NAME or VARIANT.NAME) of a word of --set or --space."""
    return canonical_key(word.partition("=")[0])


_DEFAULTS = {each.name: each.default for each in fields(StudyOptions) if each.default is not MISSING}
