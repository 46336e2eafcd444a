"""Nodes of a GPU cluster that join, are drained and are lost while a study trains on them."""

from __future__ import annotations

import re
from pathlib import Path

import alone
import pytest
import ray
import study
from machines import GPUS, Machines, lanes, trainers
from ray.util.placement_group import placement_group_table
from steps import TASK, Steps

from orchestrator.execution.trial import TRIAL_MEMORY_BYTES

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1800)]

LANES, STEPS, INTERVAL = 6, 60, 6
RATES = ("--variants", "lora", "--seeds", str(LANES // 2), "--learning-rates", "3e-3", "1e-2")
SIX = (*RATES, "--task", str(TASK), "--steps", str(STEPS), "--lanes-per-trainer", "2", *GPUS)


def held() -> dict[str, float]:
    """Return how much of each resource of the cluster is reserved."""
    there, free = ray.cluster_resources(), ray.available_resources()
    return {name: there.get(name, 0.0) - free.get(name, 0.0) for name in ("CPU", "GPU", "memory")}


def trainers_asked_for() -> list[str]:
    """Return the states of the placement groups that ask for a GPU, as those of trainers do."""
    groups = [g for g in placement_group_table().values() if g["state"] != "REMOVED"]
    return [g["state"] for g in groups if any("GPU" in bundle for bundle in g["bundles"].values())]


def trained_as_alone(output: Path, bases: Path, folder: Path) -> None:
    found = study.records(output)
    assert len(found) == LANES
    expected = alone.train([record.configuration for record in found.values()], bases, folder)
    for fingerprint, record in found.items():
        assert study.course(record) == study.course(expected[fingerprint])


@pytest.mark.nightly
def test_nodes_that_join_are_used_and_one_that_is_drained_loses_no_step(
    machines: Machines, output: Path, letters_bases: Path, tmp_path: Path, steps: Steps
) -> None:
    study.wait_for(lambda: not any(held().values()))
    steps.slow_after(20)
    process = study.start(output, *SIX, address=machines.address)
    study.wait_for(lambda: "waiting for a GPU node" in study.log(output), process)
    study.wait_for(lambda: trainers_asked_for() == ["PENDING"], process)  # an autoscaler acts on this

    def trials_wait() -> bool:
        now = held()
        assert (now["CPU"], now["GPU"]) == (0, 0), "waiting trials reserve nothing that a trainer needs"
        assert now["memory"] <= LANES * TRIAL_MEMORY_BYTES + 1, "only trials reserve memory"
        return now["memory"] >= TRIAL_MEMORY_BYTES

    study.wait_for(trials_wait, process)
    # A trainer that starts while the other trials still start would take its first steps with one lane.
    study.wait_for(lambda: lanes("waiting") == LANES, process)
    assert "died" not in study.log(output), "a trainer waits for its place, and as long as it takes"

    first = machines.add()
    study.wait_for(lambda: trainers(first) == 1, process)
    study.wait_for(lambda: steps.taken() > steps.limit, process)
    machines.drain(first, 3600)
    study.wait_for(lambda: trainers(first) == 0, process)
    saved = study.saved(output)
    assert len(saved) == 2
    assert sum(saved.values()) == steps.taken(), "not a step is repeated"
    machines.lose(first)
    study.wait_for(lambda: "1 node left: 1 there" in study.log(output), process)

    second = machines.add()
    study.wait_for(lambda: trainers(second) == 1, process)
    steps.run_free()
    code, out, err = study.end(process)
    assert code == 0, out + err
    assert out.count("1 node joined: 2 there") == 2
    assert "was lost with a node" not in out, "the trainer had left before its node did"
    assert not re.search(r"trainer-\d+ died", out)
    trained_as_alone(output, letters_bases, tmp_path / "alone")
    resumed = [r for r in study.records(output).values() if r.provenance.resumed_from]
    assert len(resumed) == 2
    counted = re.search(r"(\d+) optimizer steps of", out)
    assert counted, out
    assert int(counted[1]) == steps.taken() == LANES * STEPS


@pytest.mark.nightly
def test_a_node_that_is_lost_with_its_gpu_and_more_trainers_than_gpus(
    machines: Machines, output: Path, letters_bases: Path, tmp_path: Path, steps: Steps
) -> None:
    steps.slow_after(20)
    first = machines.add()
    process = study.start(output, *SIX, "--trainers", "3", address=machines.address)
    study.wait_for(lambda: trainers(first) == 1, process)
    second = machines.add()
    study.wait_for(lambda: trainers(second) == 1, process)
    machines.lose(second)  # while a trainer starts on it
    study.wait_for(lambda: steps.taken() > steps.limit, process)
    machines.lose(first)
    third = machines.add()
    study.wait_for(lambda: trainers(third) == 1, process)  # the third trainer had waited
    steps.run_free()
    code, out, err = study.end(process)
    assert code == 0, out + err
    assert out.count("was lost with a node") == 2, out
    # Each of the two trainers held two lanes.
    assert LANES * STEPS <= steps.taken() <= LANES * STEPS + 2 * 2 * INTERVAL
    assert "died" not in out
    trained_as_alone(output, letters_bases, tmp_path / "alone")
    assert any(record.provenance.resumed_from for record in study.records(output).values())
    assert all(record.provenance.attempt <= 2 for record in study.records(output).values())
