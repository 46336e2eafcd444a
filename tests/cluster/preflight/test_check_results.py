"""Conclusions of the checks, and their measurements of faults that a test can cause through the kernel."""

from __future__ import annotations

import re
from pathlib import Path

import odd
import pytest

from orchestrator.cluster.preflight import availability, capacity, nodes, shared_storage
from orchestrator.cluster.preflight.check import PreflightCheck
from orchestrator.cluster.preflight.check_result import UndeterminedError, shorten_list
from orchestrator.cluster.preflight.node_info import GpuState, NodeInfo, look_for_gpus
from orchestrator.execution.ray.autoscaler import NodeType, parse_node_types
from orchestrator.execution.ray.runtime import Cluster, Node
from orchestrator.study.options import StudyOptions
from orchestrator.util import timeouts
from orchestrator.util.errors import UsageError

GIB = 2**30
STORE = Path("/shared/store")
needs_mounts = pytest.mark.skipif(not odd.can_mount(), reason="needs root and mount namespaces")
WRITE_CHECK = """
import sys
from pathlib import Path
from orchestrator.cluster.preflight.shared_storage import write_node_file
print(write_node_file(Path(sys.argv[1]), "node-0"))
"""
DISK_CHECK = """
import shutil, sys
from pathlib import Path
from orchestrator.cluster.preflight.nodes import check_free_space
from orchestrator.cluster.preflight.node_info import collect_node_info
store = Path(sys.argv[1])
try:
    print(check_free_space(store, shutil.disk_usage(store).free, {"node": collect_node_info()}))
except Exception as error:
    print(type(error).__name__, error)
"""


def fail(error: Exception) -> str:
    raise error


def test_a_line_has_status_name_and_text_and_lists_are_shortened(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "a-secret-token")
    checks = PreflightCheck(StudyOptions(), (), ())
    assert checks.report("disk", lambda: "room")
    assert checks.report("nodes", lambda: fail(UndeterminedError("none so far")))
    assert checks.report("answers", lambda: "")
    assert checks.passed
    assert not checks.report("versions", lambda: fail(UsageError("no a-secret-token")))
    assert not checks.passed
    assert capsys.readouterr().out.splitlines() == [
        "ok      disk      room",
        "later   nodes     none so far",
        "FAILED  versions  no ***",
    ]
    assert shorten_list(["a", "b", "c"]) == "a, b, c"
    assert shorten_list(["a", "b", "c", "d", "e"], "; ") == "a; b; c and 2 more"


def test_different_and_missing_versions_are_failures() -> None:
    here = {"python": "3.12.1", "torch": "2.9.0"}
    assert "on 2 nodes" in nodes.check_versions(here, {"10.0.0.1": here, "10.0.0.2": dict(here)})
    with pytest.raises(UsageError) as refusal:
        nodes.check_versions(here, {"10.0.0.1": here, "10.0.0.2": {"python": "3.11.7"}})
    for words in (
        "python on 10.0.0.2 is 3.11.7, here 3.12.1",
        "torch on 10.0.0.2 is none, here 2.9.0",
        "constraints.txt",
    ):
        assert words in str(refusal.value)


@pytest.mark.parametrize(
    ("ticks", "wrong"),
    [
        ([(100.0, 100.5, 101.0)], ""),
        ([(100.0, 102.9, 101.0)], ""),  # the offset is at least 1.9 s; 2 s are allowed
        ([(100.0, 103.5, 101.0)], "10.0.0.1 by +2.5 s"),
        ([(100.0, 97.0, 101.0)], "10.0.0.1 by -3.0 s"),
        ([(100.0, 107.0, 108.0), (110.0, 117.0, 110.1)], ""),  # a slow answer proves nothing
        ([(100.0, 107.0, 100.1), (110.0, 117.0, 110.1)], "10.0.0.1 by +6.9 s"),
    ],
)
def test_a_clock_is_wrong_by_what_the_delay_of_the_answer_cannot_explain(
    ticks: list[tuple[float, float, float]], wrong: str
) -> None:
    samples = {"10.0.0.1": [nodes.ClockSample(*tick) for tick in ticks], "10.0.0.2": []}
    if not wrong:
        assert "on 1 node" in nodes.check_clocks(samples)
        return
    with pytest.raises(UsageError, match=f"{re.escape(wrong)}.*chrony"):
        nodes.check_clocks(samples)


def test_storage_names_the_node_and_the_files_that_it_does_not_see(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fine = {"10.0.0.1": "", "10.0.0.2": ""}
    seen: dict[str, list[str]] = {"this machine": [], "10.0.0.1": []}
    assert "from 2 nodes" in shared_storage.summarize_storage(STORE, fine, seen)
    for faults, unseen, words in (
        (fine | {"10.0.0.2": "does not see it"}, seen, "10.0.0.2 does not see it;"),
        (fine, {"this machine": ["10.0.0.2"]}, "this machine does not see what 10.0.0.2 wrote;"),
        (fine, {"10.0.0.1": ["10.0.0.2"]}, "10.0.0.1 does not see what 10.0.0.2 wrote;"),
    ):
        with pytest.raises(UsageError, match=f"{STORE}: {words} every node must"):
            shared_storage.summarize_storage(STORE, faults, unseen)
    monkeypatch.setattr(timeouts, "STORAGE_VISIBILITY_SECONDS", 0.0)
    with shared_storage.create_check_folder(tmp_path) as folder:
        assert shared_storage.write_node_file(folder, "node-0") == ""
        assert shared_storage.missing_files(folder, ["node-0", "node-1"]) == ["node-1"]
        (folder / "node-0").write_text("another's")
        assert shared_storage.missing_files(folder, ["node-0"]) == ["node-0"]
    assert not list(tmp_path.iterdir())
    assert shared_storage.write_node_file(tmp_path, "node-0") == "does not see it"


@pytest.mark.cluster
@needs_mounts
def test_a_store_that_a_node_cannot_write_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / shared_storage.DRIVER_FILE).write_text(shared_storage.DRIVER_FILE)
    readonly = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'
    command = ["unshare", "-m", "bash", "-c", readonly, str(tmp_path)]
    fault = odd.output_of([*command, *odd.python(WRITE_CHECK, str(tmp_path))])
    assert fault == "cannot write to it (Read-only file system)\n"


def test_a_store_without_hard_links_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / shared_storage.DRIVER_FILE).write_text(shared_storage.DRIVER_FILE)
    fault = odd.output_of(odd.python(odd.LINKLESS + WRITE_CHECK, str(tmp_path)))
    assert fault == "cannot make hard links in it (Operation not permitted)\n"


@pytest.mark.cluster
@needs_mounts
def test_a_nearly_full_disk_is_a_failure(tmp_path: Path) -> None:
    """A file system of 16 MB holds first the store, then the temporary files."""
    small, large = tmp_path / "small", tmp_path / "large"
    small.mkdir()
    large.mkdir()
    store = odd.output_of(odd.mounted(small, "size=16m", odd.python(DISK_CHECK, str(small))))
    assert f"UsageError {small} has 0.0 GiB free: at least 1 GiB" in store
    temporary = ["env", f"TMPDIR={small}", *odd.python(DISK_CHECK, str(large))]
    node = odd.output_of(odd.mounted(small, "size=16m", temporary))
    assert f"UsageError {small} on node has 0.0 GiB free: at least 1 GiB" in node


def test_disks_with_free_space_are_ok() -> None:
    text = nodes.check_free_space(STORE, 9 * GIB, {"10.0.0.1": NodeInfo({}, 5 * GIB, "/tmp")})
    assert text == "9 GiB free for the store, 5 GiB or more on every disk"


FILE = {
    "max_workers": 3,
    "head_node_type": "head",
    "available_node_types": {
        "head": {"resources": {"CPU": 4}, "max_workers": 0},
        "gpu": {"resources": {"CPU": 8, "GPU": 1}, "max_workers": 8},
        "never": {"resources": {"CPU": 8}, "max_workers": 0},
    },
}
STARTABLE_GPUS = parse_node_types(FILE)
HEAD = Cluster((Node(4, 0, 16.0 * GIB),), local=False)
TWO = Cluster((*HEAD.nodes, Node(8, 1, 32.0 * GIB), Node(8, 1, 32.0 * GIB)), local=False)


def test_the_startable_nodes_of_a_cluster_file() -> None:
    assert parse_node_types(FILE) == (NodeType("gpu", 3, Node(8, 1, 0)),)
    assert parse_node_types({"provider": {"type": "local"}}) == ()
    silent = parse_node_types({"max_workers": 2, "available_node_types": {"any": {"max_workers": 2}}})
    assert silent == (NodeType("any", 2, None),)


@pytest.mark.parametrize(
    ("cluster", "options", "startable", "status", "words"),
    [
        (TWO, {}, (), "ok", "3 nodes, 20 CPUs, 2 GPUs: room for 2 trainers"),
        (TWO, {"trainers": 3}, (), "ok", "room for 2 of 3 trainers; the others wait"),
        (TWO, {"trainers": 5}, STARTABLE_GPUS, "later", "may start 3 gpu, then room for 5 of 5 trainers"),
        (
            HEAD,
            {"gpus_per_worker": 1.0},
            STARTABLE_GPUS,
            "later",
            "may start 3 gpu, then room for 1 of 1 trainers",
        ),
        (
            HEAD,
            {"gpus_per_worker": 1.0},
            (NodeType("any", 2, None),),
            "later",
            "may start 2 any; a study waits 300 s",
        ),
        (HEAD, {"gpus_per_worker": 1.0}, (), "FAILED", "no autoscaler is known here"),
        (
            HEAD,
            {"gpus_per_worker": 1.0, "workers_per_trainer": 4},
            STARTABLE_GPUS,
            "FAILED",
            "none that the autoscaler may start has",
        ),
        (HEAD, {}, STARTABLE_GPUS, "FAILED", "would train on CPUs; add --gpus-per-worker 1"),
        (Cluster(HEAD.nodes), {"trainers": 9}, (), "FAILED", "--trainers 9: there is room for 4"),
    ],
)
def test_room_for_trainers_now_or_later(
    cluster: Cluster, options: dict[str, float], startable: tuple[NodeType, ...], status: str, words: str
) -> None:
    study = StudyOptions(**options)  # type: ignore[arg-type]  # mixed values
    if status == "ok":
        text = capacity.check_capacity(cluster, study, startable)
    else:
        with pytest.raises(UndeterminedError if status == "later" else UsageError) as raised:
            capacity.check_capacity(cluster, study, startable)
        text = str(raised.value)
    assert words in text


def test_a_node_that_cannot_read_the_model_is_a_failure() -> None:
    assert "from 2 nodes" in availability.check_availability({"10.0.0.1": "", "10.0.0.2": ""})
    with pytest.raises(UsageError, match=r"^from 10\.0\.0\.2: Model 'x' is not in /x$"):
        availability.check_availability({"10.0.0.1": "", "10.0.0.2": "Model 'x' is not in /x"})


def test_gpus_that_torch_cannot_use_are_named_with_the_reason() -> None:
    good = GpuState("NVIDIA driver 535.183.01, torch 2.13.0+cu130", "")  # with the package cuda-compat-13
    assert nodes.check_drivers({"head": None}) == "", "a head without a GPU"
    assert nodes.check_drivers({"head": None, "10.0.0.1": good}) == f"{good.versions} on 1 node"
    old = GpuState(
        "NVIDIA driver 570.86.15, torch 2.13.0+cu130", "CUDA initialization: The NVIDIA driver is old"
    )
    with pytest.raises(UsageError) as refusal:
        nodes.check_drivers({"10.0.0.1": good, "10.0.0.2": old})
    assert str(refusal.value).startswith(
        f"torch cannot use the GPUs: {old.versions} on 10.0.0.2: {old.fault}; "
    )


def test_torch_itself_is_asked_for_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    assert look_for_gpus("") is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # as Ray sets it for an actor that reserves no GPU
    state = look_for_gpus("570.86.15")
    assert state is not None
    assert state.versions == f"NVIDIA driver 570.86.15, torch {torch.__version__}"
    if torch.version.cuda is None:
        assert state.fault == "it is built without CUDA"
