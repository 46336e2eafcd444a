"""Print a value that only the owner of the cluster knows: the address of its storage, or the hub's token.

    python -m orchestrator.cluster.node.ssm_parameter NAME

The value comes from the environment variable LORA_NAME (machines that exist already, other clouds), else from
AWS's parameter /lora-orchestrator/NAME, decrypted with the rights of the machine's instance profile. Without
both, the output is an empty line, and the cluster works without the value. Nothing is written to a file.

The AWS command line could replace this, but the machines' image lacks it; boto3 comes with this package.
"""

from __future__ import annotations

import os
import sys

PREFIX = "/lora-orchestrator/"


def read_parameter(name: str) -> str:
    """Return the value, or an empty string if there is none.

    Raises:
        OSError: AWS does not answer, or refuses.
    """
    given = os.environ.get("LORA_" + name.upper().replace("-", "_"))
    if given is not None:
        return given
    if not os.environ.get("AWS_DEFAULT_REGION"):  # not on AWS
        return ""
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        response = boto3.client("ssm").get_parameter(Name=PREFIX + name, WithDecryption=True)
    except ClientError as error:
        if error.response.get("Error", {}).get("Code") == "ParameterNotFound":
            return ""
        raise OSError(f"AWS parameter {PREFIX}{name}: {error}") from None
    except BotoCoreError as error:
        raise OSError(f"AWS parameter {PREFIX}{name}: {error}") from None
    return str(
        response["Parameter"]["Value"]
    ).strip()  # a value that was read from a file ends with a newline


def main() -> int:
    """Print the value. Returns the exit code."""
    if len(sys.argv) != 2:
        print("usage: python -m orchestrator.cluster.node.ssm_parameter NAME", file=sys.stderr)
        return 2
    try:
        print(read_parameter(sys.argv[1]))
    except OSError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
