"""The private names of Ray: what they save is optional, and a study does without them."""

from __future__ import annotations

import ast
import inspect
import logging
from pathlib import Path

import pytest
import study

from orchestrator.execution import private_ray

NAMES = (
    "ray._private.node:Node.start_api_server",
    "ray._private.state:state.get_draining_nodes",
    "ray.train.v2.api.data_parallel_trainer:DataParallelTrainer._initialize_and_run_controller",
    "ray.tune.execution.class_cache:_ActorClassCache",
    "ray.tune.experiment.trial:_TrialInfo",
)


@pytest.mark.parametrize("name", NAMES)
def test_a_private_name_exists_in_the_installed_version(name: str) -> None:
    assert private_ray.look_up(name) is not None


def test_a_missing_name_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert private_ray.look_up("ray._private:nothing") is None
        assert private_ray.look_up("ray._private:nothing") is None
    assert [
        record.getMessage().endswith("has no ray._private:nothing; the study goes on without it")
        for record in caplog.records
    ] == [True]


def test_the_module_imports_no_private_name() -> None:
    tree = ast.parse(inspect.getsource(private_ray))
    modules = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    assert [m for m in modules if m.startswith("ray") and ("_" in m.split(".")[-1][:1] or "._" in m)] == []


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_study_needs_none_of_them(no_cluster: None, output: Path, tmp_path: Path) -> None:
    without = study.altered(
        tmp_path,
        "from orchestrator.execution import private_ray",
        "private_ray.look_up = lambda name: None",
    )
    lanes = ("--variants", "lora", "--seeds", "2", "--learning-rates", "1e-2", "--widen", "0", "--steps", "6")
    code, out, err = study.run(output, *lanes, "--scheduler", "median", script=without)
    assert code == 0, out + err
    assert [record.state for record in study.records(output).values()] == ["finished"] * 2
