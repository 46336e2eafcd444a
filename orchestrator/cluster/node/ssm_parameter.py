"""Prints one value of this cluster that only its owner knows: where its storage is, the hub's token.

    python -m orchestrator.cluster.node.ssm_parameter NAME

The value is the environment's LORA_NAME where that is set (an existing machine, another cloud), else AWS's
parameter /lora-orchestrator/NAME, decrypted with the rights of the machine's instance profile. Prints an
empty line when there is neither: then the cluster does without. Nothing is written: a token is in no file.
"""

from __future__ import annotations

import os
import sys

PREFIX = "/lora-orchestrator/"


def read_parameter(name: str) -> str:
    """The value, or an empty string. Raises OSError when AWS cannot be asked."""
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
    return str(response["Parameter"]["Value"]).strip()  # of a file that was put there: its newline


def main() -> int:
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
