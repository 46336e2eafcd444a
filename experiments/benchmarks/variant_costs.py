"""Measure what each variant costs relative to LoRA, and what the slow initializations cost.

    python experiments/benchmarks/variant_costs.py --variants dora hira        two variants, printed only
    python experiments/benchmarks/variant_costs.py --write                     all, into variants/costs.json
    python experiments/benchmarks/variant_costs.py --sections initializations --variants pissa lora_ga --write

`steps`: one optimizer step (forward, backward, AdamW, hooks) of one lane of a variant and of one lane of LoRA
run in turn on the same random decoder blocks and tokens. The time is the median over the rounds of the ratio
of times, the memory the ratio of the peaks of all tensors that a step allocates (without weights and
optimizer states). The vocabulary is small, so that the blocks dominate.

`initializations`: the seconds and the peak memory of the initialization of one layer, for the variants that
compute it from the weight, from a gradient or from inputs. Each runs in a process of its own; on a CPU the
peak is that of the process's resident memory above its size before.

--write keeps the measurements of variants that are not named, if the machine and the sizes are the same.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from measuring import (
    choose_device,
    describe_machine,
    make_parser,
    markdown_table,
    ratios,
    synchronize,
    time_in_turn,
)
from step import OurStep, measure_memory
from synthetic_task import build_model
from torch import Tensor

from orchestrator.util.command import main
from variants import catalogue
from variants.api import CalibrationStatistic, FrozenLayer, UnsupportedError, Variant, VariantSettings
from variants.describe import COSTS_FILE
from variants.layer_random import LayerRandom

NOT_MEASURED = ("head_only",)
"""Entries without a step of their own on a language model."""
SECTIONS = ("steps", "initializations")


@dataclass(frozen=True)
class StepCase:
    """Decoder blocks of a known size, and the size of a batch."""

    shape: str
    layers: int
    rows: int
    length: int
    vocabulary: int
    dtype: str


CASES = {
    "tiny": StepCase("tiny", 2, 2, 16, 64, "float32"),
    "cpu": StepCase("qwen3-0.6b", 2, 1, 128, 1024, "float32"),
    "gpu": StepCase("qwen3-0.6b", 8, 8, 384, 4096, "bfloat16"),
}


def measure_step(name: str, case: StepCase, device: torch.device, rounds: int) -> dict[str, Any]:
    """Return the time and the memory of a variant's step relative to LoRA's.

    Args:
        name: The variant.
        case: The base model and the size of a batch.
        device: The device.
        rounds: Number of timed rounds.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, case.vocabulary, (case.rows, case.length), generator=generator).to(device)
    dtype = getattr(torch, case.dtype)
    sides = {
        side: OurStep(
            each, build_model(case.shape, device, dtype, case.layers, vocab_size=case.vocabulary), ids, {}
        )
        for side, each in (("variant", name), ("lora", "lora"))
    }
    seconds = time_in_turn(sides, rounds, device)
    peaks = {side: measure_memory(each, device)[1] for side, each in sides.items()}
    summary = ratios(seconds["variant"], seconds["lora"])
    return {
        "step_time": round(summary.median, 3),
        "quartiles": [round(summary.lower, 3), round(summary.upper, 3)],
        "memory": round(peaks["variant"] / peaks["lora"], 3),
    }


def needs_computation(name: str) -> bool:
    """Return whether a variant's initialization is computed from a weight, a gradient or inputs."""
    variant = catalogue.get(name)
    return variant.axis == "initialization" or variant.calibration_statistic is not CalibrationStatistic.NONE


def measure_initialization(name: str, side: int, device: str, threads: int) -> dict[str, Any]:
    """Return the seconds and the peak memory in MiB of the initialization of one layer, in a new process.

    Args:
        name: The variant.
        side: The number of rows and columns of the layer.
        device: cpu or cuda.
        threads: Number of threads of torch.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_initialize, (name, side, device, threads))


def _initialize(name: str, side: int, device_type: str, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    device, variant = torch.device(device_type), catalogue.get(name)
    settings = variant.validate_settings(VariantSettings())
    noise = torch.Generator(device).manual_seed(0)
    weight = torch.randn(side, side, generator=noise, device=device).mul_(0.02)
    layer = FrozenLayer("layer", weight, None, settings=settings)
    matrix = _statistic(variant, layer, noise)
    before = _start_of_peak(device)
    started = time.perf_counter()
    if matrix is not None:
        layer = replace(layer, calibration=variant.reduce_calibration(layer, matrix))
    layer = layer.with_settings(settings)
    variant.init_layers({"layer": layer}, lambda layer_name: LayerRandom(layer, 0))
    synchronize(device)
    seconds = time.perf_counter() - started
    return {"seconds": round(seconds, 2), "peak_mib": round((_peak(device) - before) / 2**20, 1)}


def _statistic(variant: Variant, layer: FrozenLayer, noise: torch.Generator) -> Tensor | None:
    """Return a random matrix of the kind that the variant's calibration computes; None if it has none."""
    kind = variant.calibration_statistic
    if kind is CalibrationStatistic.NONE:
        return None
    if kind is CalibrationStatistic.WEIGHT:
        return layer.weight
    drawn = torch.randn(layer.shape, generator=noise, device=layer.device)
    return drawn if kind is CalibrationStatistic.MEAN_GRADIENT else drawn.t() @ drawn / len(drawn)


def _start_of_peak(device: torch.device) -> int:
    """Start the measurement of peak memory, and return the memory in use in bytes."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak of the resident memory starts anew
    return _resident_bytes("VmRSS")


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident_bytes("VmHWM")


def _resident_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def update_costs(
    costs: Mapping[str, Any], section: str, conditions: Mapping[str, Any], measured: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the costs with the measurements of a section.

    Earlier measurements of other variants stay if they were made under the same conditions, except for the
    commit and the load of the machine, which are kept with each measurement.

    Args:
        costs: The content of `variants/costs.json`.
        section: One of `SECTIONS`.
        conditions: The machine and the sizes.
        measured: Variant -> measurements.
    """
    machine = dict(conditions["machine"])
    moment = {name: machine.pop(name) for name in ("commit", "load")}
    conditions = {**conditions, "machine": machine}
    earlier = dict(costs.get(section, {}))
    variants = earlier.pop("variants", {})
    kept = variants if earlier == conditions else {}
    new = {name: {**values, **moment} for name, values in measured.items()}
    return {**costs, section: {**conditions, "variants": dict(sorted({**kept, **new}.items()))}}


def read_options() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = make_parser(__doc__)
    names = [name for name in catalogue.names() if name not in NOT_MEASURED]
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--variants", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--case", choices=sorted(CASES), help="default: cpu or gpu, as the device")
    parser.add_argument("--rounds", type=int, default=12, help="rounds of the two sides; default: 12")
    parser.add_argument("--side", type=int, default=4096, help="rows and columns of the layer to initialize")
    parser.add_argument("--write", action="store_true", help="write variants/costs.json")
    return parser.parse_args()


def run() -> None:
    """Measure the variants of the command line, print the measurements, and write them if asked to."""
    options = read_options()
    device = choose_device(options)
    costs = json.loads(COSTS_FILE.read_text()) if COSTS_FILE.exists() else {}
    case = CASES[options.case or ("gpu" if device.type == "cuda" else "cpu")]
    for section in options.sections:
        sizes = asdict(case) if section == "steps" else {"side": options.side}
        names = [n for n in options.variants if section == "steps" or needs_computation(n)]
        measured: dict[str, Any] = {}
        for name in names:
            gc.collect()
            try:
                measured[name] = (
                    measure_step(name, case, device, options.rounds)
                    if section == "steps"
                    else measure_initialization(name, options.side, device.type, options.threads)
                )
            except UnsupportedError as error:  # a variant need not fit every size of layer
                print(f"{name}: not measured: {error}", flush=True)
                continue
            print(name, json.dumps(measured[name]), flush=True)
            if options.write:  # after each one, so that an interrupted run keeps what it has measured
                conditions = {"machine": describe_machine(device), **sizes}
                costs = update_costs(costs, section, conditions, measured)
                COSTS_FILE.write_text(json.dumps(costs, indent=1) + "\n")
        print(format_table(measured))


def format_table(measured: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the table of a section's measurements."""
    header = ["variant", *next(iter(measured.values()), {})]
    return markdown_table(header, ([name, *row.values()] for name, row in measured.items()))


if __name__ == "__main__":
    main(run)
