"""The lab itself: its hosts are separate like machines and leave nothing behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from events import LIMIT_SECONDS
from lab import ROOT, VENV, CommandError, Lab

pytestmark = pytest.mark.cluster
SSH = ("-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null")


def ssh(lab: Lab, address: str, command: str, seconds: int = 120) -> str:
    """Return the output of a command on a host. `seconds` limits the attempt to connect."""
    limit = ("-o", f"ConnectTimeout={seconds}")
    return lab.run("ssh", "-q", "-tt", "-i", lab.KEY, *SSH, *limit, f"root@{address}", command)


def test_hosts_share_only_the_network_and_the_shared_folder(lab: Lab, tmp_path: Path) -> None:
    one = lab.host("one", "10.77.0.2")
    two = lab.host("two", "10.77.0.3", empty=["/var/lib"])
    for folder in ("/tmp", "/root", "/etc", "/dev/shm"):
        one.path(f"{folder}/of-one").touch()
        assert not two.path(f"{folder}/of-one").exists()
        assert not Path(folder, "of-one").exists()
    assert not list(two.path("/var/lib").iterdir())
    assert ssh(lab, "one", "hostname; mountpoint -q /shared; echo $?").split() == ["one", "0"]
    one.path("/shared/word").write_text("from one")
    assert two.path("/shared/word").read_text() == (tmp_path / "shared" / "word").read_text() == "from one"
    one.run("sh", "-c", "sleep 1000 &")
    assert any("sleep 1000" in line for line in one.processes().values())
    assert not any("sleep" in line for line in two.processes().values())
    assert "sleep" not in lab.run("ps", "-e")
    with pytest.raises(CommandError, match="Network is unreachable"):
        lab.run("bash", "-c", "echo > /dev/tcp/192.0.2.1/80")
    with pytest.raises(CommandError, match="Read-only"):
        one.run("touch", str(VENV / "x"))
    two.install_environment()
    found = two.run("/root/venv/bin/python", "-c", "import sys, ray; print(sys.prefix)")
    assert found == "/root/venv\n"
    assert not two.path(str(ROOT / "orchestrator")).exists(), "a host runs the sources that were sent to it"
    assert lab.path(str(ROOT / "cluster.yaml")).exists()


def test_a_host_is_disconnected_reconnected_and_replaced(lab: Lab) -> None:
    host = lab.host("one", "10.77.0.2")
    lab.disconnect(host)
    with pytest.raises(CommandError):
        ssh(lab, "one", "true", seconds=1)
    assert host.processes(), "it keeps running"
    lab.reconnect(host)
    assert ssh(lab, "one", "echo there").strip() == "there"
    host.path("/root/old").touch()
    lab.kill_host(host)
    assert not host.survivors()
    again = lab.host("new", "10.77.0.2")
    assert ssh(lab, "10.77.0.2", "hostname").strip() == "new"
    assert not again.path("/root/old").exists()


def test_a_lab_may_have_another_subnet(can_have_a_lab: None) -> None:
    with Lab("172.31.0.0/16") as lab:
        lab.host("one", "172.31.200.7")
        assert ssh(lab, "172.31.200.7", "echo there").strip() == "there"


def test_a_lab_ends_with_the_process_that_has_made_it(can_have_a_lab: None) -> None:
    script = "import lab; it = lab.Lab(); one = it.host('one', '10.77.0.2'); "
    script += (
        "one.run('sh', '-c', 'sleep 1000 &'); print(it.pid, one.pid, *one.processes(), flush=True); input()"
    )
    maker = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert maker.stdout is not None
    processes = [psutil.Process(int(pid)) for pid in maker.stdout.readline().split()]
    assert any("sleep 1000" in " ".join(process.cmdline()) for process in processes[2:])
    maker.kill()
    maker.communicate()
    assert not psutil.wait_procs(processes, timeout=LIMIT_SECONDS)[1]
