"""The Ray that a study joins or starts: its address, its room for trainers, and what is refused."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from points import configuration

from orchestrator.execution import ray_cluster
from orchestrator.execution.ray_cluster import Cluster, Node, adapt_to_cluster, connect
from orchestrator.study.configuration import ModelChoice
from orchestrator.study.options import StudyOptions
from orchestrator.util import timeouts
from orchestrator.util.errors import UsageError

GIB = float(2**30)
LAPTOP = Cluster((Node(8, 0, 12 * GIB),))
GPUS = Cluster((Node(32, 4, 200 * GIB), Node(32, 3, 200 * GIB)))

HEAD = Cluster((Node(8, 0, 12 * GIB), Node(8, 0, 12 * GIB)), local=False)
WITH_GPU = Cluster((*HEAD.nodes, Node(8, 1, 12 * GIB)), local=False)
QWEN = ModelChoice("Qwen/Qwen3-0.6B-Base", "c0", "bfloat16")
DEFAULT, TYPED = StudyOptions(), StudyOptions(gpus_per_worker=1.0)
LONG = timeouts.NODE_START_SECONDS
NOBODY = 65534


@pytest.mark.parametrize(
    ("cluster", "requested", "gpus", "workers", "expected"),
    [
        (LAPTOP, None, None, 1, (6, 0.0)),
        (LAPTOP, 2, None, 1, (2, 0.0)),
        (LAPTOP, None, None, 2, (3, 0.0)),
        (LAPTOP, 1, None, 6, (1, 0.0)),
        (Cluster((Node(2, 0, GIB),)), None, None, 1, (1, 0.0)),
        (GPUS, None, None, 1, (7, 1.0)),
        (GPUS, None, 0.5, 1, (14, 0.5)),
        (GPUS, None, 0.3, 1, (21, 0.3)),
        (GPUS, None, None, 2, (3, 1.0)),  # seven GPUs are enough for three trainers
        (GPUS, 1, 1.0, 7, (1, 1.0)),
        (GPUS, None, 0.0, 4, (16, 0.0)),
    ],
)
def test_trainers_that_fit(
    cluster: Cluster, requested: int | None, gpus: float | None, workers: int, expected: tuple[int, float]
) -> None:
    assert cluster.plan_trainers(requested, gpus, workers) == expected


@pytest.mark.parametrize(
    ("nodes", "requested", "gpus", "workers", "expected"),
    [
        (LAPTOP.nodes, 7, None, 1, (7, 0.0)),
        (LAPTOP.nodes, None, 1.0, 1, (1, 1.0)),
        (GPUS.nodes, None, None, 8, (1, 1.0)),
        (GPUS.nodes, 64, None, 1, (64, 1.0)),
        ((), None, 1.0, 1, (1, 1.0)),
    ],
)
def test_a_joined_cluster_may_grow(
    nodes: tuple[Node, ...],
    requested: int | None,
    gpus: float | None,
    workers: int,
    expected: tuple[int, float],
) -> None:
    assert Cluster(nodes, local=False).plan_trainers(requested, gpus, workers) == expected


@pytest.mark.parametrize(
    ("cluster", "requested", "gpus", "workers", "parts"),
    [
        (LAPTOP, 7, None, 1, ["--trainers 7", "a CPU and 2 GiB", "8 CPUs", "take --trainers 6."]),
        (
            LAPTOP,
            4,
            None,
            2,
            ["--trainers 4: no room for 4 x 2 workers with a CPU and 2 GiB each", "take --trainers 3."],
        ),
        (LAPTOP, None, None, 9, ["--trainers 1: no room for 1 x 9 workers", "take --workers-per-trainer 6."]),
        (LAPTOP, 3, None, 9, ["--trainers 3: no room for 3 x 9 workers", "take --workers-per-trainer 2."]),
        (
            LAPTOP,
            None,
            1.0,
            1,
            ["--trainers 1: ", "1 GPU and a CPU", "0 GPUs", "leave --gpus-per-worker out"],
        ),
        (
            GPUS,
            None,
            None,
            8,
            ["1 x 8 workers with 1 GPU and a CPU each", "take --workers-per-trainer 7."],
        ),
    ],
)
def test_more_trainers_than_fit_are_refused(
    cluster: Cluster, requested: int | None, gpus: float | None, workers: int, parts: list[str]
) -> None:
    with pytest.raises(UsageError) as error:
        cluster.plan_trainers(requested, gpus, workers)
    for part in parts:
        assert part in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("package", ["orchestrator", "variants"])
def test_no_study_starts_in_a_folder_with_another_copy_of_this_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    """Ray's workers import from the working folder of the command first."""
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=f"{tmp_path} has another '{package}'"), connect():
        pass


@pytest.mark.parametrize(
    ("cluster", "options", "model", "gpus", "timeout"),
    [
        (WITH_GPU, DEFAULT, QWEN, None, None),
        (LAPTOP, DEFAULT, QWEN, None, None),  # no node can join; `resolve_study` refuses the default study
        (HEAD, StudyOptions(device="cpu"), QWEN, None, None),
        (HEAD, StudyOptions(gpus_per_worker=0.0), QWEN, 0.0, None),
        (HEAD, DEFAULT, replace(QWEN, dtype="float32"), None, None),
        (HEAD, DEFAULT, replace(QWEN, name="smollm2-135m"), None, None),
        (HEAD, TYPED, QWEN, 1.0, LONG),
        (HEAD, DEFAULT, QWEN, 1.0, LONG),
        (HEAD, DEFAULT, replace(QWEN, name="/shared/my-model", dtype="nf4"), 1.0, LONG),
        (HEAD, StudyOptions(gpus_per_worker=1.0, trainer_timeout=60.0), QWEN, 1.0, 60.0),
    ],
)
def test_a_study_waits_longer_for_a_gpu_node(
    cluster: Cluster, options: StudyOptions, model: ModelChoice, gpus: float | None, timeout: float | None
) -> None:
    adapted = adapt_to_cluster(options, cluster, [replace(configuration(), model=model)])
    assert (adapted.gpus_per_worker, adapted.trainer_timeout) == (gpus, timeout)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a temporary folder that only this test uses."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return tmp_path


def test_a_cluster_that_another_user_has_announced_is_not_joined_unasked(temporary: Path) -> None:
    address_file = temporary / "ray" / "ray_current_cluster"
    address_file.parent.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        where = f"127.0.0.1:{listener.getsockname()[1]}"
        address_file.write_text(where)
        assert ray_cluster.running_cluster_address() == where
        if os.getuid() != 0:
            pytest.skip("not root: cannot make a file that belongs to another user")
        os.chown(address_file, NOBODY, NOBODY)
        with pytest.raises(UsageError) as refused:
            ray_cluster.running_cluster_address()
    assert f"RAY_ADDRESS={where}" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert ray_cluster.running_cluster_address() is None, "one that does not answer is ignored"


def pipe(address_file: Path) -> None:
    os.mkfifo(address_file)


def link(address_file: Path) -> None:
    address_file.with_name("elsewhere").write_text("127.0.0.1:1")
    address_file.symlink_to("elsewhere")


def text(address_file: Path) -> None:
    address_file.write_text("no address")


@pytest.mark.timeout(60)  # opening a pipe without a writer would block for ever
@pytest.mark.parametrize("plant", [pipe, link, Path.mkdir, text])
def test_an_address_file_without_an_address_names_no_cluster(
    temporary: Path, monkeypatch: pytest.MonkeyPatch, plant: Callable[[Path], None]
) -> None:
    monkeypatch.setattr(ray_cluster, "is_listening", lambda host, port: True)
    address_file = temporary / "ray" / "ray_current_cluster"
    address_file.parent.mkdir()
    plant(address_file)
    assert ray_cluster.running_cluster_address() is None


def test_an_invalid_port_does_not_listen() -> None:
    assert not ray_cluster.is_listening("127.0.0.1", 10**30)
