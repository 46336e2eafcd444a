"""Runs the probe of memory where a worker of a seat would run: as a task that asks Ray for the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from orchestrator.cluster.preflight import memory_result
from orchestrator.cluster.preflight.capacity import TrainerAllocation
from orchestrator.cluster.preflight.check_result import CheckResult, failed_result, undetermined_result
from orchestrator.execution.ray.runtime import Cluster
from orchestrator.execution.trainers.exit_status import format_ray_error
from orchestrator.execution.trainers.trainer import MALLOC_ENVIRONMENT, TrainerSpec, model_loader
from orchestrator.study.configuration import Configuration

PROBE_TIMEOUT_SECONDS = 600.0
CONTROLLER_BYTES = 400 * 2**20  # a seat's controller, where it trains on CPUs


def run_memory_probe(
    cluster: Cluster,
    allocation: TrainerAllocation,
    spec: TrainerSpec,
    configurations: Sequence[Configuration],
) -> CheckResult:
    """One worker's part of each of `configurations`, whatever node Ray chooses. Not knowing is no failure:
    nodes may come, others may be using them."""
    import ray

    if spec.gpus_per_worker and not any(node.gpus for node in cluster.nodes):
        return undetermined_result(
            memory_result.CHECK_NAME, "not probed: no GPU node yet; check again when one is there"
        )
    free = ray.available_resources()
    if any(free.get(name, 0.0) < amount for name, amount in spec.resources_per_worker.items()):
        return undetermined_result(
            memory_result.CHECK_NAME, "not probed: others use all there is; check again when a seat has room"
        )
    task = ray.remote(
        num_cpus=1,
        num_gpus=spec.gpus_per_worker,
        max_retries=1,  # of a process that died; what the probe itself raises is not tried again
        runtime_env={} if spec.uses_gpus else {"env_vars": MALLOC_ENVIRONMENT},
    )(probe_on_worker)
    result_ref = task.remote(
        [configuration.to_json() for configuration in configurations],
        asdict(spec),
        memory_limits(cluster, allocation, spec.workers_per_trainer),
    )
    try:
        return memory_result.check_memory(ray.get(result_ref, timeout=PROBE_TIMEOUT_SECONDS))
    except TimeoutError:  # the task ends with the check
        message = f"not probed: no answer in {PROBE_TIMEOUT_SECONDS:g} s; --no-probe leaves it out"
        return undetermined_result(memory_result.CHECK_NAME, message)
    except Exception as error:  # what loading or a step raises, or what has ended the process
        return failed_result(memory_result.CHECK_NAME, f"the probe failed: {format_ray_error(error)}")


def memory_limits(
    cluster: Cluster, allocation: TrainerAllocation, workers_per_trainer: int
) -> dict[str, int]:
    """Node -> bytes of main memory that a worker of a seat has there: its part of what Ray may promise."""
    found = {}
    for node in cluster.nodes:
        workers_on_node = Cluster((node,)).trainer_capacity(allocation.gpus_per_worker, 1)
        concurrent_workers = max(1, min(workers_on_node, allocation.count * workers_per_trainer))
        found[node.id] = max(0, int(node.memory / concurrent_workers) - CONTROLLER_BYTES)
    return found


def probe_on_worker(
    configurations: Sequence[Mapping[str, Any]],
    spec_fields: Mapping[str, Any],
    limits_by_node: Mapping[str, int],
) -> Any:
    """Runs in Ray's process: a list of `memory.Measured`."""
    import ray
    import torch

    from orchestrator.cluster.preflight.memory_meter import GpuMemoryMeter, HostMemoryMeter
    from orchestrator.cluster.preflight.memory_probe import probe_memory, with_worker_batch_size
    from orchestrator.finetune.sources import hub_data
    from orchestrator.finetune.tasks import catalogue as tasks

    spec = TrainerSpec(**spec_fields)
    meter: GpuMemoryMeter | HostMemoryMeter
    if spec.uses_gpus:
        if not torch.cuda.is_available():
            raise RuntimeError(f"Ray gave a GPU that torch {torch.__version__} cannot use")
        device = torch.device("cuda:0")
        meter = GpuMemoryMeter(device, spec.gpus_per_worker)
        limit_bytes = meter.limit_bytes
    else:
        torch.set_num_threads(1)
        device, meter = torch.device("cpu"), HostMemoryMeter()
        limit_bytes = limits_by_node[ray.get_runtime_context().get_node_id()]
    parts = [
        with_worker_batch_size(Configuration.from_json(c), spec.workers_per_trainer) for c in configurations
    ]
    load = model_loader(spec, Path(spec.store) / "bases", device)
    hub_data.set_pin_folder(Path(spec.store) / "bases", add_pins=False)
    base_model = load(parts[0].model, tasks.get(parts[0].task.name))
    return probe_memory(
        parts, base_model, spec.lanes_per_trainer, meter, limit_bytes, Path(spec.store) / "data"
    )
