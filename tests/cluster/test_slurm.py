"""docs/deploy/slurm.sh on a real SLURM: a controller and two nodes, hosts in namespaces of this machine."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from as_a_user import records
from hosts import ROOT, Host, Network, missing_requirements, until

PROGRAMS = ("slurmctld", "slurmd", "munged")
CONFIGURATION = """
ClusterName=lab
SlurmctldHost=n1
SlurmUser=root
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
StateSaveLocation=/run/slurm/state
SlurmdSpoolDir=/run/slurm/spool
SlurmctldPidFile=/run/slurm/slurmctld.pid
SlurmdPidFile=/run/slurm/slurmd.pid
SlurmdParameters=config_overrides
MpiDefault=none
NodeName=n1,n2 CPUs=2 RealMemory=4000
PartitionName=all Nodes=ALL Default=YES
"""
STUDY = (
    "python /shared/project/experiments/lr_sensitivity.py --dry-run --variants lora --seeds 1 --steps 12 "
    "--learning-rates 1e-3 1e-2 --study slurm --output /shared/results"
)


@pytest.mark.cluster
@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.skipif(
    any(shutil.which(name, path="/usr/sbin") is None for name in PROGRAMS),
    reason="SLURM is missing: apt-get install slurm-wlm munge",
)
def test_a_batch_job_trains_on_all_its_nodes_and_has_the_exit_code_of_its_command(
    tmp_path: Path,
) -> None:
    if reason := missing_requirements():
        pytest.skip(reason)
    for name in ("orchestrator", "variants", "experiments", "docs/deploy"):
        shutil.copytree(
            ROOT / name, tmp_path / "project" / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    (tmp_path / "home").mkdir(mode=0o700)
    with Network(tmp_path) as network:
        head, other = (started(network.host(name)) for name in ("n1", "n2"))
        head.run("/usr/sbin/slurmctld")
        for host in (head, other):
            host.run("/usr/sbin/slurmd")
        until(lambda: head.run("sinfo", "-hNo", "%t").split() == ["idle", "idle"])

        output = submit(head, STUDY, code=0)
        assert "joined Ray, 2 nodes" in output, output
        trained = records(tmp_path)
        assert [record["state"] for record in trained.values()] == ["finished"] * 2
        submit(head, STUDY, code=0)
        assert records(tmp_path) == trained, "nothing is trained again"
        submit(head, f"{STUDY} --variants lorra", code=2)


def started(host: Host) -> Host:
    """Return the host with SLURM's configuration, munge, and the home folder's part that nodes share."""
    for path in ("/run/slurm/state", "/run/slurm/spool", "/run/munge", "/etc/slurm"):
        host.path(path).mkdir(parents=True, exist_ok=True)
    host.path("/etc/slurm/slurm.conf").write_text(CONFIGURATION)
    host.path("/etc/slurm/cgroup.conf").write_text("CgroupPlugin=disabled\n")
    host.path("/run/munge.key").write_bytes(bytes(1024))
    host.path("/run/munge.key").chmod(0o600)
    host.path("/root/.ray").symlink_to("/shared/home")
    files = (f"--{kind}-file=/run/munge.{kind}" for kind in ("key", "log", "pid", "seed"))
    host.run("/usr/sbin/munged", "--force", *files)
    return host


def submit(host: Host, command: str, code: int) -> str:
    """Run a command as a batch job on both nodes, check the job's exit code, and return its output."""
    job = f"sbatch --parsable --wait --nodes 2 --output job.log project/docs/deploy/slurm.sh {command}"
    result = host.run("bash", "-c", f"{job}; echo code $?", cwd="/shared", PYTHONPATH="/shared/project")
    output = host.path("/shared/job.log").read_text()
    assert result.split()[-1] == str(code), f"{result}\n{output}"
    return output
