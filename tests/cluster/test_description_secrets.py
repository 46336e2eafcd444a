"""Search for secrets in the commands of cluster.yaml and in the files that `ray up` derives from it."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from planted import found, planted

ROOT = Path(__file__).parents[2]


def strings(node: Any) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict):
        yield from (text for pair in node.items() for part in pair for text in strings(part))
    elif isinstance(node, Sequence):
        yield from (text for part in node for text in strings(part))


def test_no_command_of_the_cluster_file_has_a_secret_as_a_word() -> None:
    """A variable with a secret is only named inside single quotes; elsewhere bash would insert its value."""
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    commands = [text for key, value in config.items() if key.endswith("_commands") for text in strings(value)]
    assert len(commands) > 15
    for text in strings(config):
        bare = re.sub(r"'[^']*'", "", text)
        assert not re.search(r"(?i)\$\{?\w*(token|secret|password|key)", bare), text
        assert not re.search(r"(?i)\bhf_\w{10}|AKIA[0-9A-Z]{12}|://[^/@:\s]+:[^@\s]+@", text), text
    assert any("${HF_TOKEN" in text for text in commands), "commands with secrets are among those searched"


def test_the_shell_environment_of_a_node_refers_to_the_token_without_its_value(tmp_path: Path) -> None:
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    value = planted("x")
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"], "HF_TOKEN": value["x"]}
    for command in (c for c in config["setup_commands"] if "lora_env" in c and "storage.sh" not in c):
        subprocess.run(["bash", "-c", command], check=True, env=environment)
    assert found(value, tmp_path) == []
    shell = subprocess.run(
        ["bash", "-c", ". ~/.bashrc; printenv HF_TOKEN; set | grep -c ^hub_token"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert shell.stdout.split() == [value["x"], "0"]
    assert (tmp_path / ".lora_env").read_text().count("HF_TOKEN") == 2


@pytest.mark.cluster
def test_the_files_of_ray_up_have_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import boto3
    import moto
    from ray.autoscaler._private import commands
    from stack import deploy

    names = ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "RAY_AUTH_TOKEN")
    values = planted(*names, "the token's file")
    for name in names:
        monkeypatch.setenv(name, values[name])
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAnobody")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-west-2")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    for folder in ("tmp", "home/.ray", "head"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "home/.ray/auth_token").write_text(values["the token's file"])
    with moto.mock_aws():
        deploy(boto3.client)
        config = commands._bootstrap_config(yaml.safe_load((ROOT / "cluster.yaml").read_text()))
    cached = list((tmp_path / "tmp").glob("ray-config-*"))
    assert len(cached) == 1, "Ray keeps the description that it has made of ours"
    (key,) = (tmp_path / "home/.ssh").glob("*.pem")
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    values["the key pair's private half"] = key.read_text().splitlines()[1]
    (tmp_path / "head/ray_bootstrap_config.yaml").write_text(yaml.safe_dump(config))  # as on a real head
    hits = found(values, tmp_path)
    assert [hit.partition(":")[0] for hit in hits] == ["the key pair's private half", "the token's file"]
    assert {Path(hit.partition(": ")[2]) for hit in hits} == {key, tmp_path / "home/.ray/auth_token"}
