"""Early stopping on the whole path, with real Ray and Tune: stopped, again, killed, parked and spilled."""

from __future__ import annotations

import os
import re
import signal
from collections import Counter
from pathlib import Path

import pytest
import study

from orchestrator.record.schema import Record
from orchestrator.record.store import Store

ASHA = "asha loss=min first=40 eta=4 last=40"
# 120 steps of the letters task: evaluated after 40, 80 and 120; the rates from 1e-1 on learn nothing.
SMALL = ("--variants", "lora", "--seeds", "1", "--steps", "120")
GOOD, BAD = ("1e-3", "3e-3", "1e-2"), ("1e-1", "3e-1")


def records(output: Path) -> dict[str, Record]:
    return {record.fingerprint: record for record in Store(output / "store").records()}


def rate(record: Record) -> float:
    return record.configuration.optimizer.learning_rate


def validated(record: Record) -> list[int]:
    return [e.step for e in record.evaluations if e.split == "validation"]


def steps_said(out: str) -> tuple[int, int]:
    found = re.search(r"(\d+) optimizer steps of (\d+) for all configurations to the end", out)
    assert found, out
    return int(found[1]), int(found[2])


@pytest.mark.timeout(500)
def test_asha_remembers_its_rungs_and_the_grid_goes_on_from_where_it_stopped(output: Path) -> None:
    asha = (*SMALL, "--scheduler", "asha", "--learning-rates", *GOOD)
    code, out, err = study.run(output, *asha)
    assert code == 0, out + err
    first = records(output)
    steps, all_steps = steps_said(out)
    assert (steps, all_steps) == (sum(r.steps for r in first.values()), 360)

    # A single lane would be the first on its rung and go on, if the known results were not replayed.
    code, out, err = study.run(output, *asha, *BAD)
    assert code == 0, out + err
    assert "3 of 5 known" in out
    assert "2 of them stopped early" in out
    assert steps_said(out) == (80, 240)
    now = records(output)
    assert {f: now[f] for f in first} == first, "what is known is not trained again"
    for record in now.values():
        if rate(record) >= 0.1:
            assert (record.state, record.steps, record.scheduler) == ("stopped", 40, ASHA)
            assert validated(record) == [40]
            assert (output / "store" / "checkpoints" / record.fingerprint).exists()

    code, out, err = study.run(output, *asha, *BAD)
    assert code == 0, out + err
    assert "5 of 5 known, nothing to train" in out

    stopped = {f for f, record in now.items() if record.state == "stopped"}
    arguments = (*SMALL, "--learning-rates", *GOOD, *BAD)
    code, out, err = study.run(output, *arguments, script="early_stopping.py")
    assert (code, len(err.splitlines())) == (2, 1), out + err
    known = f"{5 - len(stopped)} of the 5 configurations were trained to the end there before this study"
    assert known in err
    code, out, err = study.run(output, *arguments)
    assert code == 0, out + err
    assert f"{5 - len(stopped)} of 5 known" in out
    assert steps_said(out) == (80 * len(stopped), 120 * len(stopped))
    done = records(output)
    assert {r.state for r in done.values()} == {"finished"}
    assert {f for f, r in done.items() if r.provenance.resumed_from == (40,)} == stopped
    assert all(validated(r) == [40, 80, 120] and len(r.curve) == 120 for r in done.values())


@pytest.mark.timeout(500)
def test_early_stopping_is_compared_with_the_grid_that_goes_on_from_it(output: Path) -> None:
    arguments = (*SMALL, "--learning-rates", *GOOD, *BAD)
    code, out, err = study.run(output, *arguments, script="early_stopping.py")
    assert code == 0, out + err
    assert "early_stopping-letters-asha: 0 of 5 known" in out
    assert "early_stopping-letters-grid: " in out
    assert {r.state for r in records(output).values()} == {"finished"}
    said = out.strip().splitlines()[-5:]
    assert re.match(r"lora +\S+ +\S+ +\d+ +600$", said[-2]), said
    assert said[-1].endswith(" of the steps.")

    code, out, err = study.run(output, *arguments, script="early_stopping.py")
    assert code == 0, out + err
    assert out.count("5 of 5 known, nothing to train") == 2
    assert out.strip().splitlines()[-5:] == said, "the choice of then, not of the records of now"

    code, out, err = study.run(output, *arguments, "1", script="early_stopping.py")
    assert (code, len(err.splitlines())) == (2, 1), out + err
    assert "has chosen among 5 configurations and now there would be 6" in err
    assert len(records(output)) == 5


@pytest.mark.timeout(500)
def test_kill_9_in_the_middle_of_asha_loses_nothing(output: Path) -> None:
    arguments = ("--variants", "lora", "--seeds", "1", "--steps", "400", "--scheduler", "asha")
    arguments = (*arguments, "--lanes-per-seat", "1", "--learning-rates", *GOOD, *BAD)
    store = Store(output / "store")

    def states() -> Counter[str]:
        return Counter(store.states().values())

    process = study.start(output, *arguments)
    # Two places: with three of five at their end, one has yet to begin. Without the others on its rung again
    # it would be the first there, and go on.
    study.wait_for(lambda: states().total() >= 3, 180, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    # Seats outlive their driver by a moment; what they write in it is kept too.
    before = records(output)
    assert len(before) < 5

    code, out, err = study.run(output, *arguments)
    assert code == 0, out + err
    now = records(output)
    assert len(now) == 5
    assert set(Counter(r.state for r in now.values())) == {"finished", "stopped"}
    for fingerprint, record in before.items():
        assert now[fingerprint].provenance.ended == record.provenance.ended, "it is not trained again"
    for record in now.values():
        assert record.steps == len(record.curve) == validated(record)[-1]
        assert len(validated(record)) == len(set(validated(record)))
    code, out, err = study.run(output, *arguments)
    assert code == 0, out + err
    assert "5 of 5 known, nothing to train" in out


@pytest.mark.timeout(400)
def test_hyperband_pauses_more_lanes_than_there_are_places(output: Path) -> None:
    """Its bracket of three waits for lanes that only get a place when others give theirs."""
    arguments = (*SMALL, "--variants", "lora", "hira", "--learning-rates", *GOOD, *BAD)
    one_place = ("--seats", "1", "--lanes-per-seat", "1")
    code, out, err = study.run(output, *arguments, *one_place, "--scheduler", "hyperband")
    assert code == 0, out + err
    now = records(output)
    assert Counter(r.state for r in now.values()) == {"finished": 6, "stopped": 4}
    assert all(r.steps == 40 for r in now.values() if r.state == "stopped")
    assert any(r.provenance.resumed_from == (40,) for r in now.values()), "some were spilled"
    assert steps_said(out) == (6 * 120 + 4 * 40, 1200)


@pytest.mark.timeout(400)
def test_median_stops_what_is_worse_than_half(output: Path) -> None:
    arguments = (*SMALL, "--seeds", "2", "--learning-rates", *GOOD, *BAD, "--scheduler", "median")
    code, out, err = study.run(output, *arguments)
    assert code == 0, out + err
    now = records(output)
    stopped = [r for r in now.values() if r.state == "stopped"]
    assert any(rate(r) >= 0.1 for r in stopped)
    assert all(r.scheduler == "median loss=min first=40 samples=3" for r in stopped)
    assert any(rate(r) < 0.1 for r in now.values() if r.state == "finished")
    assert steps_said(out)[0] == sum(r.steps for r in now.values()) < 1200
