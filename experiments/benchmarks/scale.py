"""Measure the cost of driver, broker and trainers in a real study whose training is simulated.

    python experiments/benchmarks/scale.py --sizes 100 1000 5000 --output scale

Each size is a study in a process of its own, on a Ray cluster of several nodes with fake GPUs on this
machine. Tune, trials, broker, Ray Train's workers and records are real; a step is a sleep, and the losses
are synthetic. Writes scale/<size>-<scheduler>.json and prints a table. Ray's processes need about
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
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from measuring import markdown_table

from orchestrator.cli.parsing import parse
from orchestrator.study.configuration import (
    BatchConfig,
    Configuration,
    LRSchedule,
    ModelChoice,
    OptimizerConfig,
    TaskChoice,
    VariantChoice,
)
from orchestrator.study.grids import build_grid
from orchestrator.study.option import Option, Options
from orchestrator.util.command import main
from orchestrator.util.errors import UsageError

if TYPE_CHECKING:
    import psutil

VARIANTS = ("lora", "rslora", "dora", "hira", "pissa")
MAX_RATES = 20
SAMPLE_SECONDS = 1.0
ROLES = {
    "RayTrainWorker": "worker",
    "TrainController": "controller",
    "Broker": "broker",
    "LaneTrial": "trial",
}
"""Part of the title that Ray gives a process -> role of the process."""


@dataclass(frozen=True, kw_only=True)
class ScaleOptions(Options):
    """Options of the script."""

    sizes: Annotated[tuple[int, ...], Option("INT")] = (100, 1000, 5000)
    """Numbers of configurations of the studies: multiples of 100, or of 5 below 100."""
    output: Path = Path("scale")
    """Folder for the results and the studies' stores."""
    scheduler: Annotated[str, Option(registry="orchestrator.execution.schedulers:SCHEDULERS")] = "none"
    """Early stopping."""
    nodes: int = 2
    """Nodes beside the head, with one fake GPU each; each GPU gets a trainer."""


def run() -> int:
    """Run a study of each size in a process of its own and print their table. Returns the exit code."""
    typed = parse(ScaleOptions, sys.argv[1:], "scale.py", __doc__ or "")
    options = ScaleOptions(**typed)
    options.output.mkdir(parents=True, exist_ok=True)
    files = [options.output / f"{size}-{options.scheduler}.json" for size in options.sizes]
    if len(files) == 1:
        files[0].write_text(json.dumps(_measure_study(options, options.sizes[0]), indent=1) + "\n")
    else:
        shared = [f"--{name}={getattr(options, name)}" for name in ("output", "scheduler", "nodes")]
        for size in options.sizes:
            subprocess.run([sys.executable, __file__, "--sizes", str(size), *shared], check=True)
    print(format_table([json.loads(file.read_text()) for file in files]))
    return 0


def template(variant: str, steps: int = 20) -> Configuration:
    """Return a configuration of a variant whose training can be simulated."""
    return Configuration(
        VariantChoice(variant, alpha=None if variant == "hira" else 16.0),
        TaskChoice("simulated", "0", 100, 100, 100, "exact_match", 0.0),
        ModelChoice("none", "0"),
        OptimizerConfig(1.0),
        LRSchedule(steps),
        BatchConfig(1),
        evaluations=2,
    )


def build_configurations(size: int) -> list[Configuration]:
    """Return `size` configurations: five variants, at most twenty learning rates, as many seeds as needed.

    Raises:
        UsageError: `size` is not a multiple of variants times rates.
    """
    rate_count = min(MAX_RATES, max(1, size // len(VARIANTS)))
    unit = rate_count * len(VARIANTS)
    if size < unit or size % unit:
        raise UsageError(f"--sizes {size}: must be a multiple of {unit}; take {max(1, size // unit) * unit}.")
    templates = [template(name) for name in VARIANTS]
    rates = [float(f"{10 ** (-4 + 4 * index / rate_count):.3g}") for index in range(rate_count)]
    return build_grid(templates, rates, range(size // unit))


def _measure_study(options: ScaleOptions, size: int) -> dict[str, Any]:
    """Run a study of `size` configurations on a fresh cluster. Returns its cost in seconds and MiB."""
    import psutil
    import ray
    from ray.cluster_utils import Cluster as RayCluster

    from orchestrator.record.store import Store

    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    configurations = build_configurations(size)
    folder = options.output / f"store-{size}-{options.scheduler}"
    shutil.rmtree(folder, ignore_errors=True)  # a study does not train what its store holds
    store = Store(folder)
    memory = {"memory": 40 * 2**30, "object_store_memory": 2**30 // 5}
    cluster = RayCluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 0, **memory})
    try:
        for _ in range(options.nodes):
            cluster.add_node(num_cpus=2, num_gpus=1, **memory)
        ray.init(address=cluster.address, namespace="scale", log_to_driver=False, logging_level=logging.ERROR)
        sampler = MemorySampler(psutil.Process())
        sampler.start()
        row = _run_study(options, configurations, store)
        sampler.stop.set()
        sampler.join()
        return row | sampler.summary()
    finally:
        ray.shutdown()
        cluster.shutdown()


def _run_study(options: ScaleOptions, configurations: Sequence[Configuration], store: Any) -> dict[str, Any]:
    import ray
    from simulated_training import train_simulated

    from orchestrator.execution.ray_cluster import Cluster, Node

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cluster = Cluster(
        tuple(Node(n.get("CPU", 0.0), n.get("GPU", 0.0), n.get("memory", 0.0)) for n in nodes),
        namespace="scale",
        local=False,
    )
    started, cpu, loop_cpu = time.monotonic(), time.process_time(), time.thread_time()
    steps = train_simulated(configurations, options.scheduler, cluster, options.nodes, 1.0, store)
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
        "steps": steps,
        "seconds": seconds,
        "busy_seconds": last - first,
        "driver_cpu_seconds": cpu,
        "loop_cpu_seconds": loop_cpu,
        "results_per_second": (reports + len(records)) / (last - first),
        "broker_calls_per_second": (trainer_calls + trial_calls) / (last - first),
        "broker_call_seconds": sum(one["seconds"] for one in calls) / max(1, trainer_calls),
        "load": os.getloadavg()[1],
    }


class MemorySampler(threading.Thread):
    """A thread that samples the memory of the driver and, every tenth time, of Ray's processes by role.

    Args:
        driver: The process of the study; Ray's processes are its descendants.
    """

    def __init__(self, driver: psutil.Process) -> None:
        super().__init__(daemon=True)
        self.driver, self.stop = driver, threading.Event()
        self.rss_before = self.rss_peak = driver.memory_info().rss
        self.largest_sizes: dict[str, list[float]] = {}
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
        for process in self.driver.children(recursive=True):
            try:
                title = process.cmdline()[:1]
                role = next((r for name, r in ROLES.items() if title and name in title[0]), None)
                if role is not None:
                    found[role].append(process.memory_full_info().pss)
                    if role == "broker":
                        self.broker_cpu = max(self.broker_cpu, sum(process.cpu_times()[:2]))
            except (psutil.Error, IndexError):
                continue
        for role, sizes in found.items():
            if sum(sizes) > sum(self.largest_sizes.get(role, [])):
                self.largest_sizes[role] = sizes

    def summary(self) -> dict[str, Any]:
        """Return the measurements for the result file; the sizes are in MiB."""
        mib = 2**20
        each = {role: sum(sizes) / len(sizes) / mib for role, sizes in self.largest_sizes.items()}
        return {
            "driver_mib_before": self.rss_before / mib,
            "driver_mib_peak": self.rss_peak / mib,
            "process_mib": each,
            "processes": {role: len(sizes) for role, sizes in self.largest_sizes.items()},
            "broker_cpu_seconds": self.broker_cpu,
        }


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table with one row per size.

    An increment is the cost of each configuration beyond those of the row before; it does not include the
    cost of starting.
    """
    import pandas

    runs = pandas.json_normalize(rows)
    added = runs[["configurations", "driver_cpu_seconds", "loop_cpu_seconds", "driver_mib_peak"]].diff()
    table = pandas.DataFrame(
        {
            "configurations": runs["configurations"],
            "elapsed, s": runs["seconds"],
            "training, s": runs["busy_seconds"],
            "results/s": runs["results_per_second"],
            "driver CPU, ms per configuration": 1000 * runs["driver_cpu_seconds"] / runs["configurations"],
            "increment, ms": 1000 * added["driver_cpu_seconds"] / added["configurations"],
            "of it Tune's loop, ms": 1000 * added["loop_cpu_seconds"] / added["configurations"],
            "driver's peak, MiB": runs["driver_mib_peak"],
            "increment, KiB": 1024 * added["driver_mib_peak"] / added["configurations"],
            "broker calls/s": runs["broker_calls_per_second"],
            "a call, ms": 1000 * runs["broker_call_seconds"],
            "broker CPU, ms per configuration": 1000 * runs["broker_cpu_seconds"] / runs["configurations"],
            "broker, MiB": runs.get("process_mib.broker", 0.0),
        }
    )
    cells = table.round(1).astype(object).where(table.notna(), "")
    return markdown_table(list(table), cells.itertuples(index=False))


if __name__ == "__main__":
    main(run)
