"""What a study does on its devices: on a CPU, and by the same tests on GPUs where there are some."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pair import Scenario, WorkerResult, play
from scripted import (
    WORDS_TASK,
    Script,
    configuration,
    crash_at,
    leases,
    tiny_base_model,
    train,
)
from step_lanes import make_step_lanes
from torch import Tensor, distributed
from torch.nn.attention import SDPBackend, sdpa_kernel

from orchestrator.finetune.models.base_model import BaseModel
from orchestrator.finetune.process_group import TorchProcessGroup
from orchestrator.finetune.tasks.base import Task
from orchestrator.record.store import Store
from orchestrator.study.configuration import ModelChoice

pytestmark = pytest.mark.xdist_group("pair")


def gpus(count: int) -> Any:
    """Return the parameter "cuda", for tests that need this many GPUs."""
    few = torch.cuda.device_count() < count
    skip = pytest.mark.skipif(few, reason=f"needs {count} CUDA devices")
    return pytest.param("cuda", marks=[pytest.mark.gpu, skip])


def load_on(device: str, choice: ModelChoice, task: Task | None = None) -> BaseModel:
    base = tiny_base_model(choice, task)
    return replace(base, model=base.model.to(device), device=torch.device(device))


def weights(source: Script) -> Tensor:
    """Return the final parameters of all lanes."""
    lanes = [source.lanes[name] for name in sorted(source.lanes)]
    return torch.cat([p.detach().cpu().flatten() for lane in lanes for p in lane.parameters.values()])


def distance(found: Tensor, expected: Tensor) -> float:
    """Return the relative error."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("device", ["cpu", gpus(1)])
def test_a_loop_that_dies_continues_from_its_checkpoints(device: str, tmp_path: Path) -> None:
    """Lanes in bfloat16 train, are saved, resume, and generate their answers."""
    points = [
        configuration(task=WORDS_TASK, seed=seed, accumulation=2, evaluations=4, dtype="bfloat16")
        for seed in range(2)
    ]
    load = partial(load_on, device)
    whole, halves = Script(leases(points)), Script(leases(points, attempt=2))
    train(whole, Store(tmp_path / "whole"), load_base_model=load)
    store = Store(tmp_path / "halves")
    crash_at(6, points, store, load_base_model=load)
    train(halves, store, load_base_model=load)
    assert distance(weights(halves), weights(whole)) <= (0.0 if device == "cpu" else 0.05)
    for one in points:
        record = store.get(one.fingerprint)
        assert record is not None
        assert record.state == "finished"
        assert record.provenance.resumed_from in ((4,), (6,)), "the other lane may not have been saved yet"


class NcclGroup(TorchProcessGroup):
    """The workers' process group with tensors sent by NCCL, as on GPUs."""

    def __init__(self) -> None:
        super().__init__()
        self.nccl = distributed.new_group(backend="nccl")

    def all_reduce_(self, tensor: Tensor) -> None:
        distributed.all_reduce(tensor, group=self.nccl)

    def broadcast_(self, tensor: Tensor) -> None:
        distributed.broadcast(tensor, src=0, group=self.nccl)


def train_together(device: str, group: TorchProcessGroup, folder: Path) -> WorkerResult:
    if device == "cuda":
        device = f"cuda:{group.rank}"
        torch.cuda.set_device(device)
        group = NcclGroup()
    options = {"load_base_model": partial(load_on, device)}
    return play(lambda rank: Scenario(Script(leases(SHARED)), options=options), group, folder)


SHARED = [configuration(seed=seed, steps=4, accumulation=2) for seed in range(2)]


@pytest.mark.parametrize("device", ["cpu", gpus(2)])
def test_two_workers_train_the_lanes_of_one(device: str, pair: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "two").mkdir()
    found = pair({"two": partial(train_together, device)}, tmp_path)["two"]
    alone = Script(leases(SHARED))
    train(alone, Store(tmp_path / "alone"), load_base_model=partial(load_on, device))
    assert [each.raised for each in found] == ["", ""]
    first, second = (torch.cat([each.weights[c.fingerprint] for c in SHARED]) for each in found)
    assert torch.equal(first, second)
    expected = [torch.cat([p.detach().cpu().flatten() for p in lane.parameters.values()]) for lane in
                (alone.lanes[c.fingerprint] for c in SHARED)]  # fmt: skip
    assert distance(first, torch.cat([torch.cat([torch.zeros(1), each]) for each in expected])) < 1e-4


@pytest.mark.parametrize("device", ["cpu", gpus(1)])
def test_bfloat16_with_flash_attention_and_grouped_heads_gives_the_gradients_of_float32(device: str) -> None:
    """Only flash attention is allowed, which raises an error where it cannot be used."""
    found = []
    for dtype, backend in ((torch.float32, SDPBackend.MATH), (torch.bfloat16, SDPBackend.FLASH_ATTENTION)):
        with sdpa_kernel(backend):
            group, lanes = make_step_lanes(torch.device(device), "Qwen3", dtype=dtype, head_dim=16)
            group.backward(lanes)
        gradients = [p.grad for lane in lanes for p in lane.parameters.values() if p.grad is not None]
        assert len(gradients) == sum(len(lane.parameters) for lane in lanes)
        found.append(torch.cat([gradient.cpu().flatten() for gradient in gradients]))
    assert distance(found[1], found[0]) < 0.05


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; see test_host_waits.py")
@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
def test_no_operation_of_a_step_synchronizes(kind: str) -> None:
    group, lanes = make_step_lanes(torch.device("cuda"), kind)
    group.backward(lanes)  # fills caches
    torch.cuda.set_sync_debug_mode("error")
    try:
        group.backward(lanes)
    finally:
        torch.cuda.set_sync_debug_mode("default")
