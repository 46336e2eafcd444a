"""A pack: the lanes of one shape that train at this moment over one frozen base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from orchestrator.finetune.data import dataset_cache
from orchestrator.finetune.data.batches import (
    Batch,
    Row,
    compute_max_row_length,
    make_training_batch,
    shuffled_indices,
)
from orchestrator.finetune.engine.lane import BackwardResult, Lane
from orchestrator.finetune.evaluation import baseline_scores
from orchestrator.finetune.evaluation.evaluate import EvaluationResult, EvaluationSplit, evaluate
from orchestrator.finetune.evaluation.forward import compute_logits, compute_losses
from orchestrator.finetune.models.loading import BaseModel
from orchestrator.finetune.process_group import ProcessGroup
from orchestrator.finetune.tasks.base import HELD_OUT_SPLITS, Image, Task
from orchestrator.study.configuration import Configuration
from variants.attach import Adapters

MAX_GENERATING_LANES = 4
"""Lanes whose answers are generated at once: keys and values of all their tokens are kept meanwhile (of
Qwen3-0.6B up to 4 GB a lane), more than training needs."""


@dataclass(frozen=True)
class TaskData:
    """A task's splits as tokens, and the base's own scores on two of them."""

    task: Task
    train: Sequence[Row]
    splits: Mapping[str, EvaluationSplit]
    untrained: Mapping[str, Mapping[str, float]]

    @classmethod
    def load(
        cls,
        configuration: Configuration,
        task: Task,
        base_model: BaseModel,
        adapters: Adapters,
        process_group: ProcessGroup,
        folder: Path,
    ) -> TaskData:
        """From `folder`, where it is kept. Raises BadInput when the task has not the data it should, when
        `max_length` leaves nothing of them, or when answers could not be graded here."""
        process_group.run_on_all(task.check_can_grade)
        prepared = dataset_cache.prepare_dataset(folder, configuration, task, base_model.processor)
        max_length = compute_max_row_length(task, configuration.batches.max_length)
        splits: Mapping[str, EvaluationSplit] = {
            s: EvaluationSplit(
                prepared.examples[s], prepared.rows[s], max_length, base_model.processor.pad_token_id
            )
            for s in HELD_OUT_SPLITS
        }

        def compute() -> baseline_scores.Scores:
            return {
                s: evaluate(base_model, task, split, 1, adapters.disable_adapters, process_group)[0].scores
                for s, split in splits.items()
            }

        untrained = baseline_scores.load_or_compute_scores(
            folder, configuration, task, process_group, compute
        )
        return cls(task, prepared.rows["train"], splits, untrained)


@dataclass(frozen=True)
class LocalGradients:
    """Backward passes that this worker has done: gradients lie in the lanes' parameters, still without the
    other workers' share. `flat`: the lanes' losses (K,); with other workers also which of all parameters have
    a gradient here, and those gradients."""

    lanes: Sequence[Lane]
    flat_tensor: Tensor
    token_counts: Sequence[int]


class LaneGroup:
    """The arithmetic of a round. Knows no source and no store."""

    def __init__(
        self, base_model: BaseModel, adapters: Adapters, data: TaskData, process_group: ProcessGroup
    ) -> None:
        self.base_model, self.adapters, self.data, self.process_group = (
            base_model,
            adapters,
            data,
            process_group,
        )

    def backward(self, lanes: Sequence[Lane]) -> LocalGradients:
        """Leaves this worker's part of every lane's gradients of one optimizer step in its parameters;
        changes nothing else, so it can be done again when it raises.

        The loss of a lane is the sum over its tokens divided by the tokens of its whole accumulated batch, on
        all workers. The lanes' losses are added; as no two share a parameter, each gets its own gradient.
        """
        if self.data.task.inputs == "image":
            self.base_model.processor.prefetch(
                image for ahead in (0, 1) for image in self._upcoming_images(lanes, ahead)
            )
        micro_batches = [self._micro_batches(lane) for lane in lanes]
        token_counts = [sum(batch.target_count for batch in batches) for batches in micro_batches]
        losses_by_lane: list[list[Tensor]] = [[] for _ in lanes]
        for lane in lanes:
            lane.optimizer.zero_grad(set_to_none=True)
        for micro in range(len(micro_batches[0])):
            # By length, so that no lane is padded for another's sake.
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
            # Here and not in `reduce`: what may find no memory comes before the others are waited for.
            parameters = [p for lane in lanes for p in lane.parameters.values()]
            has_gradient = flat.new_tensor([float(p.grad is not None) for p in parameters])
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            flat = torch.cat([flat, has_gradient, *(g.flatten().to(flat.dtype) for g in gradients)])
        return LocalGradients(lanes, flat, token_counts)

    def reduce_gradients(self, local: LocalGradients) -> list[BackwardResult]:
        """Adds the workers' parts up, losses and gradients of all lanes in one flat tensor. All workers have
        to come here."""
        lanes, flat_tensor = local.lanes, local.flat_tensor
        if self.process_group.world_size > 1:
            self.process_group.all_reduce_(flat_tensor)
            parameters = [p for lane in lanes for p in lane.parameters.values()]
            sizes = [len(lanes), len(parameters), *(p.numel() for p in parameters)]
            flat_tensor, has_gradient, *summed = flat_tensor.split(sizes)
            for parameter, anyone, total in zip(parameters, has_gradient.tolist(), summed, strict=True):
                parameter.grad = total.view_as(parameter).to(parameter.dtype) if anyone else None
        # One copy from the device for all lanes.
        values = torch.cat(
            [flat_tensor, torch.stack([_gradient_norm(lane) for lane in lanes]).to(flat_tensor.dtype)]
        ).tolist()
        count = len(lanes)
        return [
            BackwardResult(*three)
            for three in zip(values[:count], values[count:], local.token_counts, strict=True)
        ]

    def _micro_batches(self, lane: Lane) -> list[Batch]:
        batches = lane.configuration.batches
        first = lane.step * batches.accumulation
        return [
            make_training_batch(
                self.data.train,
                lane.configuration.seed,
                (first + micro) * batches.batch_size,
                batches.batch_size,
                compute_max_row_length(self.data.task, batches.max_length),
                self.base_model.processor.pad_token_id,
            )
            for micro in range(batches.accumulation)
        ]

    def _upcoming_images(self, lanes: Sequence[Lane], steps_ahead: int) -> Iterator[Image]:
        """What this worker will be asked for at the lanes' next step but `ahead`."""
        for lane in lanes:
            batches = lane.configuration.batches
            first = (lane.step + steps_ahead) * batches.accumulation
            for micro in range(first, first + batches.accumulation):
                drawn = shuffled_indices(
                    lane.configuration.seed,
                    len(self.data.train),
                    micro * batches.batch_size,
                    batches.batch_size,
                )
                for number in drawn[slice(*self._own_rows(len(drawn)))]:
                    image = self.data.train[number].image
                    assert image is not None
                    yield image

    def _own_rows(self, rows: int) -> tuple[int, int]:
        """This worker's rows of a micro-batch: the first, and the one behind the last."""
        mine = np.array_split(np.arange(rows), self.process_group.world_size)[self.process_group.rank]
        return int(mine[0]), int(mine[-1]) + 1

    def _backward_micro_batch(
        self, lanes: Sequence[Lane], batches: Sequence[Batch], token_counts: Sequence[int], micro: int
    ) -> Sequence[Tensor]:
        """Each lane's part of its loss from this worker's rows of one micro-batch, detached."""
        row_count = len(batches[0].ids)
        first, last = self._own_rows(row_count)
        own_batches = [batch.slice_rows(first, last) for batch in batches]
        joined_batch = Batch.concatenate(own_batches)
        with self.adapters.activate_lanes(
            [lane.fingerprint for lane in lanes],
            [lane.step for lane in lanes],
            micro,
            rows_per_lane=last - first,
            shard=(first, row_count),
            attention_mask=joined_batch.attention_mask.to(self.base_model.device)
            if self.adapters.variant.has_auxiliary_loss
            else None,
        ) as now:
            logits, labels = compute_logits(self.base_model, self.data.task, joined_batch)
            by_lane = compute_losses(logits, labels, self.data.task).split(
                [batch.target_count for batch in own_batches]
            )
            lane_losses = torch.stack(
                [one.sum() / total for one, total in zip(by_lane, token_counts, strict=True)]
            )
            objective = lane_losses.sum()
            if (extra := now.auxiliary_loss()) is not None:
                # A mean over examples: by this part's share of theirs it counts once over the whole step.
                accumulation = lanes[0].configuration.batches.accumulation
                objective = objective + extra.sum() * ((last - first) / (row_count * accumulation))
            objective.backward()
        return lane_losses.detach().unbind()

    def evaluate(
        self, lanes: Sequence[Lane], split: str, force_generation: bool = False
    ) -> list[EvaluationResult]:
        """`always`: with answers generated, also for lanes on their way of a task that has them graded at the
        end (to see what memory they need)."""
        found: dict[str, EvaluationResult] = {}
        force_generation = force_generation or self.data.task.grade_at == "every_evaluation"
        for generate in (False, True):
            due = [lane for lane in lanes if generate == (force_generation or lane.is_at_last_step)]
            max_together = (
                MAX_GENERATING_LANES
                if generate and self.data.task.output == "generation"
                else max(1, len(due))
            )
            for first in range(0, len(due), max_together):
                together = due[first : first + max_together]
                names = [lane.fingerprint for lane in together]
                scored = evaluate(
                    self.base_model,
                    self.data.task,
                    self.data.splits[split],
                    len(together),
                    partial(self.adapters.activate_lanes, names, None),
                    self.process_group,
                    [lane.configuration.seed for lane in together],
                    generate,
                )
                found.update(zip(names, scored, strict=True))
        return [found[lane.fingerprint] for lane in lanes]


def _gradient_norm(lane: Lane) -> Tensor:
    """The global norm of a lane's gradient, a scalar on the device."""
    gradients = [p.grad for p in lane.parameters.values() if p.grad is not None]
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
