"""The number of trainers that are started for the waiting lanes and the present nodes."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from session_settings import make_session

from orchestrator.execution.ray.runtime import Cluster, Node
from orchestrator.execution.settings import shared_options
from orchestrator.execution.trainers import trainer_run
from orchestrator.execution.trainers.pool import BrokerState, TrainerPool
from orchestrator.execution.trainers.trainer_run import TrainerRun, worker_environment
from orchestrator.study.options import StudyOptions


def make_pool(
    count: int,
    gpus: int,
    *,
    placed: int = 0,
    unplaced: int = 0,
    elastic: bool = True,
    started: bool = True,
    startable: int = 0,
    holders: int = 0,
    can_grow: bool = True,
) -> TrainerPool:
    """Return a pool of trainers with four lanes and one GPU each, on nodes with `gpus` GPUs in total.

    The first `holders` of the placed trainers keep excluded devices reserved.
    """
    cluster = Cluster((), "space", local=not can_grow)
    session = make_session(count, 4, 1.0, cluster=cluster, elastic=elastic, autoscaler_capacity=startable)
    pool = TrainerPool(session, None)
    pool.cluster = Cluster(tuple(Node(4, 1, 2**33) for _ in range(gpus)))
    names = [f"trainer-{n}" for n in range(placed + unplaced)]
    pool.running = {name: TrainerRun(name, session.settings, "space") for name in names}
    pool.placed, pool.holders = frozenset(names[:placed]), frozenset(names[:holders])
    pool.num_started = len(names) + started
    return pool


@pytest.mark.parametrize(
    ("pool", "waiting", "free", "start"),
    [
        (make_pool(2, 2, started=False), 0, 2, 2),  # the first trainers start at once
        (make_pool(2, 2, started=False), 0, 0, 1),  # another study holds all GPUs: one trainer waits
        (make_pool(1, 0, started=False), 0, 0, 1),  # no GPU yet: one request makes an autoscaler act
        (make_pool(1, 3, placed=1), 16, 2, 2),  # two nodes joined
        (make_pool(1, 3, placed=1), 4, 2, 1),  # as many as the waiting lanes fill
        (make_pool(3, 1, placed=2), 16, 0, 0),  # a node was lost or drains, and its trainer has not ended yet
        (make_pool(1, 0, unplaced=1, startable=8), 16, 0, 0),  # no second request before the first is placed
        (make_pool(1, 1, placed=1, startable=8), 16, 0, 4),  # as many requests as the waiting lanes fill
        (make_pool(1, 1, placed=1, startable=3), 16, 0, 2),  # at most as many as the autoscaler may start
        (make_pool(1, 3, placed=1, startable=3), 16, 0, 0),  # the nodes exist, and another study uses them
        (
            make_pool(3, 3, placed=1, unplaced=1, elastic=False),
            16,
            0,
            1,
        ),  # a fixed number was requested: the trainer waits for a node
        (make_pool(8, 8, placed=8, holders=1), 16, 0, 0),  # a GPU is broken, and there is no other
        (make_pool(8, 9, placed=8, holders=1), 16, 1, 1),  # its trainer is replaced elsewhere
        (make_pool(2, 9, placed=3, holders=1, elastic=False), 16, 6, 0),  # as many train as were requested
        (
            make_pool(2, 2, placed=2, holders=2),
            16,
            0,
            1,
        ),  # all are broken: one request, for a node that joins
        (make_pool(1, 1, placed=1, holders=1, startable=3), 16, 0, 2),  # an autoscaler starts other nodes
    ],
)
def test_number_of_trainers_to_start(pool: TrainerPool, waiting: int, free: int, start: int) -> None:
    training = 4 * (len(pool.placed) - len(pool.holders))
    assert max(0, pool.num_to_start(waiting, training, free)) == start


def test_a_study_ends_at_once_if_all_devices_are_broken_and_no_node_can_join() -> None:
    devices = {f"GPU {n} of node 10.0.0.7 (1f2e3d4c)": "a matrix product is wrong" for n in range(5)}
    lines: list[str] = []
    pool = make_pool(5, 5, placed=5, can_grow=False)
    pool.notify, pool._last_node_count, pool.had_waiting_lanes = lines.append, float("inf"), True
    pool.update(BrokerState(8, 0, 0, pool.placed, (), devices, pool.placed, abort_reason=""))
    reason = pool.failure_reason
    assert reason.startswith(
        "No device is left to train on. Left out: GPU 0 of node 10.0.0.7 (1f2e3d4c): a matrix"
    )
    assert "GPU 2 of" in reason
    assert "; and 2 more. " in reason
    assert "\n" not in reason
    assert len(lines) == len(devices)
    assert (
        lines[4] == "GPU 4 of node 10.0.0.7 (1f2e3d4c) is left out of this study: a matrix product is wrong"
    )


def test_no_more_than_the_drivers_node_has_memory_for() -> None:
    lines: list[str] = []
    pool = make_pool(8, 8, placed=1)
    pool.notify = lines.append
    pool.cluster = Cluster(
        (Node(4, 0, 3 * 2**29, "here"), *(Node(4, 1, 2**33, f"gpu-{n}") for n in range(8)))
    )
    for _ in range(2):
        pool._limit_by_driver_memory("here")
    assert pool.num_to_start(60, 4, 7) == 2, "half of 1.5 GiB is enough for three"
    assert len(lines) == 1
    assert lines[0].startswith("3 trainers at most, not 8: each keeps 0.25 GiB")
    assert "take a node with 4 GiB for Ray" in lines[0]
    pool.session = make_session(8, 4, 1.0)
    assert pool.num_to_start(60, 4, 7) == 2
    small_pool = make_pool(8, 8, started=False)
    small_pool.cluster, small_pool.notify = Cluster((Node(4, 1, 2**20, "here"),)), lines.append
    small_pool._limit_by_driver_memory("here")
    assert small_pool.num_to_start(60, 0, 1) == 1, "one is always tried"


counts = st.integers(0, 6)


@given(
    gpus=counts,
    placed=counts,
    unplaced=counts,
    waiting=st.integers(1, 60),
    training=st.integers(0, 24),
    free=counts,
    elastic=st.booleans(),
    startable=counts,
)
def test_never_stuck_and_never_too_many(
    gpus: int,
    placed: int,
    unplaced: int,
    waiting: int,
    training: int,
    free: int,
    elastic: bool,
    startable: int,
) -> None:
    pool = make_pool(3, gpus, placed=placed, unplaced=unplaced, elastic=elastic, startable=startable)
    start = max(0, pool.num_to_start(waiting, training, free))
    running = placed + unplaced
    assert start or running, "lanes wait, and nobody would ever come"
    assert running + start <= max(running, 1, max(gpus, startable) if elastic else 3)
    assert (unplaced + start) * 4 < waiting + 4 or not start
    if elastic and running:
        assert start <= max(0, free + max(0, startable - gpus) - unplaced)


@dataclass(frozen=True, kw_only=True)
class MoreOptions(StudyOptions):
    more: int = 0


def test_trainers_get_the_options_without_the_password_of_a_tracking_server() -> None:
    options = MoreOptions(more=2, gradient_checkpointing=True, tracking_uri="https://me:secret@host")
    shared = shared_options(options)
    assert shared == StudyOptions(gradient_checkpointing=True)
    assert b"secret" not in pickle.dumps(shared)


def test_gpu_workers_get_expandable_segments_where_they_work_unless_the_user_has_set_the_allocator(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gpu, cpu = make_session(1, 4, 1.0).settings, make_session(1, 4).settings
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    on, off = (dict.fromkeys(names, f"expandable_segments:{value}") for value in (True, False))
    monkeypatch.setattr(trainer_run, "KERNEL_RELEASE", tmp_path / "osrelease")
    assert worker_environment(gpu, {"HOME": "/root", "CUDA_VISIBLE_DEVICES": "0,GPU-8932f937"}) == on
    for name in ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES"):
        assert worker_environment(gpu, {name: "MIG-GPU-8932f937-d72c/1/0"}) == off
    for release, expected in (("6.8.0-45-generic", on), ("5.15.153.1-microsoft-standard-WSL2", off)):
        (tmp_path / "osrelease").write_text(f"{release}\n")
        assert worker_environment(gpu, {}) == expected
    for name in names:
        assert worker_environment(gpu, {name: "max_split_size_mb:64"}) == {name: "max_split_size_mb:64"}
    for settings in (cpu, replace(gpu, options=StudyOptions(device="cpu"))):
        assert not worker_environment(settings, {}).keys() & set(names)
