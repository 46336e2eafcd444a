"""Failures that no lane causes: too little memory, a full disk, a lost device.

The tests cause real failures where possible.
"""

from __future__ import annotations

import errno
import json
import logging
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import short_of_memory
import torch
from full_disk import Disk, mounted
from pair import Scenario, WorkerResult, play, process
from scripted import Script, configuration, leases, numbers_of, solo, tiny_base_model, train
from short_of_memory import HUGE, LANES, LATER, WIDE, Again
from torch import distributed
from torch.optim.optimizer import register_optimizer_step_post_hook

from orchestrator.finetune.engine.checkpoint import read_newest
from orchestrator.finetune.engine.lane_source import Directive, Lease
from orchestrator.finetune.engine.lane_state import LaneState
from orchestrator.finetune.failures import Fault, StoreFullError, TrainerBrokenError, classify_error
from orchestrator.finetune.models.base_model import BaseModel
from orchestrator.finetune.process_group import TorchProcessGroup, WorkerError
from orchestrator.record import lane_capacity
from orchestrator.record.schema import Record
from orchestrator.record.store import Store
from orchestrator.study.configuration import Configuration
from variants import catalogue as variants

pytestmark = pytest.mark.xdist_group("pair")  # see pair.py: its server has torch imported already


def get(store: Store, point: Configuration) -> Record:
    record = store.get(point.fingerprint)
    assert record is not None
    return record


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), Fault.MEMORY),
        (MemoryError(), Fault.MEMORY),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), Fault.MEMORY),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), Fault.MEMORY),
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), Fault.DEVICE),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), Fault.DEVICE),
        # Messages as torch 2.13, NCCL and Triton write them on a GPU.
        (
            distributed.DistBackendError(
                "NCCL error in: /pytorch/torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:3699, remote "
                "process exited or there was a network error, NCCL 2.27.5\nncclRemoteError: A call failed"
            ),
            Fault.DEVICE,
        ),
        (
            distributed.DistNetworkError("The client socket has failed to connect to any address"),
            Fault.DEVICE,
        ),
        (
            distributed.DistBackendError(
                "NCCL error: unhandled cuda error\nncclUnhandledCudaError: Cuda failure 2 'out of memory'"
            ),
            Fault.MEMORY,
        ),
        (RuntimeError("NCCL communicator was aborted on rank 1"), Fault.DEVICE),
        (
            RuntimeError(
                "cusolver error: CUSOLVER_STATUS_EXECUTION_FAILED, when calling `cusolverDnSgesvdj(handle)`"
            ),
            Fault.DEVICE,
        ),
        (RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `create`"), Fault.MEMORY),
        (RuntimeError("CUDA error: CUSPARSE_STATUS_INTERNAL_ERROR when calling `spmm`"), Fault.DEVICE),
        (RuntimeError("cuFFT error: CUFFT_EXEC_FAILED"), Fault.DEVICE),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), Fault.DEVICE),
        (RuntimeError("Triton Error [CUDA]: out of memory"), Fault.MEMORY),
        (
            RuntimeError(
                "Unexpected error from cudaGetDeviceCount(). Did you run some cuda functions before calling "
                "NumCudaDevices() that might have already set an error? Error 802: system not yet initialized"
            ),
            Fault.DEVICE,
        ),
        (RuntimeError("Found no NVIDIA driver on your system."), Fault.DEVICE),
        (RuntimeError("CUDA driver error: unknown error"), Fault.DEVICE),
        (OSError(errno.ENOSPC, "No space left on device"), Fault.DISK),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), Fault.DISK),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), Fault.LANE),
        (ValueError("an error that speaks of CUDA error: words"), Fault.LANE),
        (WorkerError("reason", "trace", Fault.MEMORY), Fault.MEMORY),
    ],
)
def test_an_error_is_classified_by_its_cause(error: Exception, fault: Fault) -> None:
    assert classify_error(error) is fault
    outer = RuntimeError("the error that hides the cause")
    outer.__cause__ = error
    assert classify_error(outer) is fault
    assert WorkerError.from_exception(outer).fault is fault


# -- memory -------------------------------------------------------------------------------------------------


def short_of(work: Callable[[Path], None], folder: Path) -> dict[str, Any]:
    """Return the results that a function of short_of_memory.py wrote."""
    done = process(work, folder)
    done.join()
    assert done.exitcode == 0, (folder / "said").read_text()
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Return the folder of the stores, and the results."""
    folder = tmp_path_factory.mktemp("short")
    return folder, short_of(short_of_memory.together, folder)


@pytest.mark.slow
def test_fewer_lanes_train_after_an_out_of_memory_error_with_equal_results(
    short: tuple[Path, dict[str, Any]],
) -> None:
    folder, results = short
    said = (folder / "said").read_text()
    assert f"out of memory with {LANES} lanes, now {LANES // 2} at once; remembered in" in said
    assert results["most"] == LANES
    given_back = {name for name, _ in results["given_back"]}
    assert len(given_back) == LANES // 2
    assert results["taken"] == LANES, "no step was lost, none taken twice"
    for point in WIDE:
        record = get(Store(folder / "short"), point)
        assert record.state == "finished"
        assert record.provenance.attempt == (2 if point.fingerprint in given_back else 1)
        assert numbers_of(record) == numbers_of(get(Store(folder / f"plenty-{LANES}"), point))


@pytest.mark.slow
def test_the_lane_limit_is_stored_for_the_next_trainer(short: tuple[Path, dict[str, Any]]) -> None:
    folder, results = short
    assert results["later_most"] == LANES // 2
    assert results["later_given_back"] == []
    store = Store(folder / "short")
    assert {get(store, point).state for point in LATER} == {"finished"}
    place = f"cpu, {round(psutil.virtual_memory().total / 2**30)} GiB"
    assert lane_capacity.read_max_lanes(store.lane_capacity, WIDE[0].group_key, place) == LANES // 2


def test_a_lane_that_does_not_fit_alone_fails_with_advice(tmp_path: Path) -> None:
    results = short_of(short_of_memory.alone, tmp_path)
    assert [state for _, _, state in results["ended"]] == ["failed", "finished"]
    record = get(Store(tmp_path / "alone"), HUGE)
    assert "out of memory with one lane alone: try --gradient-checkpointing, --accumulation" in record.reason
    assert "DefaultCPUAllocator" in record.traceback


def out_of_memory_at(nth: int, is_wide: Callable[[int], bool]) -> tuple[BaseModel, list[int]]:
    """Return a base model whose nth forward pass of an evaluation with `is_wide(rows)` runs out of memory.

    The list is filled with the rows of each such pass.
    """
    base_model = tiny_base_model(configuration().model)
    forward, wide = base_model.model.base_model.forward, []

    def raises_out_of_memory(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() and is_wide(len(kwargs["input_ids"])):
            wide.append(len(kwargs["input_ids"]))
            if len(wide) == nth:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(*args, **kwargs)

    base_model.model.base_model.forward = raises_out_of_memory
    return base_model, wide


@pytest.mark.parametrize("nth", [1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_an_evaluation_that_runs_out_of_memory_scores_fewer_lanes_at_once_and_none_leaves(
    nth: int, store: Store, tmp_path: Path
) -> None:
    """The nth forward pass that scores more than two lanes runs out of memory. This happens in the first
    split, or in the second split after the first was scored."""
    base_model, wide = out_of_memory_at(nth, lambda rows: rows > 2 * 16)
    points = [configuration(seed=seed, steps=4, evaluations=2) for seed in range(4)]
    source = Again(leases(points))
    train(source, store, load_base_model=lambda choice, task: base_model)
    assert source.spilled == []
    assert len(wide) == nth, "later evaluations score two lanes at once"
    assert min(len(steps) for steps in source.held if steps) == 4, "the lanes train together as before"
    assert not list(store.lane_capacity.glob("*")), "the number of lanes that train is not limited"
    for point in points:
        assert numbers_of(get(store, point)) == numbers_of(solo(point, tmp_path))


@pytest.mark.parametrize("nth", [1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_lanes_evicted_in_their_last_evaluation_are_scored_later(
    nth: int, store: Store, tmp_path: Path
) -> None:
    """The evaluation runs out of memory as long as the trainer holds four lanes, first in the nth forward
    pass that scores several lanes, also when it scores one lane alone."""
    base_model, wide = out_of_memory_at(nth, lambda rows: rows > 16)
    forward = base_model.model.base_model.forward

    def raises_out_of_memory(*args: Any, **kwargs: Any) -> Any:
        held = sum(lane.state is not LaneState.ENDED for lane in source.lanes.values())
        if not torch.is_grad_enabled() and len(wide) >= nth and held == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(*args, **kwargs)

    base_model.model.base_model.forward = raises_out_of_memory
    points = [configuration(seed=seed, steps=4, evaluations=2) for seed in range(4)]
    source = Again(leases(points))
    train(source, store, load_base_model=lambda choice, task: base_model)
    assert len(source.spilled) == 2
    assert source.taken == 4 * len(points)
    for point in points:
        assert numbers_of(get(store, point)) == numbers_of(solo(point, tmp_path))


def test_lanes_that_do_not_fit_at_their_start_are_leased_again(store: Store, tmp_path: Path) -> None:
    """The fifth lane of six runs out of memory; the lease of the sixth is returned before it starts."""
    base_model = tiny_base_model(configuration().model)
    forward, raised = base_model.model.base_model.forward, []

    def raises_out_of_memory(*args: Any, **kwargs: Any) -> Any:
        if len(source.lanes) == 5 and not raised:
            raised.append(True)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(*args, **kwargs)

    base_model.model.base_model.forward = raises_out_of_memory
    points = [configuration(variant="eva", seed=seed, steps=2, evaluations=1) for seed in range(6)]
    few = {**variants.get("eva").extra_defaults, "calibration_batches": 2}
    points = [replace(one, variant=replace(one.variant, extra=few)) for one in points]
    source = Again(leases(points))
    train(source, store, load_base_model=lambda choice, task: base_model)
    assert len(source.spilled) == 4
    assert max(map(len, source.held)) == 2
    assert source.taken == 2 * len(points)
    for point in points:
        assert numbers_of(get(store, point)) == numbers_of(solo(point, tmp_path))


def test_a_stored_limit_is_only_lowered_and_an_unreadable_file_is_ignored(tmp_path: Path) -> None:
    assert lane_capacity.read_max_lanes(tmp_path, "shape", "gpu") is None
    path = lane_capacity.write_max_lanes(tmp_path, "shape", "gpu", 4, 8)
    lane_capacity.write_max_lanes(tmp_path, "shape", "gpu", 6, 12)
    assert lane_capacity.read_max_lanes(tmp_path, "shape", "gpu") == 4
    assert lane_capacity.read_max_lanes(tmp_path, "shape", "another gpu") is None
    path.write_text('{"lanes": ')
    assert lane_capacity.read_max_lanes(tmp_path, "shape", "gpu") is None
    lane_capacity.write_max_lanes(tmp_path, "shape", "gpu", 6, 12)
    assert lane_capacity.read_max_lanes(tmp_path, "shape", "gpu") == 6
    other = lane_capacity.write_max_lanes(tmp_path, "another shape", "gpu", 1, 2)
    other.replace(path)  # the file of another group key
    assert lane_capacity.read_max_lanes(tmp_path, "shape", "gpu") is None
    lane_capacity.write_max_lanes(tmp_path, "shape", "gpu", 6, 12)
    path.write_bytes(path.read_bytes().replace(b'"lanes": 6', b'"lanes": 2'))  # a flipped bit
    assert lane_capacity.read_max_lanes(tmp_path, "shape", "gpu") is None


def test_a_lane_interrupted_in_its_optimizer_step_resumes_from_its_checkpoint(
    store: Store, tmp_path: Path
) -> None:
    """The lane's optimizer runs out of memory after it has changed the parameters."""
    points = [configuration(seed=seed, steps=6, evaluations=3) for seed in range(3)]
    raised = []

    def raise_out_of_memory(optimizer: torch.optim.Optimizer, *rest: object) -> None:
        lane = next((lane for lane in source.lanes.values() if lane.optimizer is optimizer), None)
        if lane is not None and lane.fingerprint == points[1].fingerprint and lane.step == 4 and not raised:
            raised.append(lane.step)
            raise torch.OutOfMemoryError("CUDA out of memory")

    source = Again(leases(points))
    handle = register_optimizer_step_post_hook(raise_out_of_memory)
    try:
        train(source, store)
    finally:
        handle.remove()
    assert raised == [4]
    assert (points[1].fingerprint, 1) in source.spilled
    for point in points:
        assert numbers_of(get(store, point)) == numbers_of(solo(point, tmp_path))
    interrupted = get(store, points[1])
    assert interrupted.provenance.resumed_from == (4,)


# -- a lost device ------------------------------------------------------------------------------------------

BROKEN = '''
import torch

from orchestrator.finetune.tasks.local import letters


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


# -- a full disk --------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with mounted(tmp_path / "disk", megabytes=2) as disk:
        yield disk


class Filling(Again):
    """A lane source that fills the disk when a lane has reached step `full`, and frees it at step `freed`."""

    disk: Disk
    full, freed = 0, 0
    is_full = False

    def exchange(self, steps_taken: int) -> Mapping[str, Directive]:
        answers = super().exchange(steps_taken)
        furthest = max(self.steps.values(), default=0)
        if self.full and furthest >= self.full:
            self.disk.fill()
            self.full, self.is_full = 0, True
        if self.is_full and self.freed and furthest >= self.freed:
            self.disk.free()
            self.is_full = False
        return answers


def test_a_checkpoint_on_a_full_disk_is_skipped(
    disk: Disk, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Only the checkpoints are on the full disk. A lane that yields then resumes from an older checkpoint."""
    store = Store(tmp_path / "store")
    store.checkpoints = disk.folder
    points = [configuration(seed=seed, steps=12, evaluations=6) for seed in range(2)]
    source = Filling(leases(points))
    source.disk, source.full, source.freed = disk, 3, 9
    seen: dict[int, int] = {}

    def changes(steps: Mapping[str, int]) -> Mapping[str, Directive]:
        step = steps.get(points[0].fingerprint, 0)
        found = read_newest(disk.folder / points[0].fingerprint, print)
        seen.setdefault(step, found.step if found else 0)
        leaves = step == 7 and not source.spilled
        return {points[0].fingerprint: Directive.YIELD} if leaves else {}

    source.changes = changes
    with caplog.at_level(logging.WARNING):
        train(source, store)
    said = [record.getMessage() for record in caplog.records]
    assert len([line for line in said if "cannot save lanes" in line and "No space left" in line]) == 1
    assert not [line for line in said if "skipping" in line], "no incomplete file under a final name"
    assert seen[6] == 2, "the lane trained on and could not be saved"
    assert seen[11] == 10, "the lane was saved again when there was space"
    assert (points[0].fingerprint, 1) in source.spilled
    for point in points:
        assert numbers_of(get(store, point)) == numbers_of(solo(point, tmp_path))
    assert get(store, points[0]).provenance.resumed_from == (2,)


def test_a_record_waits_for_space_on_a_full_disk(disk: Disk, tmp_path: Path) -> None:
    store = Store(disk.folder / "store")
    points = [configuration(seed=seed, steps=4, evaluations=1) for seed in range(2)]
    source = Filling(leases(points))
    source.disk, source.full = disk, 2
    said: list[str] = []

    class Frees(logging.Handler):
        """A handler that frees the disk when the loop logs that it waits for space."""

        def emit(self, record: logging.LogRecord) -> None:
            if "waiting for space" in record.getMessage():
                said.append(record.getMessage())
                disk.free()

    handler = Frees()
    logging.getLogger("orchestrator.finetune.engine.recorder").addHandler(handler)
    try:
        train(source, store, store_full_timeout_seconds=1.0)
    finally:
        logging.getLogger("orchestrator.finetune.engine.recorder").removeHandler(handler)
    assert len(said) == 1
    assert [state for _, _, state in source.ended] == ["finished", "finished"]
    for point in points:
        assert numbers_of(get(store, point)) == numbers_of(solo(point, tmp_path))


def test_a_disk_that_stays_full_ends_the_trainer_and_loses_no_lane(disk: Disk, tmp_path: Path) -> None:
    store = Store(disk.folder / "store")
    points = [
        configuration(seed=seed, steps=steps, evaluations=1) for seed, steps in ((0, 2), (1, 6), (2, 9))
    ]
    source = Filling(leases(points))
    source.disk, source.full = disk, 4
    with pytest.raises(
        StoreFullError, match=r"no space left on .*/store; free some, then run the command again"
    ):
        train(source, store, store_full_timeout_seconds=0.3)
    assert [fingerprint for fingerprint, _, _ in source.ended] == [points[0].fingerprint]
    assert {f for f, _ in source.spilled} == {points[1].fingerprint, points[2].fingerprint}
    assert store.states() == {points[0].fingerprint: "finished"}
    assert not [path for path in store.records_folder.rglob("*.json") if points[1].fingerprint in path.name]
    disk.free()
    train(Script([Lease(point, 2) for point in points]), store)
    for point in points:
        assert numbers_of(get(store, point)) == numbers_of(solo(point, tmp_path))


# -- leftover checkpoints --------------------------------------------------------------------------------


def test_leftover_checkpoints_of_a_final_record_are_discarded(store: Store) -> None:
    """A writer that died before it removed them, or a trainer with an older lease, leaves checkpoints."""
    point = configuration(steps=4)
    train(Script(leases([point])), store)
    assert not (store.checkpoints / point.fingerprint).exists()
    left = store.checkpoints / point.fingerprint / "1" / "step-00000002.safetensors"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"left")
    source = Script(leases([point], attempt=2))
    train(source, store)
    assert source.ended == [(point.fingerprint, 2, "finished")]
    assert not (store.checkpoints / point.fingerprint).exists()


def test_a_lane_whose_record_another_trainer_wrote_leaves_no_checkpoint(store: Store, tmp_path: Path) -> None:
    point = configuration(steps=8, evaluations=4)

    def changes(steps: Mapping[str, int]) -> Mapping[str, Directive]:
        if steps.get(point.fingerprint) != 5:
            return {}
        store.put(solo(point, tmp_path))
        return {point.fingerprint: Directive.DROP}

    source = Script(leases([point]), changes=changes)
    train(source, store)
    assert source.ended == []
    assert not (store.checkpoints / point.fingerprint).exists()


def test_a_lane_that_yields_is_saved_at_once_and_resumes_elsewhere(store: Store, tmp_path: Path) -> None:
    points = [configuration(seed=seed, steps=8, evaluations=2) for seed in range(2)]

    def changes(steps: Mapping[str, int]) -> Mapping[str, Directive]:
        return dict.fromkeys(steps, Directive.YIELD) if 3 in steps.values() else {}

    source = Script(leases(points), changes=changes)
    train(source, store)
    assert sorted(source.spilled) == sorted((point.fingerprint, 1) for point in points)
    assert source.ended == []
    for point in points:
        saved = read_newest(store.checkpoints / point.fingerprint, print)
        assert saved is not None
        assert saved.step == 3
    train(Script(leases(points, attempt=2)), store)
    for point in points:
        assert numbers_of(get(store, point)) == numbers_of(solo(point, tmp_path))
