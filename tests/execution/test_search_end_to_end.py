"""A search on the whole path, with real Ray, Tune and Optuna, is killed and continued."""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path

import pytest
import ray
import study
from machines import lanes
from ray.cluster_utils import Cluster
from search_drive import asked
from steps import TASK, Steps
from test_joined_cluster import left

from orchestrator.execution.search.journal import FINGERPRINT, JOURNAL_FILE, read_trials
from orchestrator.execution.search.search_file import SearchFile
from orchestrator.record.store import Store
from orchestrator.record.study_file import StudyFile
from orchestrator.util.errors import UsageError

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

POINTS, STEPS = 3, 24
SEARCH = ("--search", "optuna", "--points", str(POINTS), "--space", "rank=4,8", "alpha=log:4:64")
SMALL = ("--variants", "lora", "hira", "--steps", str(STEPS), "--scheduler", "asha")
ONE_PLACE = ("--trainers", "1", "--lanes-per-trainer", "1")
NAME = "lr_sensitivity-held_task-letters-base-tpe"


def test_a_search_fills_the_lanes_that_its_trainer_has(
    cluster: Cluster, output: Path, tmp_path: Path, steps: Steps
) -> None:
    """The trainer has more lanes than the driver expects, as on a GPU where the trainer measures them."""
    expected = "TrainerSpec.expected_lanes = 1"
    script = study.altered(
        tmp_path, "from orchestrator.execution.trainers.trainer import TrainerSpec", expected
    )
    options = ("--search", "optuna", "--points", "5", "--space", "alpha=log:4:64", "--variants", "lora")
    resources = ("--task", str(TASK), "--steps", "30", "--trainers", "1", "--lanes-per-trainer", "3")
    steps.slow_after(4)  # no point ends before three are in training
    process = study.start(output, *options, *resources, address=cluster.address, script=script)
    ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
    try:
        study.wait_for(lambda: lanes("leased") == 3, process)
    finally:
        ray.shutdown()
    steps.run_free()
    code, out, err = study.end(process)
    assert code == 0, out + err
    sizes = [record.provenance.lane_group_size for record in Store(output / "store").records()]
    assert (len(sizes), max(sizes)) == (5, 3)


def test_a_search_killed_in_the_middle_goes_on_with_what_it_asked_for(
    cluster: Cluster, output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(output / "store")
    task = study.hold(tmp_path / "task", store, records=2, step=3)
    small = (*SMALL, *ONE_PLACE, "--task", str(task))
    process = study.start(output, *SEARCH, *small, address=cluster.address)
    study.wait_for(lambda: study.held(task), process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
    try:
        study.wait_for(lambda: not left())  # the killed driver holds nothing on the cluster any more
    finally:
        ray.shutdown()
    before = asked(output / NAME)
    made = {record.fingerprint: record.provenance.ended for record in store.records()}
    assert 2 <= len(made) < len(before) < 2 * POINTS, "one is half trained, others have yet to be asked for"
    assert set(made) <= set(before), "every trained point is in the journal"

    assert study.run_here(output, *SEARCH, *small, address=cluster.address) == 0
    file = SearchFile.read(output / NAME)
    assert file is not None
    points = asked(output / NAME)
    assert points[: len(before)] == before
    assert len(set(points)) == len(points)
    trials = read_trials(output / NAME / JOURNAL_FILE)
    of_points = {v: [t for t in each if FINGERPRINT in t.user_attrs] for v, each in trials.items()}
    assert {variant: len(each) for variant, each in of_points.items()} == {"lora": POINTS, "hira": POINTS}
    assert all(("alpha" in t.params) == (v == "lora") for v, each in of_points.items() for t in each)
    states = store.states()
    assert set(states) == set(points)
    assert set(states.values()) <= {"finished", "stopped", "diverged"}
    for fingerprint, ended in made.items():
        record = store.get(fingerprint)
        assert record is not None
        assert record.provenance.ended == ended, "what had a record was not trained again"
    kept = StudyFile.read(output / NAME)
    assert kept is not None
    assert set(kept.configurations) == set(points)
    assert Counter(study.children(output, NAME)) == Counter((f, "FINISHED") for f in points)
    steps = sum(record.steps for record in store.records())
    assert sum(each.steps for each in file.spent.values()) == steps
    assert set(file.spent) == {"lora", "hira"}
    for each in file.spent.values():
        assert (each.asked, each.points, each.most_steps) == (POINTS, POINTS, POINTS * STEPS)
    assert not [path for path in output.rglob("*") if path.suffix in (".pkl", ".pickle")]

    capsys.readouterr()
    assert study.run_here(output, *SEARCH, *small, "--plan") == 0
    assert "Configurations  6, of them 6 known" in capsys.readouterr().out
    with pytest.raises(UsageError) as refused:
        study.run_here(output, *SEARCH[:-1], "alpha=log:4:32", *small)
    assert "lora's alpha in log:4:64, now it would be log:4:32; take another --study" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert asked(output / NAME) == points
