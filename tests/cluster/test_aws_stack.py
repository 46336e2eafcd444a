"""The stack and cluster.yaml together, against moto in this process, and Ray's requests to AWS.

moto enforces no rights and boots no machine, so the tests do not show that the stack's roles are sufficient.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from ray.autoscaler._private.providers import _NODE_PROVIDERS, _get_node_provider
from ray.autoscaler._private.util import hash_launch_conf, prepare_config

ROOT = Path(__file__).parents[2]
STACK = ROOT / "orchestrator/cluster/aws_stack.yaml"
SSH_FROM = "203.0.113.7/32"
TAG = {"Key": "project", "Value": "lora-orchestrator"}


def deploy() -> None:
    """Deploy the stack as docs/cluster.md says."""
    image = boto3.client("ec2").describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
    boto3.client("ssm").put_parameter(Name="/test/image", Value=image, Type="String")
    # moto lacks AWS's public parameters, which name the images.
    body = re.sub(r"Default: /aws/service/\S+", "Default: /test/image", STACK.read_text())
    boto3.client("cloudformation").create_stack(
        StackName="lora-orchestrator",
        TemplateBody=body,
        Capabilities=["CAPABILITY_NAMED_IAM"],
        Parameters=[{"ParameterKey": "SshFrom", "ParameterValue": SSH_FROM}],
        Tags=[TAG],
    )


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("HOME", str(tmp_path))  # Ray writes the private key there
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "none")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "none")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-west-2")
    import moto

    with moto.mock_aws():
        yield


def ingress() -> list[tuple[str, Any]]:
    """Return the open ports of each security group except the default one, with the permitted sources."""
    found = []
    for group in boto3.client("ec2").describe_security_groups()["SecurityGroups"]:
        for rule in group["IpPermissions"] if group["GroupName"] != "default" else ():
            who = [r["CidrIp"] for r in rule["IpRanges"]]
            who += ["itself" for pair in rule["UserIdGroupPairs"] if pair["GroupId"] == group["GroupId"]]
            found.append((f"{rule['IpProtocol']} {rule.get('FromPort', '')}".strip(), who))
    return found


@pytest.mark.cluster
@pytest.mark.usefixtures("aws")
def test_ray_starts_what_cluster_yaml_promises_and_ends_all_of_it() -> None:
    deploy()
    config = prepare_config(yaml.safe_load((ROOT / "cluster.yaml").read_text()))
    ray_aws = _NODE_PROVIDERS["aws"](config["provider"])
    config = ray_aws.bootstrap_config(ray_aws.fillout_available_node_types_resources(config))
    assert config["available_node_types"]["gpu"]["resources"]["GPU"] == 1, "the autoscaler uses it"
    provider = _get_node_provider(config["provider"], config["cluster_name"])
    for name, kind in (("head", "head"), ("gpu", "worker")):
        node_config = dict(config["available_node_types"][name]["node_config"])
        tags = {"ray-node-type": kind, "ray-user-node-type": name, "ray-node-name": f"ray-{name}"}
        tags["ray-launch-config"] = hash_launch_conf(node_config, config["auth"])
        provider.create_node(node_config, tags, 1)

    ec2 = boto3.client("ec2")
    machines = [m for r in ec2.describe_instances()["Reservations"] for m in r["Instances"]]
    head, gpu = sorted(machines, key=lambda machine: machine.get("InstanceLifecycle", ""))
    assert (head["InstanceType"], gpu["InstanceType"]) == ("m7i.xlarge", "g5.xlarge")
    assert (head.get("InstanceLifecycle"), gpu["InstanceLifecycle"]) == (None, "spot")
    vpcs = {v["VpcId"] for v in ec2.describe_vpcs()["Vpcs"] if not v["IsDefault"]}
    assert head["IamInstanceProfile"]["Arn"].endswith("instance-profile/lora-orchestrator-head")
    assert "IamInstanceProfile" not in gpu
    for machine in (head, gpu):
        assert machine["MetadataOptions"]["HttpTokens"] == "required"
        assert TAG in machine["Tags"]
        assert {"Key": "ray-cluster-name", "Value": "lora-orchestrator"} in machine["Tags"]
        assert {machine["VpcId"]} == vpcs, "the stack's network"
    volumes = ec2.describe_volumes()["Volumes"]
    assert sorted(v["Size"] for v in volumes) == [100, 150]
    assert all(v["Encrypted"] and TAG in v["Tags"] for v in volumes)
    assert sorted(ingress()) == [("-1", ["itself"]), ("tcp 22", [SSH_FROM])], "Ray has made no group"

    provider.terminate_nodes(provider.non_terminated_nodes({}))  # as `ray down` does
    states = {m["State"]["Name"] for r in ec2.describe_instances()["Reservations"] for m in r["Instances"]}
    assert states == {"terminated"}
    assert ec2.describe_volumes()["Volumes"] == []


@pytest.mark.cluster
@pytest.mark.usefixtures("aws")
def test_without_the_stack_nothing_is_started() -> None:
    config = prepare_config(yaml.safe_load((ROOT / "cluster.yaml").read_text()))
    with pytest.raises(Exception, match="lora-orchestrator-"):
        _NODE_PROVIDERS["aws"](config["provider"]).bootstrap_config(config)
    assert boto3.client("ec2").describe_instances()["Reservations"] == []
    assert ingress() == []


def test_the_range_for_ssh_has_to_be_given_and_may_not_be_the_world() -> None:
    text = STACK.read_text()
    template = yaml.load(text, _Loader)
    parameter = template["Parameters"]["SshFrom"]
    assert "Default" not in parameter
    allowed = re.compile(parameter["AllowedPattern"])
    assert all(allowed.fullmatch(r) for r in ("203.0.113.7/32", "10.0.0.0/16"))
    assert not any(allowed.fullmatch(r) for r in ("0.0.0.0/0", "10.0.0.0/8", "203.0.113.7", "::/0", ""))


def test_the_nodes_rights_are_narrow() -> None:
    resources = yaml.load(STACK.read_text(), _Loader)["Resources"]
    assert "ManagedPolicyArns" not in json.dumps(resources)
    (role,) = [each for each in resources.values() if each["Type"] == "AWS::IAM::Role"]
    (policy,) = role["Properties"]["Policies"]
    for statement in policy["PolicyDocument"]["Statement"]:
        actions = statement["Action"] if isinstance(statement["Action"], list) else [statement["Action"]]
        reads = all(a.startswith("ec2:Describe") for a in actions)
        assert reads or not any(a.endswith("*") for a in actions), statement
        assert reads or statement["Resource"] != "*" or "Condition" in statement, statement


def test_results_outlive_the_stack() -> None:
    resources = yaml.load(STACK.read_text(), _Loader)["Resources"]
    kept = {name for name, resource in resources.items() if resource.get("DeletionPolicy") == "Retain"}
    assert kept == {"Storage"}


@pytest.mark.cluster
def test_the_stack_passes_cfn_lint() -> None:
    from cfnlint import api  # moto accepts aliases and unknown properties, which AWS refuses

    assert api.lint_file(STACK) == []


class _Loader(yaml.SafeLoader):
    """YAML loader that reads a value with one of CloudFormation's tags, such as !Ref, without the tag."""


def _short(loader: yaml.SafeLoader, _: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.ScalarNode):
        return loader.construct_scalar(node)
    assert isinstance(node, yaml.SequenceNode)
    return loader.construct_sequence(node)


_Loader.add_multi_constructor("!", _short)
