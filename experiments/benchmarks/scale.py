"""Cost of the driver, the broker and the trainers: a real study in which only the training is simulated.

    python experiments/benchmarks/scale.py --sizes 100 1000 5000 --output scale

Each size is a study in a process of its own, on a Ray cluster of several nodes with fake GPUs on this
machine. Tune, trials, broker, Ray Train's workers, records and checkpoints are real; a step is a sleep, and
the losses are synthetic. Writes scale/<size>-<scheduler>.json and prints a table. Ray's processes need about
4 GB of memory.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.util.command import main

if TYPE_CHECKING:
    import psutil

    from orchestrator.study.configuration import Configuration

VARIANTS = ("lora", "rslora", "dora", "hira", "pissa")
MAX_RATES = 20
SAMPLE_SECONDS = 1.0
ROLES = {
    "RayTrainWorker": "worker",
    "TrainController": "controller",
    "Broker": "broker",
    "ResourceTrainable": "trial",
}
"""Part of the title that Ray gives a process -> role of the process."""


@dataclass(frozen=True)
class Options:
    """Options of the script."""

    sizes: tuple[int, ...] = (100, 1000, 5000)
    """Numbers of configurations of the studies: multiples of 100, or of 5 below 100."""
    output: Path = Path("scale")
    """Folder for the results and the studies' stores."""
    scheduler: str = "none"
    """Early stopping: none, asha, median, hyperband."""
    nodes: int = 2
    gpus_per_node: int = 1
    """Fake GPUs of each node; each GPU gets a trainer."""
    lanes_per_trainer: int = 4
    steps: int = 20
    evaluations: int = 2
    seconds_per_step: float = 0.01


def run() -> int:
    """Run a study of each size in a process of its own and print their table. Returns the exit code."""
    import tyro

    options = tyro.cli(Options, description=__doc__)
    options.output.mkdir(parents=True, exist_ok=True)
    if len(options.sizes) == 1:
        _write_result(options, _measure_study(options, options.sizes[0]))
        return 0
    for size in options.sizes:
        option_values = {k: v for k, v in asdict(options).items() if k != "sizes"}
        arguments = [part for k, v in option_values.items() for part in (f"--{k.replace('_', '-')}", str(v))]
        subprocess.run([sys.executable, __file__, "--sizes", str(size), *arguments], check=True)
    rows = [json.loads(_result_file(options, size).read_text()) for size in options.sizes]
    print(format_table(rows))
    return 0


def _result_file(options: Options, size: int) -> Path:
    return options.output / f"{size}-{options.scheduler}.json"


def _write_result(options: Options, row: dict[str, Any]) -> None:
    _result_file(options, row["configurations"]).write_text(json.dumps(row, indent=1) + "\n")
    print(format_table([row]), flush=True)


def build_configurations(size: int, steps: int, evaluations: int) -> list[Configuration]:
    """Return `size` configurations: five variants, at most twenty learning rates, as many seeds as needed.

    Raises:
        UsageError: `size` is not a multiple of variants times rates.
    """
    from orchestrator.study.configuration import (
        BatchConfig,
        Configuration,
        LRSchedule,
        ModelChoice,
        OptimizerConfig,
        TaskChoice,
        VariantChoice,
    )
    from orchestrator.study.grid import build_grid
    from orchestrator.util.errors import UsageError

    rate_count = min(MAX_RATES, max(1, size // len(VARIANTS)))
    unit = rate_count * len(VARIANTS)
    if size < unit or size % unit:
        raise UsageError(f"--sizes {size}: must be a multiple of {unit}; take {max(1, size // unit) * unit}.")
    templates = [
        Configuration(
            VariantChoice(name, alpha=None if name == "hira" else 16.0),
            TaskChoice("simulated", "0", 100, 100, 100, "exact_match", 0.0),
            ModelChoice("none", "0"),
            OptimizerConfig(1.0),
            LRSchedule(steps),
            BatchConfig(1),
            evaluations=evaluations,
        )
        for name in VARIANTS
    ]
    rates = [float(f"{10 ** (-4 + 4 * index / rate_count):.3g}") for index in range(rate_count)]
    return build_grid(templates, rates, range(size // unit))


def _measure_study(options: Options, size: int) -> dict[str, Any]:
    """Run a study of `size` configurations on a fresh cluster. Returns its cost in seconds and MiB."""
    import psutil
    import ray
    from ray.cluster_utils import Cluster as RayCluster

    from orchestrator.record.store import Store

    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    configurations = build_configurations(size, options.steps, options.evaluations)
    folder = options.output / f"store-{size}-{options.scheduler}"
    shutil.rmtree(folder, ignore_errors=True)  # a study does not train what its store holds
    store = Store(folder)
    gib = 2**30
    cluster = RayCluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 1,
            "num_gpus": 0,
            "memory": 40 * gib,
            "object_store_memory": gib // 5,
        },
    )
    try:
        for _ in range(options.nodes):
            cluster.add_node(
                num_cpus=options.gpus_per_node + 1,
                num_gpus=options.gpus_per_node,
                memory=40 * gib,
                object_store_memory=gib // 5,
            )
        ray.init(address=cluster.address, namespace="scale", log_to_driver=False, logging_level=logging.ERROR)
        head_node: Any = cluster.head_node
        head_pid = head_node.all_processes["raylet"][0].process.pid
        sampler = MemorySampler(psutil.Process(), head_pid)
        sampler.start()
        row = _run_study(options, configurations, store)
        sampler.stop.set()
        sampler.join()
        return row | sampler.summary()
    finally:
        ray.shutdown()
        cluster.shutdown()


def _run_study(options: Options, configurations: Sequence[Configuration], store: Any) -> dict[str, Any]:
    import ray
    from simulated_curves import SimulationPlan
    from simulated_training import PoolSize, train_simulated

    from orchestrator.execution.ray.runtime import Cluster, Node

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cluster = Cluster(
        tuple(Node(n.get("CPU", 0.0), n.get("GPU", 0.0), n.get("memory", 0.0)) for n in nodes),
        namespace="scale",
        local=False,
    )
    trainers = options.nodes * options.gpus_per_node
    started, cpu, loop_cpu = time.monotonic(), time.process_time(), time.thread_time()
    plan = SimulationPlan(seconds_per_step=options.seconds_per_step)
    pool_size = PoolSize(trainers, options.lanes_per_trainer, gpus_per_worker=1.0)
    steps = train_simulated(configurations, options.scheduler, cluster, pool_size, store, plan)
    seconds, cpu = time.monotonic() - started, time.process_time() - cpu
    loop_cpu = time.thread_time() - loop_cpu
    records = list(store.records())
    reports = sum(e.split == "validation" for record in records for e in record.evaluations)
    calls = [json.loads(file.read_text()) for file in store.root.glob("calls-*.json")]
    trainer_calls = sum(one["calls"] for one in calls)
    trial_calls = reports + 2 * len(records)  # a call for each report, and two for each trial's end
    first = min(record.provenance.started for record in records)
    last = max(record.provenance.ended for record in records)
    return {
        "configurations": len(configurations),
        "records": len(records),
        "states": {state: sum(r.state == state for r in records) for state in {r.state for r in records}},
        "scheduler": options.scheduler,
        "trainers": trainers,
        "lanes_per_trainer": options.lanes_per_trainer,
        "steps": steps,
        "seconds": seconds,
        "busy_seconds": last - first,
        "driver_cpu_seconds": cpu,
        "loop_cpu_seconds": loop_cpu,
        "results": reports + len(records),
        "results_per_second": (reports + len(records)) / (last - first),
        "broker_calls_per_second": (trainer_calls + trial_calls) / (last - first),
        "broker_call_seconds": sum(one["seconds"] for one in calls) / max(1, trainer_calls),
        "load": os.getloadavg()[1],
    }


class MemorySampler(threading.Thread):
    """A thread that samples the memory of the driver and, every tenth time, of Ray's processes by role.

    Args:
        driver: The process of the study; Ray's processes are its descendants.
        head_raylet: Process id of the head node's raylet.
    """

    def __init__(self, driver: psutil.Process, head_raylet: int) -> None:
        super().__init__(daemon=True)
        self.driver, self.head_raylet = driver, head_raylet
        self.stop = threading.Event()
        self.rss_before = self.rss_peak = driver.memory_info().rss
        self.largest_sizes: dict[str, list[float]] = {}
        self.processes_on_head: dict[str, int] = {}
        self.broker_cpu = 0.0

    def run(self) -> None:
        """Sample until `stop` is set."""
        for number in count():
            if self.stop.wait(SAMPLE_SECONDS):
                return
            self.rss_peak = max(self.rss_peak, self.driver.memory_info().rss)
            if number % 10 == 9:
                self._sample_processes()

    def _sample_processes(self) -> None:
        import psutil

        found: dict[str, list[float]] = defaultdict(list)
        head: dict[str, int] = defaultdict(int)
        for process in self.driver.children(recursive=True):
            try:
                title = process.cmdline()[:1]
                role = next((r for name, r in ROLES.items() if title and name in title[0]), None)
                if role is not None:
                    found[role].append(process.memory_full_info().pss)
                    head[role] += process.ppid() == self.head_raylet
                    if role == "broker":
                        self.broker_cpu = max(self.broker_cpu, sum(process.cpu_times()[:2]))
            except (psutil.Error, IndexError):
                continue
        for role, sizes in found.items():
            if sum(sizes) > sum(self.largest_sizes.get(role, [])):
                self.largest_sizes[role], self.processes_on_head[role] = sizes, head[role]

    def summary(self) -> dict[str, Any]:
        """Return the measurements for the result file; the sizes are in MiB."""
        mib = 2**20
        each = {role: sum(sizes) / len(sizes) / mib for role, sizes in self.largest_sizes.items()}
        return {
            "driver_mib_before": self.rss_before / mib,
            "driver_mib_peak": self.rss_peak / mib,
            "process_mib": each,
            "processes": {role: len(sizes) for role, sizes in self.largest_sizes.items()},
            "processes_on_head": self.processes_on_head,
            "broker_cpu_seconds": self.broker_cpu,
        }


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table with one row per size.

    The columns "more" give the cost of each additional configuration compared with the row before, which
    excludes the cost of starting.
    """
    lines = [
        "| configurations | seconds | training | results/s | driver's CPU, ms each | more, ms each "
        "| of it Tune's loop | driver's peak, MiB | more, KiB each | broker calls/s | a call, ms "
        "| broker's CPU, ms each | broker, MiB |",
        "| --- " * 13 + "|",
    ]
    before: dict[str, Any] | None = None
    for row in rows:
        size = row["configurations"]
        more = ("", "", "")
        if before is not None:
            new = size - before["configurations"]
            keys = ("driver_cpu_seconds", "loop_cpu_seconds", "driver_mib_peak")
            cpu, loop, memory = (row[key] - before[key] for key in keys)
            more = (f"{1000 * cpu / new:.1f}", f"{1000 * loop / new:.1f}", f"{1024 * memory / new:.0f}")
        lines.append(
            f"| {size} | {row['seconds']:.0f} | {row['busy_seconds']:.0f} | {row['results_per_second']:.1f} "
            f"| {1000 * row['driver_cpu_seconds'] / size:.1f} | {more[0]} | {more[1]} "
            f"| {row['driver_mib_peak']:.0f} | {more[2]} | {row['broker_calls_per_second']:.0f} "
            f"| {1000 * row['broker_call_seconds']:.1f} | {1000 * row['broker_cpu_seconds'] / size:.1f} "
            f"| {row['process_mib'].get('broker', 0):.0f} |"
        )
        before = row
    return "\n".join(lines)


if __name__ == "__main__":
    main(run)
