"""A lane group: the lanes of equal tensor shapes that train together over one frozen base model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from orchestrator.finetune.data import dataset_cache
from orchestrator.finetune.data.batches import Batch, Row, compute_max_row_length, make_training_batch
from orchestrator.finetune.engine.lane import BackwardResult, Lane
from orchestrator.finetune.evaluation import baseline_scores
from orchestrator.finetune.evaluation.evaluate import EvaluationResult, EvaluationSplit, evaluate
from orchestrator.finetune.evaluation.forward import compute_logits, compute_losses
from orchestrator.finetune.models.base_model import BaseModel
from orchestrator.finetune.process_group import ProcessGroup
from orchestrator.finetune.tasks.base import Task
from orchestrator.finetune.tasks.examples import HELD_OUT_SPLITS
from orchestrator.study.configuration import Configuration
from variants.attach import Adapters

MAX_GENERATING_LANES = 4
"""Lanes whose answers are generated together. The key-value cache of all their tokens stays in memory (up to
4 GB a lane for Qwen3-0.6B), which is more than training needs."""


@dataclass(frozen=True)
class TaskData:
    """The tokenised splits of a task, and the scores of the untrained base model."""

    task: Task
    train: Sequence[Row]
    splits: Mapping[str, EvaluationSplit]
    """Validation and test."""
    untrained: Mapping[str, Mapping[str, float]]
    """Split -> score name -> score of the base model without a lane."""

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
        """Read the prepared data of a task, and the base model's scores, or compute and store them.

        Args:
            configuration: Names the task's data and the length limit.
            task: The task.
            base_model: Its processor tokenises the data; the model computes the untrained scores.
            adapters: The adapters of the model; they are disabled while it is scored.
            process_group: The workers of this trainer, which share the scoring.
            folder: The store's folder of prepared data.
            on_batch: Called after every batch that is scored, and while data is prepared, to show progress.

        Raises:
            UsageError: The task lacks data, `max_length` leaves nothing of it, or this machine cannot grade
                the answers.
        """
        process_group.run_on_all(task.check_can_grade)
        prepared = dataset_cache.prepare_dataset(
            folder, configuration, task, base_model.processor, progress=lambda line: on_batch()
        )
        max_length = compute_max_row_length(task, configuration.batches.max_length)
        pad_token_id = base_model.processor.pad_token_id
        splits: Mapping[str, EvaluationSplit] = {
            s: EvaluationSplit(prepared.examples[s], prepared.rows[s], max_length, pad_token_id)
            for s in HELD_OUT_SPLITS
        }

        def compute() -> baseline_scores.Scores:
            return {
                s: evaluate(
                    base_model,
                    task,
                    split,
                    [0],
                    adapters.disable_adapters,
                    process_group,
                    on_batch=on_batch,
                )[0].scores
                for s, split in splits.items()
            }

        untrained = baseline_scores.load_or_compute_scores(
            folder, configuration, task, process_group, compute
        )
        return cls(task, prepared.rows["train"], splits, untrained)


class LaneGroup:
    """Computes losses, gradients and scores of lanes. It uses neither the source nor the store.

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

    def backward(self, lanes: Sequence[Lane]) -> tuple[Tensor, Sequence[int]]:
        """Compute this worker's part of the gradients of one optimizer step of every lane.

        The gradients are left in the lanes' parameters and nothing else changes, so the call can be repeated
        after an error. The loss of a lane is the sum over its target tokens, divided by the number of target
        tokens in its whole accumulated batch on all workers. One backward pass over the sum of the lanes'
        losses gives each lane its own gradient, because no two lanes share a parameter.

        Returns:
            The losses of the K lanes, shape (K,), and the target tokens of each lane's batch on all workers.
            With several workers the tensor continues with one flag for each parameter (1 if it has a gradient
            here) and with all gradients, flattened.
        """
        if self.data.task.inputs == "image":
            upcoming = [batch for n in (0, 1) for lane in lanes for batch in self._micro_batches(lane, n)]
            self.base_model.processor.prefetch(
                image for batch in upcoming for image in batch.images[slice(*self._own_rows(len(batch.ids)))]
            )
        micro_batches = [self._micro_batches(lane) for lane in lanes]
        token_counts = [sum(batch.target_count for batch in batches) for batches in micro_batches]
        losses_by_lane: list[list[Tensor]] = [[] for _ in lanes]
        for lane in lanes:
            lane.optimizer.zero_grad(set_to_none=True)
        for micro in range(len(micro_batches[0])):
            # Lanes of equal length only are batched together, so that no lane's result depends on padding.
            groups: dict[int, list[int]] = {}
            for index, batches in enumerate(micro_batches):
                groups.setdefault(batches[micro].length, []).append(index)
            for group in groups.values():
                micro_losses = self._backward_micro_batch(
                    [lanes[i] for i in group],
                    [micro_batches[i][micro] for i in group],
                    [token_counts[i] for i in group],
                    micro,
                )
                for index, part in zip(group, micro_losses, strict=True):
                    losses_by_lane[index].append(part)
        flat = torch.stack([torch.stack(of).sum() for of in losses_by_lane])
        if self.process_group.world_size > 1:
            # Allocated here, not in `reduce_gradients`: an out-of-memory error must come before the
            # all-reduce, in which the other workers would wait.
            parameters = [p for lane in lanes for p in lane.parameters.values()]
            has_gradient = flat.new_tensor([float(p.grad is not None) for p in parameters])
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            flat = torch.cat([flat, has_gradient, *(g.flatten().to(flat.dtype) for g in gradients)])
        return flat, token_counts

    def reduce_gradients(
        self, lanes: Sequence[Lane], flat_tensor: Tensor, token_counts: Sequence[int]
    ) -> list[BackwardResult]:
        """Add the losses and gradients of all workers, with one all-reduce of one flat tensor.

        All workers must call this method, with the results of their `backward`.
        """
        if self.process_group.world_size > 1:
            self.process_group.all_reduce_(flat_tensor)
            parameters = [p for lane in lanes for p in lane.parameters.values()]
            sizes = [len(lanes), len(parameters), *(p.numel() for p in parameters)]
            flat_tensor, has_gradient, *summed = flat_tensor.split(sizes)
            for parameter, anyone, total in zip(parameters, has_gradient.tolist(), summed, strict=True):
                parameter.grad = total.view_as(parameter).to(parameter.dtype) if anyone else None
        # One copy from the device for all lanes, because each copy waits for the device.
        norms = torch.stack([_gradient_norm(lane) for lane in lanes]).to(flat_tensor.dtype)
        losses, gradient_norms = torch.stack([flat_tensor, norms]).tolist()
        return list(map(BackwardResult, losses, gradient_norms, token_counts))

    def micro_batch(self, configuration: Configuration, number: int) -> Batch:
        """Return a micro-batch of a configuration, counted from the start of its training."""
        count = configuration.batches.micro_batch_size
        return make_training_batch(
            self.data.train,
            configuration.seed,
            number * count,
            count,
            compute_max_row_length(self.data.task, configuration.batches.max_length),
            self.base_model.processor.pad_token_id,
        )

    def _micro_batches(self, lane: Lane, steps_ahead: int = 0) -> list[Batch]:
        """Return the micro-batches of the lane's next step, or of one that many steps later."""
        count = lane.configuration.batches.accumulation_steps
        first = (lane.step + steps_ahead) * count
        return [self.micro_batch(lane.configuration, number) for number in range(first, first + count)]

    def _own_rows(self, rows: int) -> tuple[int, int]:
        """Return this worker's rows of a micro-batch of `rows` rows as a half-open range."""
        mine = np.array_split(np.arange(rows), self.process_group.world_size)[self.process_group.rank]
        return int(mine[0]), int(mine[-1]) + 1

    def _backward_micro_batch(
        self, lanes: Sequence[Lane], batches: Sequence[Batch], token_counts: Sequence[int], micro: int
    ) -> Sequence[Tensor]:
        """Run forward and backward over this worker's rows of one micro-batch of each lane.

        Args:
            lanes: Lanes whose micro-batches have equal length.
            batches: One micro-batch a lane, with the rows of all workers.
            token_counts: Target tokens of each lane's accumulated batch, by which its loss is divided.
            micro: The number of the micro-batch within the step, which seeds dropout.

        Returns:
            For each lane, these rows' part of its loss, a detached scalar.
        """
        row_count = len(batches[0].ids)
        first, last = self._own_rows(row_count)
        own_batches = [batch.slice_rows(first, last) for batch in batches]
        joined_batch = Batch.concatenate(own_batches)
        needs_mask = self.adapters.variant.has_auxiliary_loss
        with self.adapters.activate_lanes(
            [lane.fingerprint for lane in lanes],
            [lane.step for lane in lanes],
            micro,
            rows_per_lane=last - first,
            shard=(first, row_count),
            attention_mask=joined_batch.attention_mask.to(self.base_model.device) if needs_mask else None,
        ) as now:
            logits, labels = compute_logits(self.base_model, self.data.task, joined_batch)
            losses = compute_losses(logits, labels, self.data.task)
            by_lane = losses.split([batch.target_count for batch in own_batches])
            lane_losses = torch.stack([x.sum() / n for x, n in zip(by_lane, token_counts, strict=True)])
            objective = lane_losses.sum()
            if (extra := now.auxiliary_loss()) is not None:
                # The auxiliary loss is a mean over these rows: weighted by their share of the step's rows,
                # the parts add up to one mean over the step.
                accumulation = lanes[0].configuration.batches.accumulation_steps
                objective = objective + extra.sum() * ((last - first) / (row_count * accumulation))
            objective.backward()
        return lane_losses.detach().unbind()

    def evaluate(self, lanes: Sequence[Lane], split: str) -> list[EvaluationResult]:
        """Score the lanes on a split, in the order of `lanes`.

        Answers are generated for all lanes if the task grades every evaluation, else for those at their last
        step.
        """
        found: dict[str, EvaluationResult] = {}
        grades_always = self.data.task.grade_at == "every_evaluation"
        for generate in (False, True):
            due = [lane for lane in lanes if generate == (grades_always or lane.is_at_last_step)]
            generates = generate and self.data.task.output == "generation"
            max_together = MAX_GENERATING_LANES if generates else max(1, len(due))
            for first in range(0, len(due), max_together):
                together = due[first : first + max_together]
                names = [lane.fingerprint for lane in together]
                scored = evaluate(
                    self.base_model,
                    self.data.task,
                    self.data.splits[split],
                    [lane.configuration.seed for lane in together],
                    partial(self.adapters.activate_lanes, names, None),
                    self.process_group,
                    generate,
                    self.on_batch,
                )
                found.update(zip(names, scored, strict=True))
        return [found[lane.fingerprint] for lane in lanes]


def _gradient_norm(lane: Lane) -> Tensor:
    """Return the L2 norm of all gradients of a lane, a scalar on the device."""
    gradients = [p.grad for p in lane.parameters.values() if p.grad is not None]
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
