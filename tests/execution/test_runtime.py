"""The number of trainers that fit on a cluster, and the errors if more are requested."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.execution.ray.runtime import Cluster, Node, connect
from orchestrator.util.errors import UsageError

GIB = float(2**30)
LAPTOP = Cluster((Node(8, 0, 12 * GIB),))
GPUS = Cluster((Node(32, 4, 200 * GIB), Node(32, 3, 200 * GIB)))


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
        (LAPTOP, 7, None, 1, ["--trainers 7", "a CPU and 2 GiB", "8 CPUs", "take --trainers 6"]),
        (LAPTOP, 4, None, 2, ["--trainers 4 --workers-per-trainer 2", "2 times a CPU", "take --trainers 3"]),
        (
            LAPTOP,
            None,
            None,
            9,
            ["--workers-per-trainer 9: there is room for 0", "take --workers-per-trainer 6"],
        ),
        (LAPTOP, None, 1.0, 1, ["--gpus-per-worker 1: ", "0 GPUs", "leave --gpus-per-worker out"]),
        (GPUS, None, None, 8, ["--workers-per-trainer 8", "1 GPU and a CPU", "take --workers-per-trainer 7"]),
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
