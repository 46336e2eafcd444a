"""Errors are classified by their cause, and a lost device ends the trainer but fails no lane."""

from __future__ import annotations

import errno
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pair import Scenario, WorkerResult, play
from scripted import Script, configuration, leases, train
from torch import distributed

from orchestrator.finetune.failures import Fault, TrainerBrokenError, classify_error
from orchestrator.finetune.process_group import TorchProcessGroup, WorkerError
from orchestrator.record.store import Store

pytestmark = pytest.mark.xdist_group("pair")  # see pair.py: its server has torch imported already


NCCL = "NCCL error in: /pytorch/torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:3699"
ALLOCATOR = 'ASSERT FAILED at "/pytorch/c10/cuda/CUDACachingAllocator.cpp":1165'
FAULTS: dict[Fault, tuple[Exception | str, ...]] = {
    Fault.MEMORY: (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        distributed.DistBackendError(f"{NCCL}\nncclUnhandledCudaError: Cuda failure 2 'out of memory'"),
        WorkerError("reason", "trace", Fault.MEMORY),
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`",
        "Triton Error [CUDA]: out of memory",
        # On a MIG slice, torch's allocator reports that memory is exhausted as an error of NVML.
        f"NVML_SUCCESS == r INTERNAL {ALLOCATOR}",
    ),
    Fault.DEVICE: (
        torch.AcceleratorError("CUDA error: device-side assert triggered"),
        distributed.DistBackendError(f"{NCCL}, remote process exited\nncclRemoteError: A call failed"),
        distributed.DistNetworkError("The client socket has failed to connect to any address"),
        subprocess.CalledProcessError(1, ["/usr/bin/gcc", "cuda_utils.c", "-shared", "-fPIC", "-o", "x"]),
        "CUDA error: an illegal memory access was encountered",
        "CUDA driver error: unknown error",
        "NCCL communicator was aborted on rank 1",
        "cusolver error: CUSOLVER_STATUS_EXECUTION_FAILED, when calling `cusolverDnSgesvdj(handle)`",
        "cuFFT error: CUFFT_EXEC_FAILED",
        "Triton Error [CUDA]: an illegal memory access was encountered",
        "Unexpected error from cudaGetDeviceCount(). Error 802: system not yet initialized",
        "Found no NVIDIA driver on your system.",
        f"captures_underway.empty() INTERNAL {ALLOCATOR}",
        "CUDAGraph capture failed: the stream was invalidated",
        "nvrtc: error: failed to open libnvrtc-builtins.so.13.0.",
        "Error in dlopen: libnvrtc.so.13: cannot open shared object file: No such file",
        "Failed to find C compiler. Please specify via CC environment variable",
        "main.cpp:2:10: fatal error: Python.h: No such file or directory",
    ),
    Fault.DISK: (
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
    ),
    Fault.LANE: (
        subprocess.CalledProcessError(1, ["grade", "answer.py"]),
        FileNotFoundError(errno.ENOENT, "No such file or directory"),
        ValueError("an error that speaks of CUDA error: words"),
    ),
}
"""Errors as torch 2.13, NCCL and Triton raise them on a GPU; a text is that of a RuntimeError."""


@pytest.mark.parametrize(
    ("error", "fault"), [(error, fault) for fault, errors in FAULTS.items() for error in errors]
)
def test_an_error_is_classified_by_its_cause(error: Exception | str, fault: Fault) -> None:
    cause = RuntimeError(error) if isinstance(error, str) else error
    assert classify_error(cause) is fault
    outer = RuntimeError("the error that hides the cause")
    outer.__cause__ = cause
    assert classify_error(outer) is fault
    assert WorkerError.from_exception(outer).fault is fault


BROKEN = '''
import torch

from orchestrator.finetune.tasks import letters


class Broken(letters.Letters):
    """Raises the error that CUDA raises when its context is lost."""

    def {method}(self, *args):
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")
'''


def test_a_lost_device_ends_the_trainer_and_fails_no_lane(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text(BROKEN.format(method="encode"))
    source = Script(leases(configuration(task=str(path), seed=seed, steps=4) for seed in range(4)))
    with pytest.raises(TrainerBrokenError, match=r"the device is lost to this process: .*device-side assert"):
        train(source, store)
    assert source.ended == []
    assert not store.states()


class FlappingGroup(TorchProcessGroup):
    """A process group whose tensors do not arrive, from the second step on."""

    sent = 0

    def all_reduce_(self, tensor: torch.Tensor) -> None:
        self.sent += 1
        if self.sent > 1:
            raise distributed.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:3699, ncclRemoteError")
        super().all_reduce_(tensor)


def flap(group: TorchProcessGroup, folder: Path) -> WorkerResult:
    points = [configuration(seed=seed, steps=4) for seed in range(3)]
    return play(lambda rank: Scenario(Script(leases(points))), FlappingGroup(), folder)


@pytest.mark.slow
def test_a_broken_connection_of_two_workers_ends_the_trainer_and_fails_no_lane(
    pair: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "flap").mkdir()
    found = pair({"flap": flap}, tmp_path)["flap"]
    for worker in found:
        assert re.match(
            "TrainerBrokenError: the device is lost to this process: .*ncclRemoteError", worker.raised
        )
        assert worker.ended == worker.spilled == []
    assert found[0].taken == 3, "the first step was taken"
    assert not Store(tmp_path / "flap").states()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: CUDA's context is really lost in it")
def test_an_index_out_of_range_on_a_gpu_is_a_lost_device(tmp_path: Path) -> None:
    program = (
        "import torch\n"
        "from orchestrator.finetune.failures import classify_error\n"
        "try:\n"
        "    torch.nn.Embedding(4, 4).cuda()(torch.tensor([9], device='cuda')).sum().item()\n"
        "except Exception as error:\n"
        "    print(classify_error(error))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.split() == [str(Fault.DEVICE)], done.stderr
