"""Fixtures, temporary folders and the order of tests that all folders share."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import hypothesis
import pytest

# No deadline: an example may be slow on a busy machine. The default examples are the same in every run, so
# that a failure comes from the change that was made; `--hypothesis-profile=thorough` looks for new ones.
hypothesis.settings.register_profile("default", deadline=None, max_examples=100, derandomize=True)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=600)
hypothesis.settings.load_profile("default")

# Several test processes share the cores: more threads than one each would slow all of them down.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Ray starts its workers with a low priority (nice 15): beside another busy program a study would hardly
# train.
os.environ.setdefault("RAY_worker_niceness", "0")

# Ray announces a running cluster in the temporary folder. Each test process has a folder of its own, so that
# it joins neither a cluster of another test process nor one of the user. The path is short because Unix
# sockets lie below it.
os.environ.pop("RAY_ADDRESS", None)
os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())  # where `tmp_path` stays
_TEMPORARY = tempfile.mkdtemp(prefix="lora-", dir=os.environ["PYTEST_DEBUG_TEMPROOT"])
os.environ["TMPDIR"] = tempfile.tempdir = _TEMPORARY

# The first handler that is registered runs last: after that of multiprocessing, which has files there.
atexit.register(shutil.rmtree, _TEMPORARY, ignore_errors=True)


GROUPS = ("cluster", "ray")
"""The groups of long tests, in the order in which they start.

Two workers start them at once; the one that ends first takes the next file of `ray` tests that start a Ray
instance of their own. A single worker starts the shared cluster of `ray` after the `cluster` tests, which
could join it by mistake.
"""


def pytest_itemcollected(item: pytest.Item) -> None:
    """Put the tests of a group on one worker of pytest-xdist, and all others of a file on one worker.

    The `ray` tests that join the shared cluster are one group, those that start a Ray instance of their own
    a group for each file, and those of the default run (`smoke`) one, so that the other worker has tests that
    need no Ray. Two Ray instances on one machine were once seen to end each other's Train runs; two workers,
    with a temporary folder each, have run side by side without that. A file's fixtures are made once a
    worker.
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
def letters_bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a `bases` folder with the pretrained base model of `letters` (20 s of CPU time).

    The workers of pytest-xdist share it: the first one pretrains, the others wait for it.
    """
    from orchestrator.finetune.models import catalogue as model_catalogue

    folder = tmp_path_factory.getbasetemp()
    root = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "letters-bases"
    model_catalogue.prepare_base_model("letters-base", root, lambda text: None)
    return root


@pytest.fixture
def output(letters_bases: Path, tmp_path: Path) -> Path:
    """Return an output folder whose store has the base model of `letters` already."""
    shutil.copytree(letters_bases, tmp_path / "results" / "store" / "bases")
    return tmp_path / "results"
