"""Deploy the project's stack to moto."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

STACK = Path(__file__).parents[2] / "orchestrator/cluster/aws_stack.yaml"
SSH_FROM = "203.0.113.7/32"
TAG = {"Key": "project", "Value": "lora-orchestrator"}


def deploy(client: Callable[[str], Any], ssh_from: str = SSH_FROM) -> None:
    """Deploy the stack as docs/cluster.md says. `client` returns boto3's client for a service."""
    image = client("ec2").describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
    client("ssm").put_parameter(Name="/test/image", Value=image, Type="String")
    # moto lacks AWS's public parameters, which name the images.
    body = re.sub(r"Default: /aws/service/\S+", "Default: /test/image", STACK.read_text())
    client("cloudformation").create_stack(
        StackName="lora-orchestrator",
        TemplateBody=body,
        Capabilities=["CAPABILITY_NAMED_IAM"],
        Parameters=[{"ParameterKey": "SshFrom", "ParameterValue": ssh_from}],
        Tags=[TAG],
    )
