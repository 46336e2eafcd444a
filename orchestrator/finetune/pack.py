"""A pack: the lanes of one shape that train at this moment over one frozen base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from orchestrator.finetune.data import Batch, Row, encode, training_batch
from orchestrator.finetune.evaluate import Scored, Split, evaluate
from orchestrator.finetune.forward import answer_logits, token_losses
from orchestrator.finetune.lane import Lane, Taken
from orchestrator.finetune.models import Bench
from orchestrator.finetune.tasks.base import Task
from orchestrator.study.configuration import Configuration
from variants.attach import Adapters


@dataclass(frozen=True)
class Data:
    """A task's splits as tokens, and the base's own scores on two of them."""

    task: Task
    train: Sequence[Row]
    splits: Mapping[str, Split]
    untrained: Mapping[str, Mapping[str, float]]

    @classmethod
    def of(cls, configuration: Configuration, task: Task, bench: Bench, adapters: Adapters) -> Data:
        """Raises BadInput when the task has not the data it should or `max_length` leaves nothing of them."""
        examples = task.load(configuration.task)
        length = configuration.batches.max_length
        train = encode(examples["train"], task, bench.tokenizer, length)
        splits = {s: Split.of(examples[s], task, bench.tokenizer, length - 1) for s in ("validation", "test")}
        untrained = {
            s: evaluate(bench, task, split, 1, adapters.off)[0].scores for s, split in splits.items()
        }
        return cls(task, train, splits, untrained)


class Pack:
    """The arithmetic of a round. Knows no source and no store."""

    def __init__(self, bench: Bench, adapters: Adapters, data: Data) -> None:
        self.bench, self.adapters, self.data = bench, adapters, data

    def gradients(self, lanes: Sequence[Lane]) -> list[Taken]:
        """Leaves every lane's gradients of one optimizer step in its parameters; changes nothing else, so it
        can be done again when it raises.

        The loss of a lane is the sum over its tokens divided by the tokens of its whole accumulated batch.
        The lanes' losses are added; as no two share a parameter, each gets its own gradient.
        """
        micros = [self._batches(lane) for lane in lanes]
        totals = [sum(batch.tokens for batch in batches) for batches in micros]
        losses: list[list[Tensor]] = [[] for _ in lanes]
        for lane in lanes:
            lane.optimizer.zero_grad(set_to_none=True)
        for micro in range(len(micros[0])):
            # By length, so that no lane is padded for another's sake.
            groups: dict[int, list[int]] = {}
            for index, batches in enumerate(micros):
                groups.setdefault(batches[micro].length, []).append(index)
            for group in groups.values():
                parts = self._backward(
                    [lanes[i] for i in group],
                    [micros[i][micro] for i in group],
                    [totals[i] for i in group],
                    micro,
                )
                for index, part in zip(group, parts, strict=True):
                    losses[index].append(part)
        # One copy from the device for all lanes.
        found = torch.stack(
            [torch.stack(parts).sum() for parts in losses] + [_norm(lane) for lane in lanes]
        ).tolist()
        return [Taken(*three) for three in zip(found[: len(lanes)], found[len(lanes) :], totals, strict=True)]

    def _batches(self, lane: Lane) -> list[Batch]:
        batches = lane.configuration.batches
        first = lane.step * batches.accumulation
        return [
            training_batch(
                self.data.train,
                lane.configuration.seed,
                (first + micro) * batches.batch_size,
                batches.batch_size,
                batches.max_length - 1,
                self.bench.tokenizer.pad_token_id,
            )
            for micro in range(batches.accumulation)
        ]

    def _backward(
        self, lanes: Sequence[Lane], batches: Sequence[Batch], totals: Sequence[int], micro: int
    ) -> Sequence[Tensor]:
        """Each lane's part of its loss from one micro-batch, detached."""
        ids = torch.cat([b.ids for b in batches])
        targets = torch.cat([b.targets for b in batches])
        steps = [lane.step for lane in lanes]
        with self.adapters.rows([lane.name for lane in lanes], steps, micro, len(batches[0].ids)):
            logits, labels = answer_logits(self.bench.model, ids, targets, self.bench.device)
            by_lane = token_losses(logits, labels).split([b.tokens for b in batches])
            parts = torch.stack([one.sum() / total for one, total in zip(by_lane, totals, strict=True)])
            parts.sum().backward()
        return parts.detach().unbind()

    def scores(self, lanes: Sequence[Lane], split: str) -> list[Scored]:
        names = [lane.name for lane in lanes]
        return evaluate(
            self.bench,
            self.data.task,
            self.data.splits[split],
            len(lanes),
            lambda: self.adapters.rows(names, None),
        )


def _norm(lane: Lane) -> Tensor:
    """The global norm of a lane's gradient, a scalar on the device."""
    gradients = [p.grad for p in lane.parameters.values() if p.grad is not None]
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
