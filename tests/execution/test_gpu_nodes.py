"""A GPU study does not train on the CPUs of a joined cluster unless that is asked for."""

from __future__ import annotations

from dataclasses import replace

import pytest
from points import configuration

from orchestrator.execution.ray.autoscaler import NodeType, adapt_to_cluster
from orchestrator.execution.ray.runtime import Cluster, Node
from orchestrator.study.configuration import Dtype, ModelChoice
from orchestrator.study.options import StudyOptions
from orchestrator.util import timeouts
from orchestrator.util.errors import UsageError

GIB = 2**30
HEAD = Cluster((Node(8, 0, 12 * GIB), Node(8, 0, 12 * GIB)), local=False)
WITH_GPU = Cluster((*HEAD.nodes, Node(8, 1, 12 * GIB)), local=False)
LAPTOP = Cluster(HEAD.nodes)
GPU_TYPE = NodeType("gpu", 8, Node(4, 1, 14 * GIB))
QWEN = ModelChoice("Qwen/Qwen3-0.6B-Base", "c0", "bfloat16")
DEFAULT, TYPED = StudyOptions(), StudyOptions(gpus_per_worker=1.0)
LONG = timeouts.NODE_START_SECONDS


@pytest.mark.parametrize(
    ("cluster", "options", "model", "node_types", "gpus", "timeout"),
    [
        (WITH_GPU, DEFAULT, QWEN, (), None, None),
        (
            LAPTOP,
            DEFAULT,
            QWEN,
            (),
            None,
            None,
        ),  # no node can join; `resolve_study` refuses the default study
        (HEAD, StudyOptions(device="cpu"), QWEN, (), None, None),
        (HEAD, StudyOptions(gpus_per_worker=0.0), QWEN, (), 0.0, None),
        (HEAD, DEFAULT, replace(QWEN, dtype="float32"), (), None, None),
        (HEAD, DEFAULT, replace(QWEN, name="smollm2-135m"), (), None, None),
        (HEAD, TYPED, QWEN, (), 1.0, LONG),  # an autoscaler that nobody knows here may start a node
        (HEAD, StudyOptions(gpus_per_worker=1.0, trainer_timeout=60.0), QWEN, (), 1.0, 60.0),
        (HEAD, DEFAULT, QWEN, (GPU_TYPE,), 1.0, LONG),
    ],
)
def test_defaults_on_a_joined_cluster(
    cluster: Cluster,
    options: StudyOptions,
    model: ModelChoice,
    node_types: tuple[NodeType, ...],
    gpus: float | None,
    timeout: float | None,
) -> None:
    adapted = adapt_to_cluster(options, cluster, [replace(configuration(), model=model)], node_types)
    assert (adapted.gpus_per_worker, adapted.trainer_timeout) == (gpus, timeout)


@pytest.mark.parametrize(("name", "dtype"), [(QWEN.name, "bfloat16"), ("/shared/my-model", "nf4")])
def test_a_gpu_study_is_refused_where_the_joined_cluster_has_no_gpu(name: str, dtype: Dtype) -> None:
    model = ModelChoice(name, "c0", dtype)
    small, large = configuration(), replace(configuration(), model=model)
    cpu_type = NodeType("cpu", 8, Node(4, 0, 14 * GIB))
    with pytest.raises(UsageError) as refusal:
        adapt_to_cluster(DEFAULT, HEAD, [small, large], (cpu_type,))
    (line,) = str(refusal.value).splitlines()
    assert line.startswith(f"{name} in {dtype} is trained on GPUs, and none of the 2 nodes")
    assert "--gpus-per-worker 1" in line
    assert "--device cpu" in line
