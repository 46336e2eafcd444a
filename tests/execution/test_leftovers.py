"""After the kill of a study or of its Ray, no process remains and all results are kept.

test_joined_cluster.py tests what studies leave on an existing cluster (actors, placement groups, resources,
processes).
"""

from __future__ import annotations

import os
import re
import shlex
import signal
from collections import Counter
from pathlib import Path

import psutil
import pytest
import study

from orchestrator.record.store import Store

NAME = "lr_sensitivity-held_task-letters-base"
STEPS = 24
THREE = ("--variants", "lora", "--seeds", "1", "--widen", "0", "--learning-rates", "1e-3", "3e-3", "1e-2")
ONE_PLACE = ("--steps", str(STEPS), "--trainers", "1", "--lanes-per-trainer", "1")


def ours(output: Path) -> list[str]:
    """Return the names of processes that have a file of this study open or name one on the command line."""
    found = []
    for process in psutil.process_iter():
        try:
            words = [*process.cmdline(), *(file.path for file in process.open_files())]
        except psutil.Error:
            continue
        if process.pid != os.getpid() and any(str(output) in word for word in words):
            found.append(process.name())
    return found


@pytest.mark.ray
@pytest.mark.smoke
@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("no_cluster")
def test_kill_9_of_the_driver_leaves_nothing_that_runs_and_loses_nothing(
    output: Path, tmp_path: Path
) -> None:
    """The first lane is done, the second lane is two steps past its checkpoint, and the third lane waits.

    A newer but damaged checkpoint is then added: the study reports it and uses the checkpoint before.
    """
    before = study.rays()
    task = study.hold(tmp_path / "task", Store(output / "store"), records=1, step=10)
    arguments = (*THREE, *ONE_PLACE, "--task", str(task))
    process = study.start(output, *arguments)
    study.wait_for(lambda: study.held(task), process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    study.wait_for(lambda: study.rays() <= before)  # its Ray ends with it
    study.wait_for(lambda: not ours(output))
    done = {f: r.provenance.ended for f, r in study.records(output).items()}
    half = {f: step for f, step in study.saved(output).items() if f not in done}
    assert (len(done), list(half.values())) == (1, [8])

    (whole,) = Store(output / "store").checkpoints.glob(f"{next(iter(half))}/*/step-00000008.safetensors")
    damaged = whole.with_name("step-00000010.safetensors")
    damaged.write_bytes(whole.read_bytes()[:-1] + bytes([whole.read_bytes()[-1] ^ 1]))

    code, out, err = study.run(output, *arguments)
    assert code == 0, out + err
    assert "skipped the damaged checkpoint" in out
    assert f"skipped the damaged checkpoint {damaged}: " in (output / NAME / "study.log").read_text()
    now = study.records(output)
    assert Counter(r.state for r in now.values()) == {"finished": 3}
    for fingerprint, ended in done.items():
        assert now[fingerprint].provenance.ended == ended, "finished ones are not trained again"
    for fingerprint in half:
        assert now[fingerprint].provenance.resumed_from, "half-trained ones go on from their checkpoints"
        assert [step.step for step in now[fingerprint].curve] == list(range(1, STEPS + 1))
    counted = re.search(r"(\d+) optimizer steps of", out)
    assert counted, out
    assert int(counted[1]) == 2 * STEPS - 8, "no step before the checkpoint is repeated"
    assert sorted(study.children(output, NAME)) == sorted((f, "FINISHED") for f in now)
    assert study.parents(output, NAME) == ["FINISHED"]
    study.wait_for(lambda: study.rays() <= before)
    study.wait_for(lambda: not ours(output))
    assert not list((output / "store" / "scratch").iterdir())


@pytest.mark.ray
@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("no_cluster")
def test_a_killed_control_store_ends_the_study_and_the_same_command_goes_on(
    output: Path, tmp_path: Path
) -> None:
    before = study.rays()
    task = study.hold(tmp_path / "task", Store(output / "store"), records=1, step=10)
    arguments = (*THREE, *ONE_PLACE, "--task", str(task))
    process = study.start(output, *arguments)
    study.wait_for(lambda: study.held(task), process)

    driver = psutil.Process(process.pid)
    (control_store,) = [p for p in driver.children() if p.name() == "gcs_server"]
    control_store.kill()
    code, out, err = study.end(process)
    assert (code, len(err.splitlines())) == (1, 1), out + err
    assert re.match(r"error: Ray's control store \(GCS, 127.0.0.1:\d+\) has not answered for 30 s: ", err)
    assert err.endswith(f"to go on: {shlex.join(['python', *process.args[1:]])}\n")  # type: ignore[misc, list-item]
    assert ") does not answer; waiting 30 s\n" in out
    study.wait_for(lambda: study.rays() <= before)
    assert study.parents(output, NAME) == ["KILLED"]
    assert len(study.records(output)) == 1
    half = {f: step for f, step in study.saved(output).items() if f not in study.records(output)}
    assert list(half.values()) == [8]

    code, out, err = study.run(output, *arguments)
    assert code == 0, out + err
    now = study.records(output)
    assert Counter(r.state for r in now.values()) == {"finished": 3}
    for fingerprint in half:
        assert now[fingerprint].provenance.resumed_from == (8,)
    assert sorted(study.children(output, NAME)) == sorted((f, "FINISHED") for f in now)
    assert study.parents(output, NAME) == ["FINISHED"]
