"""Measure on one GPU what docs/performance.md predicts; needs neither Ray nor a network.

    python experiments/benchmarks/gpu.py ceilings svd noise --steps 20
    python experiments/benchmarks/gpu.py train step --lanes 1 2 4 8 --steps 3
    python experiments/benchmarks/gpu.py train step --liger --lanes 1 4 8 --steps 3
    python experiments/benchmarks/gpu.py generate scoring oom --variants lora
    python experiments/benchmarks/gpu.py train oom --model llama-3.1-8b --variants lora dora --lanes 1 2
    python experiments/benchmarks/gpu.py --device cpu --tiny           everything at tiny size, in two minutes

Needs torch, transformers, filelock, psutil and pydantic (pip installs the last three with transformers and
PEFT), and this repository on PYTHONPATH; for --liger also liger-kernel. Weights and tokens are random.

Each measurement is printed as one line of JSON, after the prediction of its section for an H100, and --out is
written again after every line. Each section runs in a process of its own: one that fails, crashes or loses
the device is reported as an error, and the next one runs. After --minutes the section is ended, and the ones
after it are reported as not run. Sections:

ceilings  products in bfloat16, copies on the device, launches: what the machine can do
svd       PiSSA's exact initialization, for the sizes of layers
noise     the differences between the losses of a lane that is trained twice alone and once with others
train     a micro-batch of 8 rows a lane: device time, host time, kernels, busy share, memory
step      whole optimizer steps of the default study (64 rows a lane)
generate  the project's decoder: ms per token by rows of a batch, without adapters and with lanes
scoring   the loss of 64 items, and 64 answers, by the project's own functions
oom       the memory that stays allocated after lanes were added until memory ran out
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from gpu_sections import SECTIONS, Setup
from model_shapes import SHAPES
from paired_timing import describe_machine

from orchestrator.util.command import main

MACHINE = "machine"
"""The section that describes the machine. It runs first, always."""
PREDICTIONS = {
    "ceilings": "620 TFLOP/s, 2.6 TB/s, 2.5 us a launch",
    "svd": "14336 x 4096 takes 5-40 s",
    "noise": "`again` is above 0: attention's backward pass adds with atomics",
    "train": "LoRA, 384 tokens: 1 lane 60-75 ms and busy 0.8-0.95, 4 lanes 180-300 ms and busy above 0.95; "
    "with --liger 4 lanes 110-170 ms. Busy below 0.7 at one lane: the host is slower than assumed",
    "step": "a LoRA lane of four: 0.33 s, or 9 minutes for 1,562 steps; with --liger 0.18 s, or 5 minutes",
    "generate": "LoRA: 6-12 ms a token as a captured graph (90 kernels a block, and the whole static cache)",
    "scoring": "none",
    "oom": "less than 50 MiB stay allocated",
}
"""Section -> the prediction for an H100 and Qwen3-0.6B; docs/performance.md says how it was made."""


@dataclass
class Output:
    """The measurements so far, printed as they come and written to the result file."""

    file: Path | None
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, section: str, **values: Any) -> None:
        """Print a measurement as a line of JSON, and write all measurements to the result file."""
        self.rows.append({"section": section, **values})
        print(json.dumps(self.rows[-1], default=str), flush=True)
        if self.file is not None:
            machine = next((row for row in self.rows if row["section"] == MACHINE), {})
            result = {"machine": machine, "rows": self.rows}
            temporary = self.file.with_name(f"{self.file.name}.part")
            temporary.write_text(json.dumps(result, indent=1, default=str) + "\n")
            temporary.replace(self.file)


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
    same_seed = "whether lanes read the same rows, as those of a block of rates do; default: yes"
    parser.add_argument("--same-seed", action=argparse.BooleanOptionalAction, default=True, help=same_seed)
    parser.add_argument("--tiny", action="store_true", help="a tiny model and short rows")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=9.5, help="end after this time; default: 9.5")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # see run_section
    parser.add_argument("--out", type=Path, help="write the measurements to this JSON file")
    options = parser.parse_args()
    known = {*SECTIONS, MACHINE} if options.here else SECTIONS.keys()
    if unknown := set(options.sections) - known:
        parser.error(f"no section {min(unknown)!r}: take some of {', '.join(SECTIONS)}")
    return options


def run() -> int:
    """Measure the sections of the command line. Returns 1 if one of them failed, else 0."""
    options = read_options()
    sections = options.sections or list(SECTIONS)
    if options.here:
        return int(not _measure_here(sections[0], options))
    output, ends_at = Output(options.out), time.monotonic() + 60 * options.minutes
    arguments = [text for text in sys.argv[1:] if text not in SECTIONS]
    succeeded = True
    for name in (MACHINE, *sections):
        if name != MACHINE:
            output.add(name, predicted=PREDICTIONS[name])
        succeeded &= run_section(name, arguments, ends_at, output)
    return int(not succeeded)


def _measure_here(name: str, options: argparse.Namespace) -> bool:
    """Measure a section in this process, and print its error if it fails. Return whether it succeeded."""
    device, output = torch.device(options.device), Output(None)
    model = "tiny" if options.tiny else options.model
    if device.type == "cpu":
        torch.set_num_threads(1)
    setup = Setup(
        device,
        model,
        tuple(options.variants),
        tuple(options.lanes),
        options.steps,
        options.liger,
        options.checkpointing,
        options.same_seed,
        output.add,
    )
    try:
        if name == MACHINE:
            output.add(MACHINE, **describe_machine(device), model=model)
        else:
            SECTIONS[name](setup)
    except Exception as error:
        output.add(name, error=f"{type(error).__name__}: {error}"[:400])
        return False
    return True


def run_section(name: str, arguments: list[str], ends_at: float, output: Output) -> bool:
    """Measure a section in a process of its own. Returns whether it succeeded.

    Args:
        name: The section, or `MACHINE`.
        arguments: The command line without sections.
        ends_at: The time of `time.monotonic` at which the process is killed.
        output: Gets the measurements of the process, each as soon as it is printed.
    """
    seconds = ends_at - time.monotonic()
    if seconds <= 0:
        output.add(name, error="not run: no time left (--minutes)")
        return False
    command = [sys.executable, __file__, name, *arguments, "--here"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    is_reported = False
    try:
        assert process.stdout is not None
        for line in process.stdout:
            values = _read_measurement(line)
            if values is None:
                print(line, end="", flush=True)
                continue
            is_reported |= "error" in values
            output.add(**values)
        code = process.wait()
    finally:
        timer.cancel()
        process.kill()
        process.wait()
    if code != 0 and not is_reported:
        late = " (no time left, --minutes)" if time.monotonic() >= ends_at else ""
        output.add(name, error=f"the process ended with code {code}{late}")
    return code == 0


def _read_measurement(line: str) -> dict[str, Any] | None:
    """Return the measurement that `Output.add` has printed, or None for a library's message."""
    try:
        values = json.loads(line)
    except ValueError:
        return None
    return values if isinstance(values, dict) and "section" in values else None


if __name__ == "__main__":
    main(run)
