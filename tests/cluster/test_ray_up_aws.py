"""A real `ray up` of cluster.yaml against a simulated AWS.

The test covers the set-up of every node, the rights that its machines use, the spot watcher with a metadata
service, and Ray's own autoscaler. It does not cover the boot of a machine, a real GPU, or refusals by AWS.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import yaml
from aws_box import Account, Request, tags
from events import until
from lab import ROOT, Host, Lab, lacks_postgresql
from stack import TAG, deploy
from test_ray_up import children

from orchestrator.record.schema import Record
from orchestrator.record.store import Store

# The changes to cluster.yaml that the simulation needs.
CHANGES = {
    # The public addresses that moto assigns belong to real machines.
    "  type: aws\n": "  type: aws\n  use_internal_ips: true\n",
    "  ssh_user: ubuntu": "  ssh_user: root",
}
SENT = ("orchestrator", "variants", "experiments")
SENT += ("constraints.txt", "pyproject.toml", "README.md", "LICENSE")
PROJECT = "/root/lora-orchestrator"
"""The user's copy of the project on the lab's own machine."""
# The study ends when the test allows it. The head's environment sets its output folder and its time-out.
STUDY = (
    "python experiments/lr_sensitivity.py --task /shared/held_task.py --model /shared/model --device cpu "
    "--gpus-per-worker 1 --lanes-per-trainer 2 --variants lora --learning-rates 3e-3 1e-2 --seeds 2"
)
HEAD, GPU = "lora-orchestrator-head", "lora-orchestrator-gpu"
NOTICE_SECONDS = 1200.0  # AWS gives 120; a busy machine may take longer to save lanes
LIMIT_SECONDS = 900.0


class Study:
    """A study that runs on the head in tmux, independent of the user's session."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        self._cluster = cluster
        self._out, self._code = (cluster.shared / f"{name}.{kind}" for kind in ("out", "code"))
        self.command = f"> /shared/{name}.out 2>&1; echo $? > /shared/{name}.code"

    def until(self, condition: Callable[[], object]) -> None:
        """Wait until the condition holds. Fails if the study ends first."""
        until(lambda: condition() or self.ended(), self.output, LIMIT_SECONDS)
        assert not self.ended() or condition(), f"it ended first:\n{self.output()}"

    def ended(self) -> bool:
        self._cluster.aws.check()
        return self._code.exists() and self._code.read_text().endswith("\n")

    def wait(self) -> str:
        """Wait for the end with exit code 0. Returns the output."""
        until(self.ended, self.output, LIMIT_SECONDS)
        assert self._code.read_text() == "0\n", self.output()
        return self.output()

    def output(self) -> str:
        return self._out.read_text() if self._out.exists() else "no output"


class Cluster:
    """A cluster from cluster.yaml, and the user's machine."""

    def __init__(self, lab: Lab, aws: Account, shared: Path) -> None:
        self.lab, self.aws, self.shared = lab, aws, shared
        self.store = Store(shared / "results" / "store")
        project = lab.path(PROJECT)
        project.mkdir()
        for name in SENT:
            copied: Callable[..., Any] = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copied(ROOT / name, project / name)
        (project / "cluster.yaml").write_text(adapted((ROOT / "cluster.yaml").read_text()))
        self.run("ray get-auth-token --generate > /dev/null && chmod 600 ~/.ray/auth_token")

    def run(self, command: str) -> str:
        try:
            return self.lab.run(
                "bash", "-c", command, cwd=PROJECT, timeout=LIMIT_SECONDS, **self.aws.environment
            )
        finally:
            self.aws.check()

    def study(self, name: str) -> Study:
        study = Study(self, name)
        command = f"cd ~/lora-orchestrator && {STUDY} {study.command}"
        self.run(f"ray exec cluster.yaml --tmux '{command}'")
        return study

    def training(self) -> set[str]:
        """Return the machines on which a trainer runs."""
        return {i for i, m in self.aws.of_type("gpu").items() if workers(m.host)}

    def half_trained(self) -> set[str]:
        """Return the configurations that have a checkpoint and no record."""
        checkpoints = self.store.checkpoints.glob("*/*/*.safetensors")
        return {path.parts[-3] for path in checkpoints} - set(self.store.states())

    def records(self) -> dict[str, Record]:
        return {record.fingerprint: record for record in self.store.records()}


def adapted(text: str) -> str:
    for old, new in CHANGES.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def workers(host: Host) -> list[int]:
    """Return the ids of the training processes."""
    return [pid for pid, line in host.processes().items() if "ray::RayTrainWorker" in line]


def image(host: Host, kind: str, url: str) -> None:
    """Prepare a host like an administrator's image: with the environment, and with the address of AWS."""
    host.install_environment()
    if kind == "head":
        host.create_postgresql()
    host.path("/etc/profile.d/aws.sh").write_text(f"export AWS_ENDPOINT_URL={url}\n")


@pytest.fixture
def cluster(can_have_a_lab: None, tmp_path: Path, shared: Path) -> Iterator[Cluster]:
    if reason := lacks_postgresql() or ("" if shutil.which("tmux") else "no tmux: apt-get install tmux"):
        pytest.skip(reason)
    folder = tmp_path / "shared"
    shutil.copytree(shared / "model", folder / "model")
    shutil.copy(ROOT / "tests/cluster/held_task.py", folder)
    shutil.copy(ROOT / "tests/execution/prompt_checkpoints.py", folder)  # held_task.py imports it
    # The lab's subnet is the stack's network. It has no access from outside, so the user's machine is in it.
    with Lab("10.77.0.0/16", read_only=[ROOT], shared=folder) as lab:
        aws = Account(lab, lambda host, kind: image(host, kind, aws.url))
        try:
            yield Cluster(lab, aws, folder)
        finally:
            aws.close()


@pytest.mark.cluster
@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_a_cluster_grows_loses_a_spot_machine_and_ends_without_machines(cluster: Cluster) -> None:
    aws = cluster.aws
    deploy(aws.client)
    token = {"Name": "/lora-orchestrator/hub-token", "Type": "SecureString", "Value": "a-token\n"}
    aws.client("ssm").put_parameter(**token)

    cluster.run("PYTHONPATH=. python -m orchestrator.cluster.remote.cluster_file && ray up -y cluster.yaml")
    (head,) = aws.of_type("head").values()
    assert not aws.of_type("gpu"), "no GPU machine starts before a study waits for one"

    study = cluster.study("study")
    study.until(cluster.training)
    first, *_ = cluster.training()
    study.until(lambda: len(cluster.training()) == 2)  # the first machine has no room for the other lanes
    study.until(lambda: len(cluster.half_trained()) == 4)
    taken = aws.machines[first].host
    assert all(environment(pid)["HF_TOKEN"] == "a-token" for pid in workers(taken))
    (cluster.shared / f"slow-{taken.name}").touch()  # the lanes of other machines wait
    take_back(aws, first, study)
    study.until(lambda: len(cluster.training() - {first}) == 2)  # a third machine has replaced the first
    (cluster.shared / "go").touch()
    output = study.wait()
    records = cluster.records()
    assert len(records) == 4
    assert {record.state for record in records.values()} == {"finished"}
    assert any(record.provenance.resumed_from for record in records.values())
    assert count_steps(output) == sum(record.steps for record in records.values()), "no step is repeated"
    assert not re.search(r"trainer-\d+ (died|was lost)", output), "the trainer left before its machine ended"
    assert sorted(children(head.host)) == sorted((fingerprint, "FINISHED") for fingerprint in records)
    assert artifacts(aws), "MLflow's server writes artifacts with the head's rights"

    cluster.run("ray down -y cluster.yaml")
    until(lambda: not aws.machines, lambda: aws.machines, LIMIT_SECONDS)
    assert {i["State"]["Name"] for i in aws.instances()} == {"terminated"}
    assert aws.client("ec2").describe_volumes()["Volumes"] == []
    assert not any("/ray/" in line or "ray::" in line for line in cluster.lab.processes().values())
    check_requested_machines(aws)
    check_requested_actions(aws)


def take_back(aws: Account, instance_id: str, study: Study) -> None:
    """Give notice to a spot machine, and end it once its lanes have left (AWS ends it after two minutes)."""
    host = aws.machines[instance_id].host
    log = host.path("/root/.lora-orchestrator/spot.log")
    aws.give_notice(instance_id, NOTICE_SECONDS)
    study.until(lambda: instance_id not in aws.machines or not workers(host))
    # The watcher's command may end after the last lane has left.
    study.until(lambda: instance_id not in aws.machines or "is drained" in log.read_text())
    aws.take_away(instance_id)


def check_requested_machines(aws: Account) -> None:
    """Check the user's request for the head, and the autoscaler's requests for GPU machines."""
    (group,) = [
        g
        for g in aws.client("ec2").describe_security_groups()["SecurityGroups"]
        if "LoRA" in g["Description"]
    ]
    started = [request for request in aws.requests() if request.action == "RunInstances"]
    assert [aws.keys[request.key] for request in started] == ["user"] + [HEAD] * (len(started) - 1)
    assert len(started) >= 4, "the head and three GPU machines"
    for request in started:
        parameters = request.parameters
        gpu = request is not started[0]
        assert parameters["InstanceType"] == ("g5.xlarge" if gpu else "m7i.xlarge")
        market = {
            k.rpartition(".")[2]: v for k, v in parameters.items() if k.startswith("InstanceMarketOptions")
        }
        spot = {"MarketType": "spot", "SpotInstanceType": "one-time"}
        assert market == (spot | {"InstanceInterruptionBehavior": "terminate"} if gpu else {})
        assert parameters["IamInstanceProfile.Name"] == (GPU if gpu else HEAD)
        assert parameters["SecurityGroupId.1"] == group["GroupId"]
        assert "SecurityGroupId.2" not in parameters
        assert parameters["MetadataOptions.HttpTokens"] == "required"
        kinds = {"instance", "volume"} | ({"spot-instances-request"} if gpu else set())
        given = requested_tags(parameters)
        assert set(given) == kinds
        assert all(tag[TAG["Key"]] == TAG["Value"] for tag in given.values())
        assert given["instance"]["ray-cluster-name"] == "lora-orchestrator"


def requested_tags(parameters: dict[str, str]) -> dict[str, dict[str, str]]:
    """Return the tags of each type of resource, from the parameters of RunInstances."""
    found: dict[str, dict[str, str]] = {}
    for name, key in parameters.items():
        if match := re.fullmatch(r"(TagSpecification\.\d+)\.Tag\.(\d+)\.Key", name):
            kind = parameters[f"{match[1]}.ResourceType"]
            found.setdefault(kind, {})[key] = parameters[f"{match[1]}.Tag.{match[2]}.Value"]
    return found


def check_requested_actions(aws: Account) -> None:
    """Check that the stack's roles allow every request of the machines. moto itself refuses nothing."""
    clusters = {i["InstanceId"]: tags(i)["ray-cluster-name"] for i in aws.instances()}
    seen = set()
    for request in aws.requests():
        profile = aws.keys.get(request.key, "nobody")
        if profile == "user":
            continue
        seen.add((profile, action(request)))
        assert any(
            fnmatchcase(action(request), allowed)
            for statement in statements(aws, profile)
            for allowed in as_list(statement["Action"])
        ), f"{profile}: {request}"
        if request.action in ("CreateTags", "TerminateInstances"):
            ids = [v for k, v in request.parameters.items() if re.match(r"(ResourceId|InstanceId)\.", k)]
            assert ids
            assert {clusters[i] for i in ids} == {"lora-orchestrator"}
    assert {a for p, a in seen if p == GPU} == {"ssm:GetParameter"}
    assert (HEAD, "ec2:RunInstances") in seen


def statements(aws: Account, profile: str) -> list[dict[str, Any]]:
    iam = aws.client("iam")
    (role,) = iam.get_instance_profile(InstanceProfileName=profile)["InstanceProfile"]["Roles"]
    answer = iam.get_role_policy(RoleName=role["RoleName"], PolicyName="cluster")
    document = yaml.safe_load(str(answer["PolicyDocument"]))  # moto returns the document as Python's repr
    found: list[dict[str, Any]] = document["Statement"]
    return found


def as_list(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def action(request: Request) -> str:
    if request.service != "s3":
        return f"{request.service}:{request.action}"
    method, _, url = request.action.partition(" ")
    names = {"PUT": "PutObject", "POST": "PutObject", "DELETE": "DeleteObject"}
    return "s3:" + names.get(method, "ListBucket" if "list-type" in url else "GetObject")


def environment(pid: int) -> dict[str, str]:
    entries = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def count_steps(output: str) -> int:
    found = re.search(r"(\d+) optimizer steps of", output)
    assert found, output
    return int(found[1])


def artifacts(aws: Account) -> list[str]:
    s3 = aws.client("s3")
    (bucket,) = [bucket["Name"] for bucket in s3.list_buckets()["Buckets"]]
    return [item["Key"] for item in s3.list_objects_v2(Bucket=bucket, Prefix="mlflow/").get("Contents", ())]
