"""Fixtures for all tests, their temporary folders, and the order in which the tests run."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import as_a_user
import hypothesis
import pytest
from filelock import FileLock

# There is no deadline, because an example may be slow on a busy machine. The default examples are the same in
# every run, so that a new failure comes from a change of the code; `--hypothesis-profile=thorough` generates
# new examples.
hypothesis.settings.register_profile("default", deadline=None, max_examples=100, derandomize=True)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=600)
hypothesis.settings.load_profile("default")

# As in a trainer on CPUs, which computes with one thread whatever the environment says: with several, a
# lane's bits depend on the lanes beside it. Besides, several test processes share the cores.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

# As in `orchestrator.finetune`, for tests that import the variants only.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")

# Ray starts its workers with a low priority (nice 15), with which a study hardly trains while another program
# is busy.
os.environ.setdefault("RAY_worker_niceness", "0")

# No call may start Ray implicitly, which the next test of this process would find running.
os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"

# Ray writes the address of a running cluster to the temporary folder. Each test process has its own folder,
# so that it joins neither a cluster of another test process nor one of the user. The path is short because it
# is part of the paths of Unix sockets.
os.environ.pop("RAY_ADDRESS", None)
os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())  # `tmp_path` stays in this folder.
_TEMPORARY = tempfile.mkdtemp(prefix="lora-", dir=os.environ["PYTEST_DEBUG_TEMPROOT"])
os.environ["TMPDIR"] = tempfile.tempdir = _TEMPORARY

# The user's home stays as it is: models, datasets and settings of libraries go to a home in this folder.
# Only pip and uv have the user's downloads and settings.
_USERS = {"PIP_CACHE_DIR": "cache/pip", "PIP_CONFIG_FILE": "config/pip/pip.conf", "UV_CACHE_DIR": "cache/uv"}
for _name, _path in (_USERS | {"UV_CONFIG_FILE": "config/uv/uv.toml"}).items():
    if (_users := Path.home() / f".{_path}").exists():
        os.environ.setdefault(_name, str(_users))
_KEPT = {"HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE"}
for _name in {each for each in os.environ if each.startswith(("XDG_", "HF_", "HUGGINGFACE_"))} - _KEPT:
    del os.environ[_name]
os.environ["HOME"] = tempfile.mkdtemp(dir=_TEMPORARY)

# The handler that is registered first runs last, after the handler of multiprocessing, which has files in
# this folder.
atexit.register(shutil.rmtree, _TEMPORARY, ignore_errors=True)


pytest_plugins = ["in_process", "untrained_base"]  # the fixtures `run`, `restored` and `base`

GROUPS = ("cluster", "ray")
"""The groups of long tests, in the order in which they start.

Two workers start both groups at once. The worker that finishes first takes the next file of `ray` tests that
start their own Ray instance. A single worker starts the shared cluster of `ray` after the `cluster` tests,
because these could join it by mistake.
"""


def pytest_itemcollected(item: pytest.Item) -> None:
    """Assign a test to a group; pytest-xdist runs all tests of a group on one worker.

    The `cluster` tests are one group. The `ray` tests that join the shared cluster are one group. The tests
    of the default run that need Ray (`smoke`) are one group, so that the other worker has tests without Ray.
    All other tests of a file are one group, so that the fixtures of the file are made on one worker only.
    """
    joins = {"cluster", "connected"} & set(getattr(item, "fixturenames", ()))
    if item.get_closest_marker("cluster"):
        group = "cluster"
    elif item.get_closest_marker("ray") and joins:
        group = "ray"
    elif item.get_closest_marker("smoke"):
        group = "smoke"
    else:
        group = item.nodeid.partition("::")[0]
    if not item.get_closest_marker("xdist_group"):
        item.add_marker(pytest.mark.xdist_group(group))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the long tests first."""
    items.sort(key=_order)


def _order(item: pytest.Item) -> int:
    group = item.get_closest_marker("xdist_group")
    assert group is not None
    if group.args[0] in GROUPS:
        return GROUPS.index(group.args[0])
    return len(GROUPS) if item.get_closest_marker("ray") else len(GROUPS) + 1


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return the function `get(name, make)`, which returns the folder `name`.

    The first test process that asks for a folder calls `make` to fill it.
    """
    base = tmp_path_factory.getbasetemp()
    session = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def get(name: str, make: Callable[[Path], None], shared: Path = session) -> Path:
        folder, made = shared / name, shared / f"{name}.made"
        with FileLock(f"{folder}.lock"):
            if not made.exists():  # filled in place and never renamed: a study's files contain its path
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                made.touch()
        return folder

    return get


@pytest.fixture(scope="session")
def with_base(made_once: Callable[..., Path]) -> Path:
    """Return a working folder whose `results/` has only the base model of the dry run.

    Tests only read it; `home` is a copy. The environment variable PROMISES_CACHE can name a folder that keeps
    it for later test sessions.
    """

    def fetch(folder: Path) -> None:
        as_a_user.succeed("fetch", "model", "letters-base", cwd=folder)

    if "PROMISES_CACHE" in os.environ:
        return made_once("with-base", fetch, Path(os.environ["PROMISES_CACHE"]))
    return made_once("with-base", fetch)


@pytest.fixture(scope="session")
def letters_bases(with_base: Path) -> Path:
    """Return the `bases` folder of a store with the base model of `letters`. Read only: tests copy it."""
    return with_base / "results" / "store" / "bases"


@pytest.fixture
def output(letters_bases: Path, tmp_path: Path) -> Path:
    """Return an output folder whose store contains the base model of `letters`."""
    shutil.copytree(letters_bases, tmp_path / "results" / "store" / "bases")
    return tmp_path / "results"
