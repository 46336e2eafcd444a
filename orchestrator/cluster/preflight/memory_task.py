"""Runs the probe of memory where a worker of a seat would run: as a task that asks Ray for the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from orchestrator.cluster.preflight import memory_result
from orchestrator.cluster.preflight.capacity import Seats
from orchestrator.cluster.preflight.check_result import Finding, failed, later
from orchestrator.execution.ray.runtime import Cluster
from orchestrator.execution.trainers.exit_status import reason
from orchestrator.execution.trainers.trainer import MALLOC, SeatPlan, loader
from orchestrator.study.configuration import Configuration

PROBE_SECONDS = 600.0
BESIDE_BYTES = 400 * 2**20  # a seat's controller, where it trains on CPUs


def ask(cluster: Cluster, seats: Seats, plan: SeatPlan, configurations: Sequence[Configuration]) -> Finding:
    """One worker's part of each of `configurations`, whatever node Ray chooses. Not knowing is no failure:
    nodes may come, others may be using them."""
    import ray

    if plan.gpus and not any(node.gpus for node in cluster.nodes):
        return later(memory_result.NAME, "not probed: no GPU node yet; check again when one is there")
    free = ray.available_resources()
    if any(free.get(name, 0.0) < amount for name, amount in plan.resources.items()):
        return later(
            memory_result.NAME, "not probed: others use all there is; check again when a seat has room"
        )
    task = ray.remote(
        num_cpus=1,
        num_gpus=plan.gpus,
        max_retries=1,  # of a process that died; what the probe itself raises is not tried again
        runtime_env={} if plan.on_gpus else {"env_vars": MALLOC},
    )(work)
    asked = task.remote(
        [configuration.to_json() for configuration in configurations],
        asdict(plan),
        limits(cluster, seats, plan.workers),
    )
    try:
        return memory_result.judge(ray.get(asked, timeout=PROBE_SECONDS))
    except TimeoutError:  # the task ends with the check
        words = f"not probed: no answer in {PROBE_SECONDS:g} s; --no-probe leaves it out"
        return later(memory_result.NAME, words)
    except Exception as error:  # what loading or a step raises, or what has ended the process
        return failed(memory_result.NAME, f"the probe failed: {reason(error)}")


def limits(cluster: Cluster, seats: Seats, workers: int) -> dict[str, int]:
    """Node -> bytes of main memory that a worker of a seat has there: its part of what Ray may promise."""
    found = {}
    for node in cluster.nodes:
        there = Cluster((node,)).room(seats.gpus, 1)
        at_once = max(1, min(there, seats.count * workers))
        found[node.id] = max(0, int(node.memory / at_once) - BESIDE_BYTES)
    return found


def work(
    configurations: Sequence[Mapping[str, Any]], plan: Mapping[str, Any], limits: Mapping[str, int]
) -> Any:
    """Runs in Ray's process: a list of `memory.Measured`."""
    import ray
    import torch

    from orchestrator.cluster.preflight.memory_meter import Gpu, Resident
    from orchestrator.cluster.preflight.memory_probe import part_of_a_worker, probe
    from orchestrator.finetune.sources import hub_data
    from orchestrator.finetune.tasks import catalogue as tasks

    seat = SeatPlan(**plan)
    meter: Gpu | Resident
    if seat.on_gpus:
        if not torch.cuda.is_available():
            raise RuntimeError(f"Ray gave a GPU that torch {torch.__version__} cannot use")
        device = torch.device("cuda:0")
        meter = Gpu(device, seat.gpus)
        limit = meter.limit
    else:
        torch.set_num_threads(1)
        device, meter = torch.device("cpu"), Resident()
        limit = limits[ray.get_runtime_context().get_node_id()]
    parts = [part_of_a_worker(Configuration.from_json(c), seat.workers) for c in configurations]
    load = loader(seat, Path(seat.store) / "bases", device)
    hub_data.keep_pins_in(Path(seat.store) / "bases", new=False)
    bench = load(parts[0].model, tasks.get(parts[0].task.name))
    return probe(parts, bench, seat.lanes, meter, limit, Path(seat.store) / "data")
