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
from orchestrator.finetune.data.batches import Batch, Row, longest, numbers, training_batch
from orchestrator.finetune.engine.lane import Lane, Taken
from orchestrator.finetune.evaluation import baseline_scores
from orchestrator.finetune.evaluation.evaluate import Scored, Split, evaluate
from orchestrator.finetune.evaluation.forward import losses, outputs
from orchestrator.finetune.models.loading import Bench
from orchestrator.finetune.process_group import Team
from orchestrator.finetune.tasks.base import HELD_OUT, Image, Task
from orchestrator.study.configuration import Configuration
from variants.attach import Adapters

GENERATING = 4
"""Lanes whose answers are generated at once: keys and values of all their tokens are kept meanwhile (of
Qwen3-0.6B up to 4 GB a lane), more than training needs."""


@dataclass(frozen=True)
class Data:
    """A task's splits as tokens, and the base's own scores on two of them."""

    task: Task
    train: Sequence[Row]
    splits: Mapping[str, Split]
    untrained: Mapping[str, Mapping[str, float]]

    @classmethod
    def of(
        cls,
        configuration: Configuration,
        task: Task,
        bench: Bench,
        adapters: Adapters,
        team: Team,
        folder: Path,
    ) -> Data:
        """From `folder`, where it is kept. Raises BadInput when the task has not the data it should, when
        `max_length` leaves nothing of them, or when answers could not be graded here."""
        team.attempt(task.can_grade)
        kept = dataset_cache.prepare(folder, configuration, task, bench.processor)
        cap = longest(task, configuration.batches.max_length)
        splits: Mapping[str, Split] = {
            s: Split(kept.examples[s], kept.rows[s], cap, bench.processor.pad_token_id) for s in HELD_OUT
        }

        def compute() -> baseline_scores.Scores:
            return {
                s: evaluate(bench, task, split, 1, adapters.off, team)[0].scores
                for s, split in splits.items()
            }

        own = baseline_scores.scores(folder, configuration, task, team, compute)
        return cls(task, kept.rows["train"], splits, own)


@dataclass(frozen=True)
class Pending:
    """Backward passes that this worker has done: gradients lie in the lanes' parameters, still without the
    other workers' share. `flat`: the lanes' losses (K,); with other workers also which of all parameters have
    a gradient here, and those gradients."""

    lanes: Sequence[Lane]
    flat: Tensor
    totals: Sequence[int]


class Pack:
    """The arithmetic of a round. Knows no source and no store."""

    def __init__(self, bench: Bench, adapters: Adapters, data: Data, team: Team) -> None:
        self.bench, self.adapters, self.data, self.team = bench, adapters, data, team

    def backward(self, lanes: Sequence[Lane]) -> Pending:
        """Leaves this worker's part of every lane's gradients of one optimizer step in its parameters;
        changes nothing else, so it can be done again when it raises.

        The loss of a lane is the sum over its tokens divided by the tokens of its whole accumulated batch, on
        all workers. The lanes' losses are added; as no two share a parameter, each gets its own gradient.
        """
        if self.data.task.inputs == "image":
            self.bench.processor.soon(image for ahead in (0, 1) for image in self._images(lanes, ahead))
        micros = [self._batches(lane) for lane in lanes]
        totals = [sum(batch.tokens for batch in batches) for batches in micros]
        parts: list[list[Tensor]] = [[] for _ in lanes]
        for lane in lanes:
            lane.optimizer.zero_grad(set_to_none=True)
        for micro in range(len(micros[0])):
            # By length, so that no lane is padded for another's sake.
            groups: dict[int, list[int]] = {}
            for index, batches in enumerate(micros):
                groups.setdefault(batches[micro].length, []).append(index)
            for group in groups.values():
                found = self._backward(
                    [lanes[i] for i in group],
                    [micros[i][micro] for i in group],
                    [totals[i] for i in group],
                    micro,
                )
                for index, part in zip(group, found, strict=True):
                    parts[index].append(part)
        flat = torch.stack([torch.stack(of).sum() for of in parts])
        if self.team.size > 1:
            # Here and not in `reduce`: what may find no memory comes before the others are waited for.
            every = [p for lane in lanes for p in lane.parameters.values()]
            reached = flat.new_tensor([float(p.grad is not None) for p in every])
            parts_of = [torch.zeros_like(p) if p.grad is None else p.grad for p in every]
            flat = torch.cat([flat, reached, *(g.flatten().to(flat.dtype) for g in parts_of)])
        return Pending(lanes, flat, totals)

    def reduce(self, pending: Pending) -> list[Taken]:
        """Adds the workers' parts up, losses and gradients of all lanes in one flat tensor. All workers have
        to come here."""
        lanes, found = pending.lanes, pending.flat
        if self.team.size > 1:
            self.team.sum_(found)
            every = [p for lane in lanes for p in lane.parameters.values()]
            sizes = [len(lanes), len(every), *(p.numel() for p in every)]
            found, reached, *summed = found.split(sizes)
            for parameter, anyone, total in zip(every, reached.tolist(), summed, strict=True):
                parameter.grad = total.view_as(parameter).to(parameter.dtype) if anyone else None
        # One copy from the device for all lanes.
        told = torch.cat([found, torch.stack([_norm(lane) for lane in lanes]).to(found.dtype)]).tolist()
        count = len(lanes)
        return [Taken(*three) for three in zip(told[:count], told[count:], pending.totals, strict=True)]

    def _batches(self, lane: Lane) -> list[Batch]:
        batches = lane.configuration.batches
        first = lane.step * batches.accumulation
        return [
            training_batch(
                self.data.train,
                lane.configuration.seed,
                (first + micro) * batches.batch_size,
                batches.batch_size,
                longest(self.data.task, batches.max_length),
                self.bench.processor.pad_token_id,
            )
            for micro in range(batches.accumulation)
        ]

    def _images(self, lanes: Sequence[Lane], ahead: int) -> Iterator[Image]:
        """What this worker will be asked for at the lanes' next step but `ahead`."""
        for lane in lanes:
            batches = lane.configuration.batches
            first = (lane.step + ahead) * batches.accumulation
            for micro in range(first, first + batches.accumulation):
                drawn = numbers(
                    lane.configuration.seed,
                    len(self.data.train),
                    micro * batches.batch_size,
                    batches.batch_size,
                )
                for number in drawn[slice(*self._mine(len(drawn)))]:
                    image = self.data.train[number].image
                    assert image is not None
                    yield image

    def _mine(self, rows: int) -> tuple[int, int]:
        """This worker's rows of a micro-batch: the first, and the one behind the last."""
        mine = np.array_split(np.arange(rows), self.team.size)[self.team.rank]
        return int(mine[0]), int(mine[-1]) + 1

    def _backward(
        self, lanes: Sequence[Lane], batches: Sequence[Batch], totals: Sequence[int], micro: int
    ) -> Sequence[Tensor]:
        """Each lane's part of its loss from this worker's rows of one micro-batch, detached."""
        of = len(batches[0].ids)
        first, last = self._mine(of)
        own = [batch.part(first, last) for batch in batches]
        whole = Batch.joined(own)
        with self.adapters.rows(
            [lane.name for lane in lanes],
            [lane.step for lane in lanes],
            micro,
            rows=last - first,
            part=(first, of),
            real=whole.real.to(self.bench.device) if self.adapters.variant.auxiliary else None,
        ) as now:
            logits, labels = outputs(self.bench, self.data.task, whole)
            by_lane = losses(logits, labels, self.data.task).split([batch.tokens for batch in own])
            parts = torch.stack([one.sum() / total for one, total in zip(by_lane, totals, strict=True)])
            objective = parts.sum()
            if (extra := now.auxiliary_loss()) is not None:
                # A mean over examples: by this part's share of theirs it counts once over the whole step.
                accumulation = lanes[0].configuration.batches.accumulation
                objective = objective + extra.sum() * ((last - first) / (of * accumulation))
            objective.backward()
        return parts.detach().unbind()

    def scores(self, lanes: Sequence[Lane], split: str, always: bool = False) -> list[Scored]:
        """`always`: with answers generated, also for lanes on their way of a task that has them graded at the
        end (to see what memory they need)."""
        found: dict[str, Scored] = {}
        always = always or self.data.task.graded == "always"
        for generate in (False, True):
            due = [lane for lane in lanes if generate == (always or lane.at_end)]
            most = GENERATING if generate and self.data.task.answers == "generated" else max(1, len(due))
            for first in range(0, len(due), most):
                together = due[first : first + most]
                names = [lane.name for lane in together]
                scored = evaluate(
                    self.bench,
                    self.data.task,
                    self.data.splits[split],
                    len(together),
                    partial(self.adapters.rows, names, None),
                    self.team,
                    [lane.configuration.seed for lane in together],
                    generate,
                )
                found.update(zip(names, scored, strict=True))
        return [found[lane.name] for lane in lanes]


def _norm(lane: Lane) -> Tensor:
    """The global norm of a lane's gradient, a scalar on the device."""
    gradients = [p.grad for p in lane.parameters.values() if p.grad is not None]
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
