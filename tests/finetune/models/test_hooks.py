"""A variant's hooks in a lane: the gradients they receive, the effect of their changes, and resumption."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from scripted import configuration, tiny_base_model
from torch import Tensor

from orchestrator.finetune.engine.lane import Lane
from orchestrator.finetune.engine.lane_group import LaneGroup, TaskData
from orchestrator.finetune.engine.lane_source import Lease
from orchestrator.finetune.process_group import ProcessGroup
from orchestrator.finetune.tasks import catalogue as tasks
from orchestrator.study.configuration import Configuration
from variants import catalogue
from variants.adapters import attach
from variants.api import LaneView, StepHooks, Variant, VariantSettings
from variants.baseline.lora import LoRA


class Riemannian(StepHooks, LoRA):
    """Preconditioned LoRA (Zhang and Pilanci 2024, arXiv 2402.02347) that records the gradients it receives.

    g_A becomes (B^T B + d I)^-1 g_A, and g_B becomes g_B (A A^T + d I)^-1.
    """

    damping: ClassVar[float] = 0.1

    def __init__(self) -> None:
        self.seen: list[tuple[int, dict[str, Tensor]]] = []

    def before_step(self, lane: LaneView) -> None:
        given = {}
        for name, view in lane.layers.items():
            a, b = view.trainable["A"], view.trainable["B"]
            assert a.grad is not None
            assert b.grad is not None
            given |= {f"{name}.A": a.grad.clone(), f"{name}.B": b.grad.clone()}
            unit = self.damping * torch.eye(len(a))
            a.grad.copy_(torch.linalg.solve(b.T @ b + unit, a.grad))
            b.grad.copy_(torch.linalg.solve(a @ a.T + unit, b.grad.T).T)
        self.seen.append((lane.step, given))


def open_group(variant: Variant, chosen: list[Configuration], folder: Path) -> LaneGroup:
    one = chosen[0]
    base_model = tiny_base_model(one.model)
    settings = VariantSettings(one.variant.rank, one.variant.alpha, one.variant.dropout)
    adapters = attach(base_model.model, variant, settings)
    data = TaskData.load(one, tasks.get(one.task.name), base_model, adapters, ProcessGroup(), folder)
    return LaneGroup(base_model, adapters, data, ProcessGroup())


def start_lanes(group: LaneGroup, chosen: list[Configuration]) -> list[Lane]:
    lanes = [Lane(Lease(one, 1)) for one in chosen]
    for lane in lanes:
        lane.initialize(group.adapters, group.data.baseline.scores["validation"]["loss"], None)
    return lanes


def step(group: LaneGroup, lanes: list[Lane]) -> list[float]:
    """Take an optimizer step of each lane, and return the lanes' gradient norms before clipping."""
    taken = group.reduce_gradients(lanes, *group.backward(lanes))
    for lane, one in zip(lanes, taken, strict=True):
        assert lane.take_optimizer_step(one) is None
    return [one.gradient_norm for one in taken]


def total_norm(gradients: dict[str, Tensor]) -> float:
    return torch.stack([gradient.norm() for gradient in gradients.values()]).norm().item()


def test_before_step_sees_complete_and_clipped_gradients(tmp_path: Path) -> None:
    """The same rows in one batch and in two micro-batches give equal gradients, clipped to the same norm."""
    given = []
    for batch_size, accumulation in ((16, 1), (8, 2)):
        variant = Riemannian()
        one = configuration(batch_size=batch_size, accumulation=accumulation, evaluations=1)
        chosen = [replace(one, optimizer=replace(one.optimizer, clip_norm=0.2))]
        group = open_group(variant, chosen, tmp_path)
        lanes = start_lanes(group, chosen)
        clip = chosen[0].optimizer.clip_norm
        norms = [step(group, lanes)[0] for _ in range(3)]
        assert [at for at, _ in variant.seen] == [0, 1, 2]
        assert min(norms) < clip < max(norms)
        for norm, (_, gradients) in zip(norms, variant.seen, strict=True):
            assert total_norm(gradients) == pytest.approx(min(norm, clip), rel=1e-4)
        given.append(variant.seen[0][1])
    whole, parts = given
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=1e-7)


def test_the_optimizer_uses_the_gradients_that_before_step_changes(tmp_path: Path) -> None:
    """The parameters equal those of AdamW on gradients that the test preconditions itself."""
    variant, chosen = Riemannian(), [configuration(evaluations=1)]
    group = open_group(variant, chosen, tmp_path)
    (lane,) = start_lanes(group, chosen)
    options = chosen[0].optimizer
    copies = {name: torch.nn.Parameter(p.detach().clone()) for name, p in lane.parameters.items()}
    by_hand = torch.optim.AdamW(
        copies.values(), betas=(options.beta1, options.beta2), eps=options.epsilon, weight_decay=0.01
    )
    for now in range(4):
        before = {name: p.detach().clone() for name, p in lane.parameters.items()}
        by_hand.param_groups[0]["lr"] = lane.learning_rate
        step(group, [lane])
        for name, gradient in variant.seen[now][1].items():
            layer, parameter = name.rsplit(".", 1)
            a, b = before[f"{layer}.A"], before[f"{layer}.B"]
            unit = variant.damping * torch.eye(len(a))
            inverse = torch.linalg.inv(b.T @ b + unit if parameter == "A" else a @ a.T + unit)
            copies[name].grad = inverse @ gradient if parameter == "A" else gradient @ inverse
        by_hand.step()
        for name, parameter in lane.parameters.items():
            torch.testing.assert_close(parameter, copies[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["riemannian", "adalora"])
def test_lanes_with_hooks_are_independent(name: str, tmp_path: Path) -> None:
    def variant() -> Variant:
        return Riemannian() if name == "riemannian" else catalogue.get(name)

    chosen = [configuration(seed=seed, rate=0.003 * (seed + 1), evaluations=1) for seed in range(3)]
    shared_group = open_group(variant(), chosen, tmp_path)
    lanes = start_lanes(shared_group, chosen)
    for _ in range(8):
        step(shared_group, lanes)
    for one, lane in zip(chosen, lanes, strict=True):
        group = open_group(variant(), [one], tmp_path)
        (alone,) = start_lanes(group, [one])
        for _ in range(8):
            step(group, [alone])
        for key, parameter in alone.parameters.items():
            assert torch.equal(parameter, lane.parameters[key]), key
        for key, tensor in group.adapters.frozen(alone.fingerprint).items():
            assert torch.equal(tensor, shared_group.adapters.frozen(lane.fingerprint)[key]), key
