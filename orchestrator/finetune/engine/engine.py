"""The engine of a trainer: the loaded base model, the attached adapters and the task's data."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from orchestrator.finetune.engine.calibration import load_or_compute_calibration
from orchestrator.finetune.engine.checkpoint import Checkpoint
from orchestrator.finetune.engine.lane import Lane, variant_settings
from orchestrator.finetune.engine.lane_group import LaneGroup, TaskData
from orchestrator.finetune.models import attention
from orchestrator.finetune.models.base_model import BaseModel
from orchestrator.finetune.models.block_options import CHECKPOINTING_ATTRIBUTE
from orchestrator.finetune.process_group import SINGLE_PROCESS_GROUP, ProcessGroup
from orchestrator.finetune.sources import own_files
from orchestrator.finetune.tasks import catalogue as tasks
from orchestrator.finetune.tasks.base import Task
from orchestrator.study.configuration import Configuration, ModelChoice
from variants.api import Batching, Variant
from variants.attach import Adapters, attach


class Engine:
    """The base model and the lane group of a trainer, which are replaced only when a lane needs others.

    Args:
        load_base_model: Loads a base model for a task.
        calibration_folder: The store's folder of calibration tensors.
        data_folder: The store's folder of examples, token ids and untrained scores.
        process_group: The workers of this trainer.
        on_batch: Called after every batch of an evaluation or calibration, and after the start of a lane, to
            show progress.
    """

    def __init__(
        self,
        load_base_model: Callable[[ModelChoice, Task], BaseModel],
        calibration_folder: Path,
        data_folder: Path,
        process_group: ProcessGroup = SINGLE_PROCESS_GROUP,
        on_batch: Callable[[], None] = lambda: None,
    ) -> None:
        self._base_model_loader, self.process_group = load_base_model, process_group
        self._on_batch = on_batch
        self._calibration_folder, self._data_folder = calibration_folder, data_folder
        self._base_model: tuple[tuple[ModelChoice, str], BaseModel] | None = None
        self._data_by_key: dict[tuple[object, ...], TaskData] = {}
        self._group_key = ""
        self._lane_group: LaneGroup | None = None
        self.variant: Variant

    @property
    def has_lane_group(self) -> bool:
        """Whether adapters are attached."""
        return self._lane_group is not None

    @property
    def lane_group(self) -> LaneGroup:
        """The lane group; there must be one."""
        assert self._lane_group is not None, "no lane has been added"
        return self._lane_group

    @property
    def max_lanes(self) -> int:
        """Lanes that the variant of the lane group allows at once; no limit without a lane group."""
        return self._lane_group.adapters.max_lanes if self._lane_group is not None else sys.maxsize

    @property
    def device_name(self) -> str:
        """The GPU's name, or "cpu"; "none" before a base model is loaded."""
        if self._base_model is None:
            return "none"
        device = self._base_model[1].device
        return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)

    @property
    def kernels(self) -> str:
        """The kernels of the base model, see `BaseModel.kernels`; "torch" before one is loaded."""
        return "torch" if self._base_model is None else self._base_model[1].kernels

    def take_peak_memory(self) -> int:
        """Return the peak memory of this worker's device in bytes, and on a GPU reset the measurement.

        Returns:
            On a GPU the peak since the last call of the bytes that torch had allocated; on a CPU, and before
            a base model is loaded, the largest resident size of the process since its start.
        """
        device = self._base_model[1].device if self._base_model is not None else None
        if device is None or device.type != "cuda":
            unit = 1 if sys.platform == "darwin" else 1024
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak

    @property
    def memory_limit(self) -> int:
        """The memory in bytes that this worker may use on its device; a base model must be loaded."""
        assert self._base_model is not None, "no base model is loaded"
        base_model = self._base_model[1]
        return int(_total_memory(base_model.device) * base_model.memory_fraction)

    @property
    def device_key(self) -> str:
        """Everything besides the group key that decides how many lanes fit into memory, as text.

        This text is part of the file format of `record/lane_capacity.py`.
        """
        words = [self.device_name]
        if self._base_model is not None:
            base_model = self._base_model[1]
            words.append(f"{round(_total_memory(base_model.device) / 2**30)} GiB")
            if base_model.memory_fraction < 1:
                words.append(f"share {base_model.memory_fraction:g}")
            if getattr(base_model.model, CHECKPOINTING_ATTRIBUTE, False):
                words.append("gradient checkpointing")
            if base_model.kernels != "torch":
                words.append(base_model.kernels)
        if self.process_group.world_size > 1:
            words.append(f"{self.process_group.world_size} workers")
        return ", ".join(words)

    def prepare_lane_group(self, configuration: Configuration) -> LaneGroup:
        """Return the lane group for a configuration.

        It replaces the present one if the group key differs or the variant allows one lane only.

        Raises:
            RuntimeError: The configuration was made with other numerics of its variant or task, or with
                another revision of a variant from outside this project.
            UsageError: The base model cannot be loaded, or the task's data cannot be prepared.
            ValueError: The variant does not fit the model.
            WorkerError: A worker's machine cannot grade the answers, or another worker has failed.
        """
        same = configuration.group_key == self._group_key and self._lane_group is not None
        if same and self.variant.batching is not Batching.EXCLUSIVE:
            return self.lane_group
        self.detach_adapters()
        choice = configuration.variant
        variant = own_files.find_variant(choice, self._data_folder)
        task = tasks.find(configuration.task, self._data_folder)
        check_versions(configuration, variant, task)
        base_model = self._load_base_model(configuration.model, task)
        has_base_dropout = configuration.base_dropout == "on"
        if has_base_dropout:
            attention.check_dropout_supported(base_model.model, configuration.model.name)
        settings, heads = variant_settings(configuration), base_model.head_names
        adapters = attach(base_model.model, variant, settings, choice.targets, heads, has_base_dropout)
        key = (configuration.model, configuration.task, configuration.batches.max_length)
        try:
            if has_base_dropout:
                attention.enable_lane_dropout(base_model.model)
            if key not in self._data_by_key:
                self._data_by_key[key] = TaskData.load(
                    configuration,
                    task,
                    base_model,
                    adapters,
                    self.process_group,
                    self._data_folder,
                    self._on_batch,
                )
        except BaseException:
            self._detach(adapters)
            raise
        self._lane_group = LaneGroup(
            base_model, adapters, self._data_by_key[key], self.process_group, self._on_batch
        )
        self._group_key, self.variant = configuration.group_key, variant
        self._lane_group.load_or_compute_baseline_scores(wait=False)
        return self._lane_group

    def add_lane(self, lane: Lane, checkpoint: Checkpoint | None) -> None:
        """Add the lane to the lane group of its configuration, initialized or from a checkpoint."""
        lane_group, configuration = self.prepare_lane_group(lane.configuration), lane.configuration
        calibration = None
        if checkpoint is None:
            calibration = load_or_compute_calibration(
                lane_group, configuration, self._calibration_folder, self.process_group
            )
        untrained = lane_group.data.untrained["validation"]["loss"]
        self.process_group.run_on_all(
            lambda: lane.initialize(lane_group.adapters, untrained, checkpoint, calibration)
        )
        if checkpoint is None and self.process_group.world_size > 1:
            # Different GPU models may compute singular vectors with different signs: those of rank 0 count.
            frozen = lane_group.adapters.frozen(lane.fingerprint)
            with torch.no_grad():
                for tensor in (*lane.parameters.values(), *frozen.values()):
                    self.process_group.broadcast_(tensor)
        self._on_batch()

    def _load_base_model(self, choice: ModelChoice, task: Task) -> BaseModel:
        key = (choice, task.name if task.has_head else "")  # a head makes the model specific to the task
        if self._base_model is None or self._base_model[0] != key:
            self._base_model = None  # frees the old model before the new one is loaded
            self._base_model = (key, self._base_model_loader(choice, task))
        return self._base_model[1]

    def remove_lane(self, fingerprint: str) -> None:
        """Remove a lane's adapter, if it has one."""
        if self._lane_group is not None and fingerprint in self._lane_group.adapters.lanes:
            self._lane_group.adapters.remove_lane(fingerprint)

    def detach_adapters(self) -> None:
        """Detach the adapters of the lane group, if there is one; the base model stays loaded."""
        if self._lane_group is not None:
            self._detach(self._lane_group.adapters)
            self._lane_group = None

    def _detach(self, adapters: Adapters) -> None:
        """Detach the adapters and disable the base model's own dropout."""
        if self._base_model is not None:
            attention.disable_lane_dropout(self._base_model[1].model)
        adapters.detach()


def _total_memory(device: torch.device) -> int:
    """Return the bytes of memory of a GPU or, for the CPU, of the machine."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total)


def check_versions(configuration: Configuration, variant: Variant, task: Task) -> None:
    """Check that a configuration was made with the present code of its variant and its task.

    Args:
        configuration: The configuration.
        variant: Its variant, as the code here defines it.
        task: Its task, as the code here defines it.

    Raises:
        RuntimeError: It was made with other code.
    """
    choice = configuration.variant
    for what, here, wanted in (
        ("variant", variant.numerics, choice.numerics),
        ("task", task.numerics, configuration.task.numerics),
    ):
        if here != wanted:
            raise RuntimeError(
                f"the configuration is for numerics {wanted} of its {what}, this worker has {here}; "
                "install the same version on every machine"
            )
    if variant.revision != choice.revision:
        raise RuntimeError(
            f"the configuration is for revision {choice.revision!r} of {choice.name}, this worker has "
            f"{variant.revision!r}; use the same file or version on every machine, and start the study "
            "again after a change"
        )
