"""Read a cluster file (cluster.yaml), and refuse mistakes that would fail only after a machine has started.

    python -m orchestrator.cluster.remote.cluster_file [cluster.yaml]

Ray's own check finds unknown keys and some wrong sizes. It does not find a misspelt key of `provider` or
`node_config`, a max_workers below min_workers, or a missing path under `file_mounts`: `ray up` then fails and
leaves the head running. Without a security group in the file, Ray creates one that admits SSH from every
address.
"""

from __future__ import annotations

import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from orchestrator.util.command import main
from orchestrator.util.errors import UsageError, suggest_nearest
from orchestrator.util.extras import install_hint

_PROVIDER_KEYS = (
    *("key_pair", "aws_credentials", "disable_launch_config_check", "foreground_node_launch"),
    *("use_external_head_ip", "worker_liveness_check"),
)
"""Keys of a provider that Ray 2.60 reads on AWS and that its schema lacks."""
_SECURITY_GROUP_KEYS = ("SecurityGroupIds", "LaunchTemplate", "NetworkInterfaces")


def read_cluster_file(path: Path) -> dict[str, Any]:
    """Return the content of a cluster file with Ray's defaults filled in.

    Args:
        path: The file. Paths in it are relative to its folder, in which `ray up` is run.

    Raises:
        UsageError: The file cannot be read, or `ray up` would fail with it.
    """
    import yaml

    try:
        config = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}; name the file that `ray up` takes") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: is not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(config, dict) or not isinstance(config.get("provider"), dict):
        raise UsageError(f"{path}: must have a section `provider` with a type, as cluster.yaml has")
    _check_keys(path, config)
    for name, node_type in config.get("available_node_types", {}).items():
        _check_worker_counts(path, name, node_type)
    prepared = _apply_ray_defaults(path, config)
    _check_mounts(path, prepared["file_mounts"])
    if config["provider"].get("type") == "aws":
        for name, node_type in prepared["available_node_types"].items():
            _check_aws_node(path, name, node_type["node_config"])
    return prepared


def _check_keys(path: Path, config: dict[str, Any]) -> None:
    """Check the keys by Ray's schema: with wrong ones, Ray's code fails with other errors."""
    import jsonschema
    import ray.autoscaler

    schema = json.loads(Path(ray.autoscaler.__file__).with_name("ray-schema.json").read_text())
    if config["provider"].get("type") == "aws":  # the schema allows every key here, for other providers
        provider = schema["properties"]["provider"]
        provider["properties"] |= {key: {} for key in _PROVIDER_KEYS}
        provider["additionalProperties"] = False
    try:
        jsonschema.validate(config, schema)
    except jsonschema.ValidationError as error:
        location = ".".join(str(part) for part in error.absolute_path) or "top level"
        message = error.message.splitlines()[0]
        if error.validator == "additionalProperties":
            known = error.schema["properties"]
            wrong = next(key for key in error.instance if key not in known)
            message = f"{wrong!r} is no key of Ray's here. {suggest_nearest(wrong, known)}"
        raise UsageError(f"{path}, {location}: {message}") from None


def _check_worker_counts(path: Path, name: str, node_type: dict[str, Any]) -> None:
    min_workers, max_workers = node_type.get("min_workers", 0), node_type.get("max_workers")
    if min_workers < 0 or (max_workers is not None and max_workers < min_workers):
        raise UsageError(
            f"{path}, {name}: min_workers {min_workers}, max_workers {max_workers}: "
            "must be 0 or more, and max_workers not below min_workers."
        )


def _apply_ray_defaults(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Prepare and validate the configuration as `ray up` does before it starts a machine."""
    from orchestrator.execution.ray.private import prepare_cluster_config

    quiet = io.StringIO()  # Ray warns of mounted files even if Docker, which they concern, is not used
    try:
        with redirect_stdout(quiet), redirect_stderr(quiet):
            prepared = prepare_cluster_config(config)
    except (ValueError, RuntimeError, NotImplementedError, KeyError, ImportError) as error:
        raise UsageError(f"{path}: {' '.join(str(error).split())}") from None
    return prepared


def _check_aws_node(path: Path, name: str, node_config: dict[str, Any]) -> None:
    """Check the request that Ray will send to AWS for nodes of this type."""
    if not any(key in node_config for key in _SECURITY_GROUP_KEYS):
        raise UsageError(
            f"{path}, {name}: no security group is named, and Ray's own admits SSH from every address; "
            f"set one of {', '.join(_SECURITY_GROUP_KEYS)} (orchestrator/cluster/aws_stack.yaml makes a "
            "launch template)."
        )
    if "InstanceType" not in node_config:
        raise UsageError(f"{path}, {name}: node_config has no InstanceType; name one, for example g5.xlarge.")
    try:
        import botocore.session
        from botocore.validate import ParamValidator
    except ImportError:
        fix = install_hint("cluster")
        raise UsageError(f"{path}: `ray up` needs boto3 for AWS, which is not installed: {fix}") from None
    ec2 = botocore.session.get_session().get_service_model("ec2")
    request = {key: value for key, value in node_config.items() if key != "SubnetIds"}  # a key of Ray's
    report = ParamValidator().validate(
        {**request, "MinCount": 1, "MaxCount": 1}, ec2.operation_model("RunInstances").input_shape
    )
    if report.has_errors():
        message = report.generate_report().splitlines()[0].split(", must be one of")[0]
        raise UsageError(f"{path}, {name}: AWS would refuse its node_config: {message}.")


def _check_mounts(path: Path, mounts: dict[str, str]) -> None:
    """Check that every local path exists."""
    for remote_path, local_path in mounts.items():
        if not (path.resolve().parent / Path(local_path).expanduser()).exists():
            advice = (
                "create it: ray get-auth-token --generate"
                if "auth_token" in local_path
                else "name a path that exists"
            )
            raise UsageError(
                f"{path}, file_mounts: {local_path!r} (for {remote_path}) does not exist; {advice}."
            )


def _print_summary() -> int:
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "cluster.yaml")
    config = read_cluster_file(path)
    types = config["available_node_types"].items()
    workers = ", ".join(
        f"{n}: {t['min_workers']} to {t['max_workers']}" for n, t in types if t["max_workers"]
    )
    print(f"{path}: {config['cluster_name']} on {config['provider']['type']}, {workers}")
    return 0


if __name__ == "__main__":
    main(_print_summary)
