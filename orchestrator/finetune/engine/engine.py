"""The engine of a trainer: the loaded base model, the attached adapters, the lanes and the task's data."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import psutil
import torch

from orchestrator.finetune.engine.calibration import ensure_calibration, read_calibration
from orchestrator.finetune.engine.lane import Lane, variant_settings
from orchestrator.finetune.engine.lane_group import LaneGroup, TaskData
from orchestrator.finetune.engine.lane_source import Lease
from orchestrator.finetune.engine.tensor_files import read_checkpoint
from orchestrator.finetune.evaluation.evaluate import EvaluationResult, Scores
from orchestrator.finetune.models import changes
from orchestrator.finetune.models.base_model import BaseModel
from orchestrator.finetune.models.changes import CHECKPOINTING_ATTRIBUTE
from orchestrator.finetune.process_group import (
    SINGLE_PROCESS_GROUP,
    ProcessGroup,
    WorkerError,
    on_all_workers,
    result_or_error,
)
from orchestrator.finetune.tasks import catalogue as tasks
from orchestrator.finetune.tasks.base import Task
from orchestrator.finetune.tasks.examples import HELD_OUT_SPLITS
from orchestrator.record.schema import ScoredSplit
from orchestrator.study.configuration import Configuration, ModelChoice
from variants.adapters import Adapters, attach
from variants.api import Batching, Variant


class Engine:
    """The base model and the lane group of a trainer, which are replaced only when a lane needs others.

    Every worker of the trainer has an engine. The loop calls that of rank 0, whose commands run on all.

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
        self.lanes: dict[str, Lane] = {}
        """Fingerprint -> lane, in the order in which they were leased."""

    # -- what rank 0 asks -------------------------------------------------------------------------------

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
    def untrained_scores(self) -> Scores:
        """The scores of the base model without a lane; empty without a lane group."""
        if self._lane_group is None:
            return {}
        data = self._lane_group.data
        return {**data.baseline.scores, **data.general_scores}

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
    def device_key(self) -> str:
        """Everything besides the group key that decides how many lanes fit into memory, as text."""
        words = [self.device_name]
        if self._base_model is not None:
            base_model = self._base_model[1]
            total = psutil.virtual_memory().total
            if base_model.device.type == "cuda":
                total = torch.cuda.get_device_properties(base_model.device).total_memory
            words.append(f"{round(total / 2**30)} GiB")
            if base_model.memory_fraction < 1:
                words.append(f"share {base_model.memory_fraction:g}")
            if getattr(base_model.model, CHECKPOINTING_ATTRIBUTE, False):
                words.append("gradient checkpointing")
            if base_model.kernels != "torch":
                words.append(base_model.kernels)
        if self.process_group.world_size > 1:
            words.append(f"{self.process_group.world_size} workers")
        return ", ".join(words)

    def add_lane(self, lane: Lane, checkpoint: Path | None) -> None:
        """Add a lane of `lanes` to the lane group of its configuration.

        Args:
            lane: The lane.
            checkpoint: The file of its checkpoint; None for a lane that starts.

        Raises:
            Exception: A worker cannot load the base model or the data, the configuration was made with other
                numerics, or the variant refuses the model or the settings.
        """
        self.prepare_lane_group(lane.configuration)
        self.complete_baseline_scores(wait=False)
        calibration = None
        if checkpoint is None:
            calibration = ensure_calibration(self.lane_group, lane.configuration, self._calibration_folder)
        untrained_loss = self.untrained_scores["validation"]["loss"]
        self.initialize_lane(lane.lease, untrained_loss, checkpoint, calibration)
        self._on_batch()

    def complete_baseline_scores(self, wait: bool) -> None:
        """Complete the scores of the base model without a lane; see `BaselineScores.load_or_compute_all`."""
        compute = partial(self.score_base_model, HELD_OUT_SPLITS)
        self.lane_group.data.baseline.load_or_compute_all(compute, wait, self._on_batch)

    # -- commands ---------------------------------------------------------------------------------------

    @on_all_workers
    def prepare_lane_group(self, configuration: Configuration) -> None:
        """Make the lane group for a configuration.

        It replaces the present one if the group key differs or the variant allows one lane only.

        Raises:
            Exception: See `add_lane`.
        """
        same = configuration.group_key == self._group_key and self._lane_group is not None
        if same and self.lane_group.adapters.variant.batching is not Batching.EXCLUSIVE:
            return
        self._detach()
        choice = configuration.variant
        variant = tasks.find_variant(choice, self._data_folder)
        task = tasks.find(configuration.task, self._data_folder)
        check_versions(configuration, variant, task)
        base_model = self._load_base_model(configuration.model, task)
        has_base_dropout = configuration.base_dropout == "on"
        if has_base_dropout:
            changes.check_dropout_supported(base_model.model, configuration.model.name)
        settings, heads = variant_settings(configuration), base_model.head_names
        adapters = attach(base_model.model, variant, settings, choice.targets, heads, has_base_dropout)
        key = (configuration.model, configuration.task, configuration.batches.max_length)
        workers = self.process_group
        try:
            if has_base_dropout:
                changes.enable_lane_dropout(base_model.model)
            if key not in self._data_by_key:
                self._data_by_key[key] = TaskData.load(
                    configuration, task, base_model, adapters, workers, self._data_folder, self._on_batch
                )
        except BaseException:
            self._detach(adapters)
            raise
        self._group_key, data = configuration.group_key, self._data_by_key[key]
        self._lane_group = LaneGroup(base_model, adapters, data, workers, self._on_batch)

    @on_all_workers
    def score_base_model(self, splits: Sequence[ScoredSplit]) -> Scores:
        """Return the scores of the base model without lanes, those of generated answers included."""
        return self.lane_group.score_base_model(splits, True)

    @on_all_workers
    def initialize_lane(
        self, lease: Lease, untrained_loss: float, checkpoint: Path | None, calibration: Path | None
    ) -> None:
        """Add a lane's adapter to the model.

        Args:
            lease: The right to train the lane.
            untrained_loss: Validation loss of the base model, for the divergence rule.
            checkpoint: The file of the checkpoint from which the lane resumes; None for one that starts.
            calibration: The file of the tensors of a variant that initializes from them.

        Raises:
            Exception: See `add_lane`.
        """
        if lease.configuration.fingerprint not in self.lanes:  # on other ranks than 0
            self.lanes[lease.configuration.fingerprint] = Lane(lease)
        lane = self.lanes[lease.configuration.fingerprint]
        adapters, device = self.lane_group.adapters, self.lane_group.base_model.device
        lane.initialize(
            adapters,
            untrained_loss,
            None if checkpoint is None else read_checkpoint(checkpoint),
            None if calibration is None else read_calibration(calibration, device),
        )
        if checkpoint is None and self.process_group.world_size > 1:
            # Different GPU models may compute singular vectors with different signs: those of rank 0 count.
            self.process_group.all_gather(None)  # all have succeeded, and call the next operations
            with torch.no_grad():
                for tensor in (*lane.parameters.values(), *adapters.frozen(lane.fingerprint).values()):
                    self.process_group.broadcast_(tensor)

    @on_all_workers
    def step(self, fingerprints: Sequence[str]) -> list[str | WorkerError | None]:
        """Take an optimizer step with each lane.

        Returns:
            For each lane None; the reason why it has diverged and took no step; or the error of its optimizer
            step on one of the workers, after which its weights are not to be used.

        Raises:
            Exception: A worker could not compute the gradients; no lane has taken a step.
        """
        lanes = [self.lanes[name] for name in fingerprints]
        gradients = self.lane_group.backward(lanes)
        self.process_group.all_gather(None)  # all have succeeded, and call the all-reduce
        results = self.lane_group.reduce_gradients(lanes, *gradients)
        own = [
            result_or_error(partial(lane.take_optimizer_step, result))
            for lane, result in zip(lanes, results, strict=True)
        ]
        by_lane = zip(*self.process_group.all_gather(own), strict=True)
        return [next((one for one in of if isinstance(one, WorkerError)), of[0]) for of in by_lane]

    @on_all_workers
    def evaluate(self, split: ScoredSplit, fingerprints: Sequence[str]) -> list[EvaluationResult]:
        """Score lanes on a split; see `LaneGroup.evaluate`."""
        return self.lane_group.evaluate([self.lanes[name] for name in fingerprints], split)

    @on_all_workers
    def remove_lane(self, fingerprint: str) -> None:
        """Remove a lane, and its adapter if it has one."""
        self.lanes.pop(fingerprint, None)
        if self._lane_group is not None and fingerprint in self._lane_group.adapters.lanes:
            self._lane_group.adapters.remove_lane(fingerprint)

    @on_all_workers
    def detach_adapters(self) -> None:
        """Detach the adapters of the lane group, if there is one; the base model stays loaded."""
        self._detach()

    def close(self) -> None:
        """Detach the adapters of this worker and, on rank 0, end the loops of the other workers."""
        self._detach()
        if self.process_group.rank == 0:
            self.process_group.send_command(None)

    def _load_base_model(self, choice: ModelChoice, task: Task) -> BaseModel:
        key = (choice, task.name if task.has_head else "")  # a head makes the model specific to the task
        if self._base_model is None or self._base_model[0] != key:
            self._base_model = None  # frees the old model before the new one is loaded
            self._base_model = (key, self._base_model_loader(choice, task))
        return self._base_model[1]

    def _detach(self, adapters: Adapters | None = None) -> None:
        """Detach adapters, by default those of the lane group, and disable the base model's own dropout."""
        if adapters is None and self._lane_group is not None:
            adapters, self._lane_group = self._lane_group.adapters, None
        if adapters is not None:
            if self._base_model is not None:
                changes.disable_lane_dropout(self._base_model[1].model)
            adapters.detach()


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
