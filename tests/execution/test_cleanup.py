"""The cleanup of processes that a dead Ray leaves."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path

import psutil
import pytest
import study

from orchestrator.execution.ray import cleanup


@pytest.mark.parametrize("jump", [0.0, 3600.0])
def test_workers_of_a_raylet_that_nobody_has_reaped_end_with_the_next_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    """In a container whose first process reaps no dead children, workers take a dead raylet for alive.

    Meanwhile the machine's clock jumps by `jump` seconds, which changes the boot time that Linux reports.
    """
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    driver, raylet = subprocess.Popen(["sleep", "600"]), subprocess.Popen(["sleep", "600"])
    worker = subprocess.Popen(["sleep", "600"], env=os.environ | {"RAY_RAYLET_PID": str(raylet.pid)})
    try:
        folder = cleanup.state_folder()
        folder.mkdir(mode=0o700)
        known = cleanup.serialize_processes([psutil.Process(p.pid) for p in (driver, raylet)])
        (folder / f"{driver.pid}.json").write_text(known)
        began = psutil.boot_time()
        if jump:
            monkeypatch.setattr(psutil._psplatform, "boot_time", lambda: began + jump)
        cleanup.end_orphaned_rays()
        assert worker.poll() is None, "its driver lives"
        driver.kill()
        raylet.kill()
        study.wait_for(lambda: psutil.Process(raylet.pid).status() == psutil.STATUS_ZOMBIE)
        study.wait_for(lambda: psutil.Process(driver.pid).status() == psutil.STATUS_ZOMBIE)
        cleanup.end_orphaned_rays()
        assert not psutil.pid_exists(worker.pid)
        assert not list(folder.iterdir())
    finally:
        for process in (driver, raylet, worker):
            process.kill()
            process.wait()


@pytest.mark.cluster
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to make a PID namespace")
def test_a_worker_in_a_container_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the container, another process may have the process id of a raylet of this machine."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    raylet = subprocess.Popen(["sleep", "600"])
    worker = ["env", f"RAY_RAYLET_PID={raylet.pid}", "sleep", "600"]
    container = subprocess.Popen(["unshare", "--pid", "--fork", "--kill-child", *worker])
    try:
        study.wait_for(lambda: ["sleep", "600"] in commands_below(container.pid))
        cleanup.state_folder().mkdir(mode=0o700)
        known = json.loads(cleanup.serialize_processes([psutil.Process(raylet.pid)] * 2))
        known["processes"][0][1] = -1.0  # no process has this start time, so the driver counts as dead
        (cleanup.state_folder() / "0.json").write_text(json.dumps(known))
        cleanup.end_orphaned_rays()
        assert not psutil.pid_exists(raylet.pid)
        assert commands_below(container.pid) == [["sleep", "600"]]
    finally:
        for process in (raylet, container):
            process.kill()
            process.wait()


def commands_below(pid: int) -> list[list[str]]:
    return [process.cmdline() for process in psutil.Process(pid).children()]
