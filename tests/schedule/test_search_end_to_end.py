"""A search on the whole path, with real Ray, Tune and Optuna: killed in the middle, and gone on with."""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path

import pytest
import study

from orchestrator.record.store import Store
from orchestrator.record.study_file import StudyFile
from orchestrator.schedule.search_file import SearchFile

POINTS = 6
SEARCH = ("--search", "optuna", "--points", str(POINTS), "--space", "rank=4,8", "alpha=log:4:64")
SMALL = ("--variants", "lora", "hira", "--steps", "120", "--lanes-per-seat", "1", "--scheduler", "asha")
NAME = "lr_sensitivity-letters-letters-base-tpe"


def asked(output: Path) -> list[str]:
    file = SearchFile.read(output / NAME)
    return [point.fingerprint for point in file.asked] if file else []


@pytest.mark.timeout(600)
def test_a_search_killed_in_the_middle_goes_on_with_what_it_asked_for(output: Path) -> None:
    store = Store(output / "store")
    process = study.start(output, *SEARCH, *SMALL)
    study.wait_for(lambda: len(store.states()) >= 4, 200, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    before = asked(output)
    made = {record.fingerprint: record.provenance.ended for record in store.records()}
    assert len(made) <= len(before) <= 2 * POINTS
    assert set(made) <= set(before), "nobody trains what was not written down"

    code, out, err = study.run(output, *SEARCH, *SMALL)
    assert code == 0, out + err
    file = SearchFile.read(output / NAME)
    assert file is not None
    points = [point.fingerprint for point in file.asked]
    assert points[: len(before)] == before
    assert len(set(points)) == len(points)
    assert Counter(point.variant for point in file.asked) == {"lora": POINTS, "hira": POINTS}
    assert all(("alpha" in point.parameters) == (point.variant == "lora") for point in file.asked)
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
        assert (each.asked, each.points, each.most_steps) == (POINTS, POINTS, POINTS * 120)
    assert not [path for path in output.rglob("*") if path.suffix in (".pkl", ".pickle")]

    code, out, err = study.run(output, *SEARCH, *SMALL)
    assert code == 0, out + err
    assert "12 of 12 known, nothing to train" in out
    assert asked(output) == points

    code, out, err = study.run(output, *SEARCH[:-1], "alpha=log:4:32", *SMALL)
    assert (code, len(err.splitlines())) == (2, 1), out + err
    assert "lora's alpha in log:4:64, now it would be log:4:32; take another --study" in err


@pytest.mark.timeout(500)
def test_a_design_is_a_study_of_its_points(output: Path) -> None:
    arguments = ("--variants", "lora", "--steps", "60", "--search", "qmc")
    code, out, err = study.run(output, *arguments, "--points", "2")
    assert code == 0, out + err
    states = Store(output / "store").states()
    assert len(states) == 2
    code, out, err = study.run(output, *arguments, "--points", "4", "--plan")
    assert code == 0, out + err
    assert "4, of them 2 known" in out
