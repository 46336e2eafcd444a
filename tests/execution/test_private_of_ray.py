"""The private names of Ray that this project uses exist in the installed version."""

from __future__ import annotations

import ast
import inspect
import pkgutil

import pytest

from orchestrator.execution.ray import private

IMPORTED = sorted(
    f"{node.module}:{alias.name}"
    for node in ast.walk(ast.parse(inspect.getsource(private)))
    if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("ray.")
    for alias in node.names
)
USED = [
    "ray._private.node:Node.start_api_server",
    "ray._private.parameter:RayParams",
    "ray._private.state:state.get_draining_nodes",
    "ray._private.state:state._connect_and_get_accessor",
    "ray._private.state:state.get_cluster_config",
    "ray.actor:ActorHandle._actor_id",
    "ray.core.generated.common_pb2:ActorDiedErrorContext.NODE_DIED",
    "ray.core.generated.gcs_pb2:PlacementGroupTableData.REMOVED",
    "ray.tune.execution.class_cache:ENV_VARS_TO_PROPAGATE.difference_update",
    # Overridden in trainers/trainer_run.py, session.py and tune/per_group_scheduler.py.
    "ray.train.v2.api.data_parallel_trainer:DataParallelTrainer.fit",
    "ray.train.v2.api.data_parallel_trainer:DataParallelTrainer._create_default_callbacks",
    "ray.train.v2.api.data_parallel_trainer:DataParallelTrainer._initialize_and_run_controller",
    "ray.train.v2.api.data_parallel_trainer:PlacementGroupCleanerCallback",
    "ray.train.v2.api.data_parallel_trainer:DatasetsCallback",
    "ray.train.v2._internal.execution.scaling_policy:FixedScalingPolicy._maybe_send_resource_request",
    "ray.train.v2._internal.execution.scaling_policy:FixedScalingPolicy.after_controller_start",
    "ray.tune.execution.class_cache:_ActorClassCache.get",
    "ray.tune.execution.tune_controller:TuneController._actor_failed",
    "ray.tune.execution.tune_controller:TuneController._set_trial_status",
    "ray.tune.execution.tune_controller:TuneController._unstage_trial_with_resources",
]


@pytest.mark.parametrize("name", [*IMPORTED, *USED])
def test_a_private_name_exists(name: str) -> None:
    pkgutil.resolve_name(name)


def test_fields_of_generated_messages_exist() -> None:
    from ray.core.generated import gcs_pb2

    fields = gcs_pb2.PlacementGroupTableData.DESCRIPTOR.fields_by_name
    assert {"creator_actor_id", "creator_job_id", "creator_actor_dead", "state", "placement_group_id"} <= set(
        fields
    )


def test_a_training_functions_error_is_found() -> None:
    from ray.train import WorkerGroupError
    from ray.train.v2._internal.exceptions import UserExceptionWithTraceback

    error = ValueError("its own")
    found = WorkerGroupError("failed", {0: UserExceptionWithTraceback(error, "its traceback")})
    assert private.training_function_errors(found) == [error]


def test_the_generator_of_trials_has_its_private_attributes() -> None:
    from ray.tune.search.basic_variant import BasicVariantGenerator

    assert {"_uuid_prefix", "_trial_generator", "_total_samples"} <= vars(BasicVariantGenerator()).keys()
