"""A lane group: the lanes of equal tensor shapes that train together over one frozen base model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from orchestrator.finetune.data.batches import (
    Batch,
    DeviceBatch,
    Row,
    Share,
    StepBatchLoader,
    compute_max_row_length,
    make_training_batch,
)
from orchestrator.finetune.engine.lane import BackwardResult, Lane
from orchestrator.finetune.evaluation.evaluate import (
    BaselineScores,
    EvaluationResult,
    EvaluationSplit,
    Scores,
    evaluate,
    evaluate_loss,
)
from orchestrator.finetune.evaluation.forward import compute_objective
from orchestrator.finetune.evaluation.general_text import make_general_split
from orchestrator.finetune.evaluation.generate import EvaluatedLanes, count_lanes_together
from orchestrator.finetune.models.base_model import BaseModel
from orchestrator.finetune.process_group import ProcessGroup, copy_without_waiting
from orchestrator.finetune.tasks.base import Task
from orchestrator.finetune.tasks.examples import HELD_OUT_SPLITS
from orchestrator.record.schema import ScoredSplit
from orchestrator.study.configuration import Configuration
from variants.adapters import Adapters
from variants.api import AuxiliaryLoss

SAMPLED_ROWS = 256
"""The number of training rows whose mean length counts."""


@dataclass(frozen=True)
class TaskData:
    """The tokenized splits of a task, and the scores of the untrained base model."""

    task: Task
    train: Sequence[Row]
    splits: Mapping[ScoredSplit, EvaluationSplit]
    """Validation and test, and for a language model "general" (see `general_text`)."""
    baseline: BaselineScores
    """The scores of the base model without a lane, at least the validation loss."""
    general_scores: Scores = field(default_factory=dict)
    """Its scores on the split "general"."""

    @classmethod
    def load(
        cls,
        configuration: Configuration,
        task: Task,
        base_model: BaseModel,
        adapters: Adapters,
        process_group: ProcessGroup,
        folder: Path,
        on_batch: Callable[[], None] = lambda: None,
    ) -> TaskData:
        """Read the prepared data of a task and the base model's loss; compute and store what is missing.

        Args:
            configuration: Names the task's data and the length limit.
            task: The task.
            base_model: Its processor tokenizes the data; the model computes the untrained scores.
            adapters: The adapters of the model; they are disabled while it is scored.
            process_group: The workers of this trainer, which share the scoring.
            folder: The store's folder of prepared data.
            on_batch: Called after every batch that is scored, and while data is prepared, to show progress.

        Raises:
            UsageError: The task lacks data, `max_length` leaves nothing of it, or this machine cannot grade
                its answers.
            WorkerError: Another worker has failed.
        """
        # This imports pyarrow, which lanes on rows in memory do not need: experiments/benchmarks/gpu.py runs
        # where it is missing.
        from orchestrator.finetune.data import dataset_cache

        task.check_can_grade()
        prepared = dataset_cache.prepare_dataset(
            folder, configuration, task, base_model.processor, progress=lambda line: on_batch()
        )
        max_length = compute_max_row_length(task, configuration.batches.max_length)
        splits: dict[ScoredSplit, EvaluationSplit] = {
            s: EvaluationSplit(prepared.examples[s], prepared.rows[s], max_length, base_model.processor)
            for s in HELD_OUT_SPLITS
        }
        general = make_general_split(task, base_model)
        if general is not None:
            splits["general"] = general
        baseline = BaselineScores(folder, configuration)
        data = cls(task, prepared.rows["train"], splits, baseline)
        has_answers = task.output == "generation"
        at_once = ("validation",) if has_answers else HELD_OUT_SPLITS
        group = LaneGroup(base_model, adapters, data, process_group, on_batch)
        baseline.load_or_compute_loss(
            lambda: group.score_base_model(at_once, False), has_answers, process_group
        )
        if general is None:
            return data
        before = BaselineScores(folder, configuration, general)
        before.load_or_compute_loss(lambda: group.score_base_model(("general",), False), False, process_group)
        return replace(data, general_scores=before.scores)


class LaneGroup:
    """A group of lanes that computes their losses, gradients and scores. It uses no lane source.

    Args:
        base_model: The frozen base model.
        adapters: The lanes' adapters on it.
        data: The task's data.
        process_group: The workers of this trainer.
        on_batch: Called after every batch of an evaluation, to show progress.
    """

    def __init__(
        self,
        base_model: BaseModel,
        adapters: Adapters,
        data: TaskData,
        process_group: ProcessGroup,
        on_batch: Callable[[], None] = lambda: None,
    ) -> None:
        self.base_model, self.adapters = base_model, adapters
        self.data, self.process_group, self.on_batch = data, process_group, on_batch
        self._loader: StepBatchLoader | None = None

    def backward(self, lanes: Sequence[Lane]) -> tuple[Tensor, Sequence[int]]:
        """Compute this worker's part of the gradients of one optimizer step of every lane.

        The gradients are left in the lanes' parameters and nothing else changes, so the call can be repeated
        after an error. The loss of a lane is the sum over its target tokens, divided by the number of target
        tokens in its whole accumulated batch on all workers. One backward pass over the sum of the lanes'
        losses gives each lane its own gradient, because no two lanes share a parameter. On a GPU the host
        queues the whole step without waiting for the device.

        Returns:
            The losses of the K lanes, shape (K,), and the target tokens of each lane's batch on all workers.
            With several workers the tensor continues with one flag for each parameter (1 if it has a gradient
            here) and with all gradients, flattened.
        """
        loader = self._get_loader(lanes)
        steps = loader.load([(lane.configuration.seed, lane.step) for lane in lanes])
        if self.data.task.inputs == "image":
            both = [*steps, *loader.load(_next_steps(lanes))]
            self.base_model.processor.prefetch(i for s in both for b in s.batches for i in b.images)
        token_counts = [step.target_count for step in steps]
        losses_by_lane: list[list[Tensor]] = [[] for _ in lanes]
        for lane in lanes:
            lane.optimizer.zero_grad(set_to_none=True)
        for number, share in enumerate(loader.shares):
            # Only lanes whose micro-batches have the same padded length are computed together: otherwise the
            # padding of a lane's rows, and so its result, would depend on the other lanes.
            groups: dict[int, list[int]] = {}
            for index, step in enumerate(steps):
                groups.setdefault(step.batches[number].length, []).append(index)
            for group in groups.values():
                parts = self._backward_micro_batch(
                    [lanes[i] for i in group],
                    [steps[i].batches[number] for i in group],
                    [token_counts[i] for i in group],
                    share,
                )
                for index, part in zip(group, parts, strict=True):
                    losses_by_lane[index].append(part)
        # The next call finds these batches made. A GPU computes meanwhile what is queued so far.
        loader.load(_next_steps(lanes))
        flat = torch.stack([torch.stack(of).sum() for of in losses_by_lane])
        if self.process_group.world_size > 1:
            # Allocated here, not in `reduce_gradients`: an out-of-memory error must come before the
            # all-reduce, in which the other workers would wait.
            parameters = [p for lane in lanes for p in lane.parameters.values()]
            flags = torch.tensor([p.grad is not None for p in parameters], dtype=flat.dtype)
            has_gradient = copy_without_waiting(flags, flat.device)
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            flat = torch.cat([flat, has_gradient, *(g.flatten().to(flat.dtype) for g in gradients)])
        return flat, token_counts

    def reduce_gradients(
        self, lanes: Sequence[Lane], flat_tensor: Tensor, token_counts: Sequence[int]
    ) -> list[BackwardResult]:
        """Add the losses and gradients of all workers, with one all-reduce of one flat tensor.

        All workers must call this method.

        Args:
            lanes: The lanes that were given to `backward`.
            flat_tensor: The losses of this worker, (K,), and with several workers its gradients; a result of
                `backward`.
            token_counts: The target tokens of each lane's batch, a result of `backward`.

        Returns:
            The result of each lane. The gradients of all workers are in the lanes' parameters.
        """
        has_gradient = flat_tensor.new_empty(0)
        parameters = [p for lane in lanes for p in lane.parameters.values()]
        if self.process_group.world_size > 1:
            self.process_group.all_reduce_(flat_tensor)
            sizes = [len(lanes), len(parameters), *(p.numel() for p in parameters)]
            flat_tensor, has_gradient, *summed = flat_tensor.split(sizes)
            for parameter, total in zip(parameters, summed, strict=True):
                parameter.grad = total.view_as(parameter).to(parameter.dtype)
        # One copy from the device for everything, because each copy waits for the device.
        norms = torch.stack([_gradient_norm(lane) for lane in lanes]).to(flat_tensor.dtype)
        numbers = torch.cat([flat_tensor, norms, has_gradient]).tolist()
        losses, gradient_norms = numbers[: len(lanes)], numbers[len(lanes) : 2 * len(lanes)]
        for parameter, workers in zip(parameters, numbers[2 * len(lanes) :], strict=False):
            if workers == 0:  # the optimizer skips None, but a zero gradient would change moments
                parameter.grad = None
        return list(map(BackwardResult, losses, gradient_norms, token_counts))

    def calibration_batch(self, configuration: Configuration, number: int) -> DeviceBatch:
        """Return rows in the order in which a configuration draws them, as many as in a micro-batch.

        Micro-batches are not used here, because their rows are selected by length.

        Args:
            configuration: The configuration.
            number: The number of the batch, counted from the start of training.
        """
        rows, count = self.data.train, configuration.batches.batch_size
        longest = compute_max_row_length(self.data.task, configuration.batches.max_length)
        pad_token_id = self.base_model.processor.pad_token_id
        batch = make_training_batch(rows, configuration.seed, number * count, count, longest, pad_token_id)
        return DeviceBatch.copy_to(self.base_model.device, [batch])

    def count_tokens(self, configuration: Configuration) -> int:
        """Return the mean number of tokens or image patches in a micro-batch of a lane, without padding."""
        train, batches = self.data.train, configuration.batches
        rows = [train[index] for index in range(min(len(train), SAMPLED_ROWS))]
        config = self.base_model.model.config
        config = getattr(config, "vision_config", None) or config  # of CLIP
        patches = (getattr(config, "image_size", 0) // getattr(config, "patch_size", 1)) ** 2
        lengths = [min(len(row.ids), batches.max_length) if row.image is None else patches for row in rows]
        return round(sum(lengths) / len(lengths) * batches.batch_size)

    def _get_loader(self, lanes: Sequence[Lane]) -> StepBatchLoader:
        """Return the loader of the group's batches, whose sizes are equal for all lanes of a group."""
        if self._loader is None:
            rows, sizes, workers = self.data.train, lanes[0].configuration.batches, self.process_group
            longest = compute_max_row_length(self.data.task, sizes.max_length)
            pad_token_id = self.base_model.processor.pad_token_id
            self._loader = StepBatchLoader(
                rows, sizes, longest, pad_token_id, workers.rank, workers.world_size
            )
        return self._loader

    def _backward_micro_batch(
        self, lanes: Sequence[Lane], batches: Sequence[Batch], token_counts: Sequence[int], share: Share
    ) -> Sequence[Tensor]:
        """Run forward and backward over this worker's rows of one micro-batch of each lane.

        Args:
            lanes: Lanes whose micro-batches have equal length.
            batches: This worker's rows of the micro-batch of each lane.
            token_counts: Target tokens of each lane's accumulated batch, by which its loss is divided.
            share: The number of the micro-batch within the step, which seeds dropout, and its rows.

        Returns:
            For each lane, these rows' part of its loss, a detached scalar.
        """
        sizes = lanes[0].configuration.batches
        row_count = share.last_row - share.first_row
        batch = DeviceBatch.copy_to(self.base_model.device, batches, [1 / n for n in token_counts])
        with self.adapters.activate_lanes(
            [lane.fingerprint for lane in lanes],
            [lane.step for lane in lanes],
            share.micro_batch,
            rows_per_lane=row_count,
            shard=(share.first_row, share.row_count),
            attention_mask=batch.attention_mask if isinstance(self.adapters.variant, AuxiliaryLoss) else None,
        ) as now:
            objective, losses = compute_objective(self.base_model, self.data.task, batch)
            if (extra := now.auxiliary_loss()) is not None:
                # The auxiliary loss is a mean over these rows: weighted by their share of the step's rows,
                # the parts add up to one mean over the step.
                step_rows = sizes.batch_size * sizes.accumulation
                objective = objective + extra.sum() * (row_count / step_rows)
            objective.backward()
        weighted = losses * batch.weights.to(losses.dtype)
        return [part.sum() for part in weighted.split(batch.lane_target_counts)]

    def evaluate(self, lanes: Sequence[Lane], split: ScoredSplit) -> list[EvaluationResult]:
        """Score the lanes on a split, in the order of `lanes`.

        Answers are generated for all lanes if the task grades every evaluation, else for those at their last
        step, and for none on "general".

        Args:
            lanes: The lanes.
            split: One of `TaskData.splits`.
        """
        found: dict[str, EvaluationResult] = {}
        task, scored_split = self.data.task, self.data.splits[split]
        has_answers = task.output == "generation" and split != "general"
        answering: Sequence[Lane] = lanes if has_answers else ()
        if task.grade_at != "every_evaluation":
            answering = [lane for lane in answering if lane.is_at_last_step]
        for generates in (False, True):
            due = [lane for lane in lanes if (lane in answering) == generates]
            max_together = max(1, len(due))
            if generates and due:
                max_together = count_lanes_together(
                    self.base_model, task, scored_split.prompt_lengths, scored_split.max_row_length
                )
            for first in range(0, len(due), max_together):
                together = due[first : first + max_together]
                names = [lane.fingerprint for lane in together]
                seeds = [lane.configuration.seed for lane in together]
                scored = self._evaluate(split, EvaluatedLanes(self.adapters, names, seeds), generates)
                found.update(zip(names, scored, strict=True))
        return [found[lane.fingerprint] for lane in lanes]

    def score_base_model(self, splits: Sequence[ScoredSplit], predict_with_generate: bool) -> Scores:
        """Return the scores of the base model without lanes on some splits; see `evaluate`."""
        lanes = EvaluatedLanes(self.adapters)
        return {split: self._evaluate(split, lanes, predict_with_generate)[0].scores for split in splits}

    def _evaluate(self, split: ScoredSplit, lanes: EvaluatedLanes, generates: bool) -> list[EvaluationResult]:
        of, workers = self.data.splits[split], self.process_group
        if split == "general":
            return evaluate_loss(self.base_model, self.data.task, of, lanes, workers, self.on_batch)
        return evaluate(self.base_model, self.data.task, of, lanes, workers, generates, self.on_batch)


def _next_steps(lanes: Sequence[Lane]) -> list[tuple[int, int]]:
    """Return seed and number of the steps after the present ones, of lanes not yet at their last step."""
    return [
        (lane.configuration.seed, lane.step + 1)
        for lane in lanes
        if lane.step + 1 < lane.configuration.lr_schedule.steps
    ]


def _gradient_norm(lane: Lane) -> Tensor:
    """Return the L2 norm of all gradients of a lane, a scalar on the device."""
    gradients = [p.grad for p in lane.parameters.values() if p.grad is not None]
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
