"""The test that a trainer's worker makes of its device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from orchestrator.execution import trainer_worker as trainer
from orchestrator.execution.settings import TrainerSettings
from orchestrator.execution.trainer_worker import allocate_first, find_device_fault
from orchestrator.study.options import StudyOptions


def test_a_cpu_passes() -> None:
    assert find_device_fault(uses_gpu=False) == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
def test_a_gpu_that_torch_cannot_use_is_a_fault_of_one_line() -> None:
    fault = find_device_fault(uses_gpu=True)
    assert fault.startswith(f"torch {torch.__version__} cannot use it; install ")
    assert "\n" not in fault


def test_a_device_that_computes_something_else_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.execution.trainer_worker.MAX_RELATIVE_ERROR", 0.0)
    assert find_device_fault(uses_gpu=False).startswith("a matrix product is wrong by ")


ALLOCATOR_ERRORS = (
    "CUDA driver error: unknown error",
    'NVML_SUCCESS == r INTERNAL ASSERT FAILED at "/pytorch/c10/cuda/CUDACachingAllocator.cpp":1165',
)


@pytest.mark.parametrize("message", ALLOCATOR_ERRORS)
def test_the_first_allocation_is_repeated_without_expandable_segments(
    message: str, caplog: pytest.LogCaptureFixture
) -> None:
    torch._C._accelerator_setAllocatorSettings("expandable_segments:True")

    def allocate() -> None:
        if "expandable_segments:True" in torch._C._accelerator_getAllocatorSettings():
            raise RuntimeError(message)

    allocate_first(allocate)
    assert f"without expandable segments: {message}" in caplog.text


def test_products_in_bfloat16_sum_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    matmul = torch.backends.cuda.matmul
    monkeypatch.setattr(matmul, "allow_bf16_reduced_precision_reduction", True)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    trainer._set_up_device(TrainerSettings(StudyOptions(), 1, 0.0, Path("store"), Path("scratch")))
    assert matmul.allow_bf16_reduced_precision_reduction is False
    assert matmul.allow_tf32 is False


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_trainer_gets_no_more_than_its_share_of_a_gpu() -> None:
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(0.25)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(int(0.3 * total), dtype=torch.uint8, device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
