"""cluster.yaml: acceptance by Ray's own code, and the promises of docs/cluster.md."""

from __future__ import annotations

import copy
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray._private.runtime_env.packaging import get_excludes_from_ignore_files
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]
FILE = ROOT / "cluster.yaml"
TEXT = FILE.read_text()
CONFIG: dict[str, Any] = yaml.safe_load(TEXT)
NODES = {name: node["node_config"] for name, node in CONFIG["available_node_types"].items()}
START = {
    "head": next(c for c in CONFIG["head_start_ray_commands"] if "ray start" in c),
    "worker": next(c for c in CONFIG["worker_start_ray_commands"] if "ray start" in c),
}
COMMANDS = [c for key, value in CONFIG.items() if key.endswith("_commands") for c in value]


def test_ray_accepts_the_file() -> None:
    prepared = prepare_config(copy.deepcopy(CONFIG))
    validate_config(prepared)
    assert prepared["available_node_types"]["head"]["max_workers"] == 0


def test_gpu_workers_are_spot_and_scale_from_zero_to_a_bound() -> None:
    gpu = CONFIG["available_node_types"]["gpu"]
    assert (gpu["min_workers"], gpu["max_workers"], CONFIG["max_workers"]) == (0, 8, 8)
    spot = NODES["gpu"]["InstanceMarketOptions"]
    assert spot["MarketType"] == "spot"
    assert spot["SpotOptions"]["SpotInstanceType"] == "one-time", "a persistent request outlives `ray down`"
    assert "MaxPrice" not in spot["SpotOptions"], "it would forbid any dearer InstanceType"
    assert "InstanceMarketOptions" not in NODES["head"]
    assert CONFIG["idle_timeout_minutes"] <= 15


def test_terminated_machines_leave_nothing_that_costs() -> None:
    assert CONFIG["provider"]["cache_stopped_nodes"] is False
    assert NODES["head"]["InstanceInitiatedShutdownBehavior"] == "terminate"
    for name, node in NODES.items():
        (disk,) = node["BlockDeviceMappings"]
        assert disk["Ebs"]["DeleteOnTermination"] is True
        kinds = {"instance", "volume"} | ({"spot-instances-request"} if name == "gpu" else set())
        tags = {spec["ResourceType"]: spec["Tags"] for spec in node["TagSpecifications"]}
        assert tags == {kind: [{"Key": "project", "Value": "lora-orchestrator"}] for kind in kinds}


def test_ssh_is_not_open_and_rights_are_narrow() -> None:
    assert "0.0.0.0" not in TEXT
    assert "security_group" not in CONFIG["provider"], "rules named there are added to one for 0.0.0.0/0"
    assert NODES["head"]["IamInstanceProfile"] == {"Name": "lora-orchestrator-head"}
    assert "IamInstanceProfile" not in NODES["gpu"], "it needs no rights"
    for name, node in NODES.items():
        assert node["LaunchTemplate"] == {"LaunchTemplateName": f"lora-orchestrator-{name}"}
        assert node["MetadataOptions"]["HttpTokens"] == "required"


def test_the_dashboard_listens_on_the_loopback_address_only() -> None:
    assert "--dashboard-host=127.0.0.1" in START["head"]


def test_every_node_needs_the_token_which_is_not_in_the_file() -> None:
    for command in START.values():
        assert re.search(r"RAY_AUTH_MODE=token .*ray start", command, re.DOTALL)
    assert any("export RAY_AUTH_MODE=token" in c for c in CONFIG["setup_commands"])
    assert CONFIG["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert CONFIG["setup_commands"][0].startswith("chmod 600 ~/.ray/auth_token;")
    assert not re.search(r"\bhf_\w{10}|AKIA|[0-9a-f]{32}|RAY_AUTH_TOKEN|secret_access", TEXT)
    assert not any(
        re.search(r"cat\s.*auth_token|(?i:\$\{?\w*(token|secret|password|key))", c) for c in COMMANDS
    )


def test_every_node_gets_the_same_versions() -> None:
    installs = [c for c in COMMANDS if "pip install" in c]
    assert len(installs) == 1
    assert installs[0] in CONFIG["setup_commands"]
    assert "-c constraints.txt -e '.[cluster,gpu]'" in installs[0]


def test_workers_watch_for_spot_notices_and_have_time_to_start() -> None:
    assert "python -m orchestrator.cluster.spot" in CONFIG["worker_start_ray_commands"][-1]
    waits = dict(re.findall(r"(\w+_S)=(\d+)", START["head"]))
    assert int(waits["AUTOSCALER_NODE_START_WAIT_S"]) >= 1800
    assert int(waits["RAY_AUTOSCALER_RECONCILE_RAY_INSTALL_STATUS_TIMEOUT_S"]) >= 1800


def test_the_region_and_the_storage_are_marked() -> None:
    assert TEXT.count("# REGION") == 1
    assert f"efs.{CONFIG['provider']['region']}.amazonaws.com" in TEXT


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_bash(command: str) -> None:
    subprocess.run(["bash", "-n", "-c", f"({command})"], check=True)  # Ray puts them in brackets


KEPT_OUT = [
    ".venv/bin/python",
    "results/store/a.json",
    "results-asha/store/a",
    ".git/HEAD",
    "x/__pycache__/a",
]
SENT = [
    "orchestrator/launch/run.py",
    "variants/base.py",
    "experiments/lr_sensitivity.py",
    "constraints.txt",
]


def test_rayignore_keeps_results_and_the_environment_out() -> None:
    (ignored,) = get_excludes_from_ignore_files(ROOT, include_gitignore=False)
    assert [name for name in KEPT_OUT if not ignored(ROOT / name)] == []
    assert [name for name in SENT if ignored(ROOT / name)] == []
