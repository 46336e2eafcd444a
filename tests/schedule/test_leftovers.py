"""What is left when a study was killed: nothing that runs, and all that it knew.

On a cluster that was there before: test_joined_cluster.py (actors, placement groups, resources, processes).
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
import study

NAME = "lr_sensitivity-letters-letters-base"


def ours(output: Path) -> list[str]:
    """Processes that have a file of this study open, or speak of it in their command line."""
    found = []
    for process in psutil.process_iter():
        try:
            words = [*process.cmdline(), *(file.path for file in process.open_files())]
        except psutil.Error:
            continue
        if process.pid != os.getpid() and any(str(output) in word for word in words):
            found.append(process.name())
    return found


@pytest.mark.timeout(1200)
def test_kill_9_of_the_driver_leaves_nothing_that_runs_and_loses_nothing(output: Path) -> None:
    arguments = (
        "--variants",
        "lora",
        "pissa",
        "--seeds",
        "2",
        "--steps",
        "1000",
        "--lanes-per-seat",
        "2",
        "--learning-rates",
        "1e-3",
        "1e-2",
    )
    before = study.rays()
    process = study.start(output, *arguments)
    # In the middle: some are done, others have a checkpoint and seconds to go.
    study.wait_for(lambda: study.finals(output) >= 2 and bool(study.half_trained(output, 400)), 300, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    killed = time.time()
    done = {f: r.provenance.ended for f, r in study.records(output).items() if r.state == "finished"}
    half = study.half_trained(output, 400)
    assert len(done) < 8
    study.wait_for(lambda: study.rays() <= before, 10)  # its Ray goes with it
    study.wait_for(lambda: not ours(output), 10)
    gone = time.time()

    code, out, err = study.end(study.start(output, *arguments), timeout=500)
    assert code == 0, out + err
    now = study.records(output)
    assert len(now) == 8
    assert Counter(r.state for r in now.values()) == {"finished": 8}
    for fingerprint, ended in done.items():
        assert now[fingerprint].provenance.ended == ended < killed + 1, "finished ones are not trained again"
    # Seats outlive their driver by a moment, and may have ended a lane in it.
    half = {f for f in half if now[f].provenance.ended > gone}
    for fingerprint in half:
        assert now[fingerprint].provenance.resumed_from, "half-trained ones go on from their checkpoints"
        steps = [step.step for step in now[fingerprint].curve]
        assert steps == sorted(set(steps))
        assert len(steps) == 1000
    assert half
    assert sorted(study.children(output, NAME)) == sorted((f, "FINISHED") for f in now)
    assert study.parents(output, NAME) == ["FINISHED"]
    study.wait_for(lambda: study.rays() <= before, 10)
    study.wait_for(lambda: not ours(output), 10)
    assert not list((output / "store" / "scratch").iterdir())
