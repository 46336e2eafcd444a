"""Studies that join an existing cluster leave nothing on it, even if they fail or are interrupted."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import ray
import study
from machines import no_room
from ray._private.state import actors
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group_table

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200)]

TWO = ("--variants", "lora", "--trainers", "1", "--seeds", "1", "--learning-rates", "3e-3", "1e-2")


def left() -> list[str]:
    """Return descriptions of the actors, placement groups and resources that studies still hold."""
    there = [a for a in actors().values() if a["State"] != "DEAD"]
    found = [f"actor {a['ActorClassName']} {a['State']}" for a in there]
    groups = [group["state"] for group in placement_group_table().values()]
    found += [f"placement group {state}" for state in groups if state != "REMOVED"]
    free, all_of = ray.available_resources(), ray.cluster_resources()
    return found + [
        f"{all_of[k] - free.get(k, 0):g} {k}"
        for k in ("CPU", "GPU", "memory")
        if free.get(k, 0) < all_of.get(k, 0)
    ]


def workers(before: set[int]) -> set[int]:
    """Return the ids of Ray's processes that are not in `before`, without idle workers of the cluster."""
    found = set()
    for pid in study.rays() - before:
        try:
            line = " ".join(psutil.Process(pid).cmdline())
            if "ray::IDLE" not in line:
                found.add(pid)
        except psutil.Error:
            continue
    return found


def test_a_study_that_gets_no_trainer_says_so_in_one_line(connected: Cluster, output: Path) -> None:
    """A cluster may grow, so a study waits for resources that the cluster lacks."""
    code, out, err = study.run(
        output, *TWO, "--gpus-per-worker", "1", "--trainer-timeout", "1", address=connected.address
    )
    assert (code, len(err.splitlines())) == (1, 1), out + err
    assert err.startswith("error: No trainer for 1 s: a trainer needs 1 CPU, 1 GPU")
    assert "waiting for a GPU node" in out
    study.wait_for(lambda: not left())


@pytest.mark.nightly
def test_a_study_that_fails_leaves_nothing_and_says_so(connected: Cluster, output: Path) -> None:
    """Every lane fails, because the weights of the base model are deleted once the study has begun.

    The study gives up its trainers before all configurations have failed.
    """
    rates = ("--learning-rates", "1e-3", "3e-3", "1e-2", "3e-2")
    twenty = ("--variants", "lora", "--seeds", "5", "--widen", "0", *rates)
    (weights,) = (output / "store" / "bases").glob("letters-base-*/model.safetensors")
    with no_room():
        process = study.start(output, *twenty, "--trainers", "2", address=connected.address)
        study.wait_for(lambda: "joined Ray" in study.log(output), process)
        weights.unlink()
    code, out, err = study.end(process)
    assert code == 1, out + err
    assert "No trainer is left: all failed 2 times in a row" in err.strip().splitlines()[-1]
    assert "Traceback" not in err
    study.wait_for(lambda: not left())
