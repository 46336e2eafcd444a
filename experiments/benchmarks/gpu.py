"""Measure time and memory of training on one GPU. Needs neither Ray nor a network.

    python experiments/benchmarks/gpu.py --out gpu.json                     Qwen3-0.6B, 1 to 8 lanes
    python experiments/benchmarks/gpu.py --model llama-3.1-8b --variants lora dora --lanes 1 2 --liger
    python experiments/benchmarks/gpu.py --device cpu --tiny                a rehearsal in a minute

Needs torch, transformers, PEFT and what pip installs with them, and this repository on PYTHONPATH; --liger
needs liger-kernel. Weights and tokens are random; the rows have lengths like those of MetaMathQA. Each
measurement is printed as one line of JSON, and --out is written again after every line:

ceiling     speed of a large matrix product, and of a copy on the device
throughput  optimizer steps of the default study (64 rows a lane): time, tokens and lane steps per second,
            share of the ceiling, peak memory
memory      the number of lanes that fit (it is doubled until memory runs out), and the memory that stays
            allocated afterwards
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from measuring import choose_device, describe_machine, make_parser, synchronize, write_results
from synthetic_task import SHAPES, StepSize, build_model, draw_rows, free_device_memory, make_lanes, take_step

from orchestrator.finetune.failures import Fault, classify_error
from orchestrator.finetune.models import changes
from orchestrator.util.command import main
from variants import catalogue
from variants.api import Batching

GIB = 2**30
MAX_LANES = 512
"""Largest number of lanes that `memory` tries."""


@dataclass
class Benchmark:
    """A model on a device, and the measurements made so far."""

    options: argparse.Namespace
    device: torch.device
    rows: list[dict[str, Any]] = field(default_factory=list)
    flops: float = 0.0
    """FLOP per second of a large matrix product."""

    def __post_init__(self) -> None:
        options, is_gpu = self.options, self.device.type == "cuda"
        self.name = "tiny" if options.tiny else options.model
        self.longest = 47 if options.tiny else 511
        self.examples = draw_rows(SHAPES[self.name].vocab_size, 16 if options.tiny else 2048, self.longest)
        self.size = StepSize(8, 1 if options.tiny else 8, self.longest + 1)
        # bfloat16 is slow on CPUs, which only rehearse the measurement.
        self.model = build_model(self.name, self.device, torch.bfloat16 if is_gpu else torch.float32)
        if options.liger:
            changes.apply_liger(self.model, self.name)
        if options.checkpointing:
            changes.enable_activation_checkpointing(self.model)

    def add(self, section: str, **values: Any) -> None:
        """Print a measurement, and write all of them to the result file."""
        self.rows.append({"section": section, **values})
        print(json.dumps(self.rows[-1]), flush=True)
        write_results(self.options.out, self.device, self.rows)

    @contextmanager
    def lanes(self, variant: str, count: int, size: StepSize) -> Iterator[Any]:
        """Attach lanes to the model inside the context, and yield (lane group, lanes)."""
        group, lanes = make_lanes(self.model, self.examples, variant, count, size, same_seed=True)
        if self.options.liger:
            group.base_model = replace(group.base_model, kernels="liger")
        try:
            yield group, lanes
        finally:
            group.adapters.detach()
            del group, lanes
            free_device_memory(self.device)

    def seconds(self, work: Callable[[], object], repeats: int) -> float:
        """Return the median time of `work` in seconds, after two calls to warm up."""
        taken = []
        for _ in range(2 + repeats):
            synchronize(self.device)
            started = time.perf_counter()
            work()
            synchronize(self.device)
            taken.append(time.perf_counter() - started)
        return statistics.median(taken[2:])

    def allocated(self, peak: bool = False) -> int:
        """Return the bytes that are allocated on the GPU now, or the peak so far; 0 on a CPU."""
        if self.device.type == "cpu":
            return 0
        return (torch.cuda.max_memory_allocated if peak else torch.cuda.memory_allocated)(self.device)

    def measure_ceiling(self) -> None:
        """Measure a product of two matrices of the model's data type, and a copy."""
        side = 256 if self.device.type == "cpu" else 8192
        left, right = (torch.randn(side, side, device=self.device, dtype=self.model.dtype) for _ in range(2))
        self.flops = 2 * side**3 / self.seconds(partial(torch.mm, left, right), 20)
        copied = 2 * left.nbytes / self.seconds(left.clone, 20)
        self.add("ceiling", tflops=round(self.flops / 1e12, 2), terabytes_per_s=round(copied / 1e12, 3))

    def measure_throughput(self, variant: str, count: int) -> None:
        """Measure optimizer steps of `count` lanes."""
        what = {"variant": variant, "lanes": count}
        try:
            with self.lanes(variant, count, self.size) as (group, lanes):
                if self.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(self.device)
                seconds = self.seconds(partial(take_step, group, lanes), self.options.steps)
                peak = self.allocated(peak=True)
        except torch.OutOfMemoryError:
            free_device_memory(self.device)
            self.add("throughput", **what, fits=False)
            return
        length = statistics.mean(len(row.ids) for row in self.examples)
        tokens = self.size.rows * self.size.accumulation * count * length
        weights = sum(parameter.numel() for parameter in self.model.parameters())
        self.add(
            "throughput",
            **what,
            milliseconds=round(1e3 * seconds, 1),
            tokens_per_s=round(tokens / seconds),
            lane_steps_per_s=round(count / seconds, 3),
            share_of_ceiling=round(4 * weights * tokens / seconds / self.flops, 3),
            peak_gib=round(peak / GIB, 2),
        )

    def measure_memory(self, variant: str) -> None:
        """Measure how many lanes fit into memory. On a CPU, try at most two.

        Raises:
            RuntimeError: A step failed for another reason than a lack of memory.
        """
        count, fitting, fault, before = 1, 0, None, self.allocated()
        while fault is None and count <= (2 if self.device.type == "cpu" else MAX_LANES):
            fault = self._find_fault(variant, count)
            fitting, count = fitting if fault else count, 2 * count
        if fault not in (None, Fault.MEMORY):
            raise RuntimeError(f"a lack of memory was classified as {fault}; failures.py must say MEMORY")
        free_device_memory(self.device)
        kept = (self.allocated() - before) / 2**20
        self.add("memory", variant=variant, lanes=fitting, ended_by=str(fault), kept_mib=round(kept, 1))

    def _find_fault(self, variant: str, count: int) -> Fault | None:
        """Run a forward and a backward pass of `count` lanes. Return the kind of error; None without one."""
        try:
            with self.lanes(variant, count, replace(self.size, accumulation=1)) as (group, lanes):
                group.backward(lanes)
                synchronize(self.device)
        except Exception as error:
            return classify_error(error)
        return None


def run() -> None:
    """Measure what the command line asks for."""
    parser = make_parser(__doc__)
    parser.add_argument("--model", choices=sorted(SHAPES), default="qwen3-0.6b")
    parser.add_argument("--variants", nargs="+", default=["lora", "dora", "hira", "pissa"])
    parser.add_argument("--lanes", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps of a measurement; default: 5")
    parser.add_argument("--liger", action="store_true", help="use Liger's RMSNorm, rotary and SwiGLU")
    parser.add_argument("--checkpointing", action="store_true", help="recompute blocks in the backward pass")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and short rows")
    options = parser.parse_args()
    device = choose_device(options)
    benchmark = Benchmark(options, device)
    benchmark.add("machine", **describe_machine(device), model=benchmark.name)
    benchmark.measure_ceiling()
    for variant in options.variants:
        exclusive = catalogue.get(variant).batching is Batching.EXCLUSIVE
        for count in [1] if exclusive else options.lanes:
            benchmark.measure_throughput(variant, count)
        if not exclusive:
            benchmark.measure_memory(variant)


if __name__ == "__main__":
    main(run)
