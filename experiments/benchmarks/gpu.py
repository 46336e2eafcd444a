"""Measure on one GPU what docs/performance.md predicts; needs neither Ray nor a network.

    python experiments/benchmarks/gpu.py                               every section, Qwen3-0.6B's shape
    python experiments/benchmarks/gpu.py ceilings svd noise            run these first: 5 minutes
    python experiments/benchmarks/gpu.py train step --lanes 1 2 4 8    the tables of lanes
    python experiments/benchmarks/gpu.py train oom --model llama-3.1-8b --variants lora dora --lanes 1 2
    python experiments/benchmarks/gpu.py --device cpu --tiny           everything at tiny size, in a minute

Needs torch, transformers, pydantic, pyarrow, filelock and psutil, and this repository on PYTHONPATH; for
--liger also liger-kernel. Weights and tokens are random. Each measurement is printed as one line of JSON,
after the prediction of its section for an H100. Sections:

ceilings  products in bfloat16, copies on the device, launches: what the machine can do
svd       PiSSA's exact initialization, for the sizes of layers
noise     the differences between the losses of a lane that is trained twice alone and once with others
train     a micro-batch of 8 rows a lane: device time, host time, kernels, busy share, memory
step      whole optimizer steps of the default study (64 rows a lane)
generate  decoding: ms per token by rows of a batch, without adapters and with lanes
scoring   the loss of 64 items, and 64 answers, by the project's own functions
oom       the memory that stays allocated after lanes were added until memory ran out
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from gpu_sections import SECTIONS, Setup
from model_shapes import SHAPES
from paired_timing import describe_machine

from orchestrator.finetune.failures import Fault, classify_error
from orchestrator.util.command import main

PREDICTIONS = {
    "ceilings": "620 TFLOP/s, 2.6 TB/s, 2.5 us a launch",
    "svd": "14336 x 4096 takes 5-40 s",
    "noise": "`again` is above 0: attention's backward pass adds with atomics",
    "train": "LoRA, 384 tokens: 1 lane 60-75 ms and busy 0.8-0.95, 4 lanes 180-300 ms and busy above 0.95; "
    "with --liger 4 lanes 110-170 ms. Busy below 0.7 at one lane: the host is slower than assumed",
    "step": "a LoRA lane of four: 0.36 s, or 9 minutes for 1,562 steps; with --liger 0.20 s, or 5 minutes",
    "generate": "22-30 ms a token at 32 rows, at 512 rows within 20 % of that; further lanes add less than "
    "10 % at 32 rows. With a captured graph 3-4 ms",
    "scoring": "none",
    "oom": "less than 50 MiB stay allocated",
}
"""Section -> the prediction for an H100 and Qwen3-0.6B; docs/performance.md says how it was made."""


@dataclass
class Output:
    """Prints measurements and collects them for the result file."""

    device: torch.device
    file: Path | None
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, section: str, **values: Any) -> None:
        """Print a measurement as a line of JSON."""
        self.rows.append({"section": section, **values})
        print(json.dumps(self.rows[-1], default=str), flush=True)
        if self.file is not None:
            result = {"machine": describe_machine(self.device), "rows": self.rows}
            self.file.write_text(json.dumps(result, indent=1, default=str) + "\n")


def read_options() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", nargs="*", help=f"default: all of {', '.join(SECTIONS)}")
    parser.add_argument("--model", choices=sorted(SHAPES), default="qwen3-0.6b")
    parser.add_argument("--variants", nargs="+", default=["lora", "dora", "hira", "pissa"])
    parser.add_argument("--lanes", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps of `noise` and `step`")
    parser.add_argument("--liger", action="store_true", help="use Liger's RMSNorm, rotary and SwiGLU")
    parser.add_argument("--checkpointing", action="store_true", help="recompute blocks in the backward pass")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and short rows")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="write the measurements to this JSON file")
    options = parser.parse_args()
    if unknown := set(options.sections) - SECTIONS.keys():
        parser.error(f"no section {min(unknown)!r}: take some of {', '.join(SECTIONS)}")
    return options


def run() -> int:
    """Measure the sections of the command line. Returns 1 if one of them failed, else 0."""
    options = read_options()
    device = torch.device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    output = Output(device, options.out)
    output.add("machine", **describe_machine(device), model="tiny" if options.tiny else options.model)
    setup = Setup(
        device,
        "tiny" if options.tiny else options.model,
        tuple(options.variants),
        tuple(options.lanes),
        options.steps,
        options.liger,
        options.checkpointing,
        output.add,
    )
    failed = False
    for name in options.sections or SECTIONS:
        output.add(name, predicted=PREDICTIONS[name])
        failed |= not _measure(name, SECTIONS[name], setup)
    return int(failed)


def _measure(name: str, section: Callable[[Setup], None], setup: Setup) -> bool:
    """Measure a section, and report an error as a measurement, so that the next section still runs."""
    try:
        section(setup)
    except Exception as error:
        setup.add(name, error=f"{type(error).__name__}: {error}"[:400])
        if classify_error(error) is Fault.DEVICE:
            raise
        return False
    return True


if __name__ == "__main__":
    main(run)
