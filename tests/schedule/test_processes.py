"""The processes of a running study, killed one after another: each is replaced, and nothing is lost."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import study
from ray.cluster_utils import Cluster

from orchestrator.record.schema import Record

TRIAL = "ResourceTrainable"  # what Tune makes of a trainable with resources
ONE = ("--seats", "1", "--lanes-per-seat", "4")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Room for one seat: what a dead one does not give back, its successor would lack. Without the dashboard
    Ray Train's own cleaner does nothing."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield cluster
    cluster.shutdown()


@pytest.mark.timeout(900)
def test_each_process_of_a_study_may_be_killed(
    cluster: Cluster, output: Path, undisturbed: dict[str, Record]
) -> None:
    process = study.start(output, *study.EIGHT, *ONE, address=cluster.address)

    def training_again() -> bool:
        return len(study.titled("RayTrainWorker")) == 1 and bool(checkpoints() - before)

    def checkpoints() -> set[Path]:
        return set((output / "store" / "checkpoints").glob("*/*/*.safetensors"))

    before: set[Path] = set()
    for title in ("TrainController", "RayTrainWorker", "SeatHost", TRIAL):
        study.wait_for(training_again, 150, process)
        (worker,) = study.titled("RayTrainWorker")
        victim = study.titled(title)[0]
        before = checkpoints()
        victim.kill()
        if title != TRIAL:
            study.wait_for(lambda worker=worker: not worker.is_running(), 10, process)
    code, out, err = study.end(process, timeout=400)
    assert code == 0, out + err
    assert len(re.findall(r"seat-\d+ died", out)) == 3, "a trial that dies costs no seat"
    assert "trials failed" not in out
    found = study.records(output)
    assert set(found) == set(undisturbed)
    for fingerprint, record in found.items():
        assert study.course(record) == study.course(undisturbed[fingerprint])
    (name,) = {path.parent.name for path in output.glob("*/study.json")}
    assert sorted(study.children(output, name)) == sorted((f, "FINISHED") for f in found)
