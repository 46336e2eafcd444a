"""Two studies on one cluster with two GPUs, and one study with a limit.

The GPUs exist only in Ray's accounting; the studies train on CPUs.
"""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
import study
from machines import GPUS, Machines
from steps import TASK, Steps
from test_joined_cluster import left, workers

from orchestrator.record.store import Store

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200)]

STAMP = len("2026-01-01 00:00:00")
GPU = (*GPUS, "--trainers", "1", "--variants", "lora", "--seeds", "1", "--task", str(TASK))


def seconds_at_work(output: Path, name: str) -> float:
    """Return the seconds in which the study had or requested a trainer, rounded up, from its log."""
    lines = (output / name / "study.log").read_text().splitlines()
    (began,) = [line[:STAMP] for line in lines if "joined Ray" in line]
    (ended,) = [line[:STAMP] for line in lines if re.search(r"\d+ trained in ", line)]
    times = [time.mktime(time.strptime(stamp, "%Y-%m-%d %H:%M:%S")) for stamp in (began, ended)]
    return times[1] - times[0] + 1


@pytest.mark.nightly
def test_two_studies_at_once_share_what_they_know_and_both_finish(
    machines: Machines, output: Path, steps: Steps
) -> None:
    machines.add(gpus=2)
    before = study.rays()
    # No lane diverges, so each record has as many steps as were taken for its lane.
    rates = {"a": ("1e-3", "3e-3"), "b": ("3e-3", "1e-2")}
    taken, length = 0, 60
    steps.slow_after(1)
    processes = {
        name: study.start(
            output,
            *(*GPU, "--steps", str(length), "--study", name, "--learning-rates", *of),
            address=machines.address,
        )
        for name, of in rates.items()
    }

    def both_train() -> bool:
        assert all(process.poll() is None for process in processes.values()), "neither has ended"
        return len(steps.files()) == 2  # one process of each study

    study.wait_for(both_train)
    steps.run_free()
    for name, process in processes.items():
        code, out, err = study.end(process)
        assert code == 0, out + err
        assert "Traceback" not in err
        assert "joined Ray" in out
        assert "0 of 2 known" in out
        hours = re.search(r"(\d+) trained in .*, ([\d.e-]+) GPU hours", out)
        assert hours, out
        most = 1.01 * seconds_at_work(output, name) / 3600  # hours are printed with three digits
        assert 0 < float(hours[2]) < most, "no more than one GPU for the whole time"
        assert int(hours[1]) == 2
        counted = re.search(r"(\d+) optimizer steps of", out)
        assert counted
        taken += int(counted[1])
    assert taken == steps.taken()
    study.wait_for(lambda: not left())
    study.wait_for(lambda: not workers(before))

    records = study.records(output)
    assert {(r.state, r.steps) for r in records.values()} == {("finished", length)}
    by_rate = {f"{r.configuration.optimizer.learning_rate:g}": f for f, r in records.items()}
    assert len(records) == len(by_rate) == 3, "one record a configuration"
    store = Store(output / "store")
    assert len(list(store.records_folder.glob("*/*.json"))) == 3
    assert not list(store.checkpoints.iterdir())
    # The configuration that both studies ask for is trained twice if both train it at the same time;
    # otherwise one study takes the result from the store.
    twice = taken - len(records) * length
    assert 0 <= twice <= length
    for name, of in rates.items():
        wanted = {by_rate[f"{float(rate):g}"] for rate in of}
        assert sorted(study.children(output, name)) == sorted((f, "FINISHED") for f in wanted)
        assert study.parents(output, name) == ["FINISHED"]


HOURS_PASS = """
from pathlib import Path
from orchestrator.execution.progress import RunBudget
update, hours = RunBudget.update, 0

def later(self, trainers, now):
    global hours
    hours += Path({file!r}).exists()
    return update(self, trainers, now + 3600 * hours)

RunBudget.update = later
"""


GPU_HOURS, HOURS = "--max-gpu-hours", "--max-hours"


@pytest.mark.nightly
def test_a_limit_ends_a_study_cleanly_and_the_same_command_goes_on(
    machines: Machines, output: Path, tmp_path: Path, steps: Steps
) -> None:
    """The study has more steps than any machine takes during the test.

    Once the file `pass` exists, the clock of the limits advances by an hour at each check. The command is run
    with one limit and then with another; the second run continues from the checkpoints of the first.
    """
    machines.add()
    before = study.rays()
    length = 40_000
    command = (*GPU, "--study", "limited", "--learning-rates", "3e-3", "1e-2", "--steps", str(length))
    hours = tmp_path / "pass"
    script = study.altered(tmp_path, study.PATIENT, HOURS_PASS.format(file=str(hours)))

    def ends_by(limit: str) -> None:
        already = steps.taken()
        process = study.start(output, *command, limit, "0.5", script=script, address=machines.address)
        study.wait_for(lambda: steps.taken() >= already + 10, process)
        hours.touch()
        code, out, err = study.end(process)
        hours.unlink()
        assert code == 3, out + err
        assert "Traceback" not in err
        assert f"{limit} 0.5: the trainers save their lanes" in out
        assert study.parents(output, "limited") == ["KILLED"]
        saved = study.saved(output)
        assert len(saved) == 2
        assert sum(saved.values()) == steps.taken(), "they are saved where they are, and go on from there"
        counted = re.search(rf"(\d+) optimizer steps of {2 * length}", out)
        assert counted
        assert int(counted[1]) == steps.taken() - already
        study.wait_for(lambda: not left())
        study.wait_for(lambda: not workers(before))
        ended = re.fullmatch(
            rf"Ended by {limit} 0\.5: 0 of 2 configurations are done, ([\d.]+) GPU hours used; "
            rf"to go on: python .*{limit} 0\.5",
            out.strip().splitlines()[-1],
        )
        assert ended
        if limit == GPU_HOURS:
            assert float(ended[1]) >= 0.5

    ends_by(GPU_HOURS)
    ends_by(HOURS)
    assert (output / "limited" / "report.html").exists()
