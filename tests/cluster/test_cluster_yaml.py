"""cluster.yaml: acceptance by Ray's own code, refusal of mistakes, and the promises of docs/cluster.md."""

from __future__ import annotations

import copy
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import ValidationError
from ray._private.runtime_env.packaging import get_excludes_from_ignore_files
from ray.autoscaler._private.util import prepare_config, validate_config

from orchestrator.cluster.remote import cluster_file
from orchestrator.util.errors import UsageError

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


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a path for a changed cluster file, beside links to the project's files. HOME has a token."""
    for local in CONFIG["file_mounts"].values():
        if not local.startswith("~"):
            (tmp_path / local).symlink_to(ROOT / local)
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("no real token")
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path / "cluster.yaml"


def changed(*path: str, value: Any) -> dict[str, Any]:
    config = copy.deepcopy(CONFIG)
    place = config
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return config


# -- checks by Ray


def test_ray_accepts_the_file() -> None:
    prepared = prepare_config(copy.deepcopy(CONFIG))
    validate_config(prepared)
    assert prepared["available_node_types"]["head"]["max_workers"] == 0


RAY_REFUSES = [
    (("idle_timeout_minute",), 5, "Did you mean 'idle_timeout_minutes'?"),
    (("available_node_types", "gpu", "max_worker"), 5, "Did you mean 'max_workers'?"),
    (("auth", "ssh_usr"), "ubuntu", "Did you mean 'ssh_user'?"),
    (("available_node_types", "gpu", "min_workers"), 9, "global `max_workers` is smaller"),
    (("max_workers",), -1, "minimum of 0"),
    (("idle_timeout_minutes",), -1, "minimum of 0"),
    (("head_node_type",), "haed", "must be one of `available_node_types`"),
    (("setup_commands",), "pip install x", "is not of type 'array'"),
]


@pytest.mark.parametrize(("path", "value", "words"), RAY_REFUSES)
def test_ray_refuses_mistakes(written: Path, path: tuple[str, ...], value: Any, words: str) -> None:
    config = changed(*path, value=value)
    if path[-1] == "min_workers":
        config["available_node_types"]["gpu"]["max_workers"] = 9  # so that our own check passes
    with pytest.raises((ValidationError, ValueError, TypeError)):
        validate_config(prepare_config(copy.deepcopy(config)))
    refused(written, config, words)


# -- mistakes that Ray accepts and that would show only when machines run, or never

OURS = [
    (("provider", "cache_stoped_nodes"), False, "Did you mean 'cache_stopped_nodes'?"),
    (("available_node_types", "gpu", "max_workers"), -1, "not below min_workers"),
    (("available_node_types", "gpu", "min_workers"), -1, "must be 0 or more"),
    (("available_node_types", "gpu", "node_config", "LaunchTemplate"), None, "AWS would refuse"),
    (("available_node_types", "gpu", "node_config", "InstanceTyp"), "g5.xlarge", 'input: "InstanceTyp"'),
    (
        ("available_node_types", "gpu", "node_config", "MetadataOptions"),
        {"HttpToken": "x"},
        "MetadataOptions",
    ),
    (("file_mounts", "~/data"), "no/such/folder", "does not exist"),
]


@pytest.mark.parametrize(("path", "value", "words"), OURS)
def test_mistakes_that_ray_accepts_are_refused(
    written: Path, path: tuple[str, ...], value: Any, words: str
) -> None:
    config = changed(*path, value=value)
    validate_config(prepare_config(copy.deepcopy(config)))
    refused(written, config, words)


def test_a_security_group_must_be_named(written: Path) -> None:
    config = copy.deepcopy(CONFIG)
    del config["available_node_types"]["gpu"]["node_config"]["LaunchTemplate"]
    validate_config(prepare_config(copy.deepcopy(config)))
    refused(written, config, "admits SSH from every address")


def test_a_missing_token_is_named_before_a_machine_runs(written: Path) -> None:
    (written.parent / ".ray" / "auth_token").unlink()
    refused(written, CONFIG, "ray get-auth-token --generate")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", "is not YAML"),
        ("", "`provider`"),
        ("provider: aws", "`provider`"),
        ("{cluster_name: x, provider: {type: azzure}}", "azzure"),
    ],
)
def test_a_file_that_is_no_cluster_file_is_refused_in_one_line(written: Path, text: str, words: str) -> None:
    written.write_text(text)
    with pytest.raises(UsageError, match=words) as refusal:
        cluster_file.read_cluster_file(written)
    assert "\n" not in str(refusal.value)


def test_a_missing_file_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cluster\.yml: No such file"):
        cluster_file.read_cluster_file(tmp_path / "cluster.yml")


def refused(file: Path, config: dict[str, Any], words: str) -> None:
    file.write_text(yaml.safe_dump(config))
    with pytest.raises(UsageError, match=re.escape(words)) as refusal:
        cluster_file.read_cluster_file(file)
    assert "\n" not in str(refusal.value)


def test_the_file_itself_is_accepted(written: Path) -> None:
    written.write_text(TEXT)
    assert cluster_file.read_cluster_file(written)["cluster_name"] == "lora-orchestrator"


# -- promises


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
    for name, node in NODES.items():
        assert node["LaunchTemplate"] == {"LaunchTemplateName": f"lora-orchestrator-{name}"}
        assert node["IamInstanceProfile"] == {"Name": f"lora-orchestrator-{name}"}
        assert node["MetadataOptions"]["HttpTokens"] == "required"


def test_dashboard_and_mlflow_listen_on_the_loopback_address_only() -> None:
    assert "--dashboard-host=127.0.0.1" in START["head"]
    server = (ROOT / "orchestrator/cluster/node/mlflow_server.sh").read_text()
    assert "--host 127.0.0.1" in server
    assert any("supervisor mlflow --health http://127.0.0.1:" in c for c in CONFIG["head_start_ray_commands"])


def test_every_node_needs_the_token_which_is_not_in_the_file() -> None:
    for command in START.values():
        assert re.search(r"RAY_AUTH_MODE=token .*ray start", command, re.DOTALL)
    assert any("export RAY_AUTH_MODE=token" in c for c in CONFIG["setup_commands"])
    assert CONFIG["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert CONFIG["setup_commands"][0] == "chmod 600 ~/.ray/auth_token"
    assert not re.search(r"\bhf_\w{10}|AKIA|[0-9a-f]{32}|RAY_AUTH_TOKEN|secret_access", TEXT)
    assert not any(re.search(r"cat\s.*auth_token|HF_TOKEN=\w", c) for c in COMMANDS)


def test_every_node_gets_the_same_versions() -> None:
    installs = [c for c in COMMANDS if "pip install" in c]
    assert len(installs) == 1
    assert installs[0] in CONFIG["setup_commands"]
    assert "-c constraints.txt -e '.[cluster,gpu]'" in installs[0]
    mounted = set(CONFIG["file_mounts"].values())
    assert {"constraints.txt", "pyproject.toml", "orchestrator", "variants", "experiments"} <= mounted


def test_workers_have_a_watchdog_and_time_to_start() -> None:
    assert CONFIG["worker_start_ray_commands"][-1].endswith(
        "-- python -m orchestrator.cluster.node.spot_watcher"
    )
    waits = dict(re.findall(r"(\w+_S)=(\d+)", START["head"]))
    assert int(waits["AUTOSCALER_NODE_START_WAIT_S"]) >= 1800
    assert int(waits["RAY_AUTOSCALER_RECONCILE_RAY_INSTALL_STATUS_TIMEOUT_S"]) >= 1800


def test_the_region_stands_in_two_marked_lines() -> None:
    assert f"AWS_DEFAULT_REGION={CONFIG['provider']['region']}'" in TEXT
    assert TEXT.count("# REGION") == 2


@pytest.mark.parametrize(
    "script", sorted(ROOT.glob("orchestrator/cluster/node/*.sh")), ids=lambda path: path.name
)
def test_scripts_are_bash_and_used(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    used_by = COMMANDS + [other.read_text() for other in script.parent.glob("*.sh")]
    assert any(f"node/{script.name}" in text or f'/{script.name}"' in text for text in used_by)


# -- files that are sent to nodes


def test_no_mount_holds_results_or_the_environment() -> None:
    assert "." not in CONFIG["file_mounts"].values(), "Ray reads every byte below it, .venv too"
    for local in CONFIG["file_mounts"].values():
        assert local.startswith("~/.ray/") or (ROOT / local).exists()


KEPT_OUT = [
    ".venv/bin/python",
    "results/store/a.json",
    "results-asha/store/a",
    ".git/HEAD",
    "x/__pycache__/a",
]
SENT = [
    "orchestrator/launch/run_study.py",
    "variants/base.py",
    "experiments/lr_sensitivity.py",
    "constraints.txt",
]


def test_rayignore_keeps_results_and_the_environment_out() -> None:
    (ignored,) = get_excludes_from_ignore_files(ROOT, include_gitignore=False)
    assert [name for name in KEPT_OUT if not ignored(ROOT / name)] == []
    assert [name for name in SENT if ignored(ROOT / name)] == []
