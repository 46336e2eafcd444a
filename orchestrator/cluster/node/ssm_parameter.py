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

from orchestrator.util.command import main
from orchestrator.util.errors import StudyError

PREFIX = "/lora-orchestrator/"


def read_parameter(name: str) -> str:
    """Return the value, or an empty string if there is none.

    Raises:
        StudyError: AWS does not answer, or refuses.
    """
    value = os.environ.get("LORA_" + name.upper().replace("-", "_"))
    is_on_aws = bool(os.environ.get("AWS_DEFAULT_REGION"))
    if value is not None or not is_on_aws:
        return value or ""
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        response = boto3.client("ssm").get_parameter(Name=PREFIX + name, WithDecryption=True)
    except (BotoCoreError, ClientError) as error:
        if isinstance(error, ClientError) and error.response["Error"]["Code"] == "ParameterNotFound":
            return ""
        raise StudyError(f"AWS parameter {PREFIX}{name}: {error}") from None
    return str(response["Parameter"]["Value"]).strip()  # a value read from a file ends with a newline


if __name__ == "__main__":
    main(lambda: print(read_parameter(sys.argv[1])))
