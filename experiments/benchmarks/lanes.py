"""Measure how much faster several lanes train in one process than one lane.

    python experiments/benchmarks/lanes.py                                    letters and the 135M shape
    python experiments/benchmarks/lanes.py --cases letters --variants lora --lanes 1 2 4 8 16
    python experiments/benchmarks/lanes.py --cases qwen qwen-short            on a GPU

For variants of each kind of batching (lora: batched; dora: batched, with norms; hira: dense; full:
exclusive, which allows one lane), whole optimizer steps of the real loop are timed: batches, forward,
backward, norms, AdamW. Group sizes run in turn. The figure is the number of lane-steps per second divided by
that of one lane: 1.6 at 8 lanes means that 8 lanes take 5 times as long as one.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from measuring import Summary, choose_device, make_parser, markdown_table, ratios, time_in_turn, write_results
from synthetic_task import (
    SHAPES,
    StepSize,
    build_model,
    draw_equal_rows,
    draw_rows,
    free_device_memory,
    make_lanes,
    take_step,
)

from orchestrator.util.command import main

VARIANTS = ("lora", "dora", "hira", "full")


@dataclass(frozen=True)
class Case:
    """A base model and the size of a lane's step."""

    shape: str
    size: StepSize
    layers: int | None = None
    dtype: torch.dtype = torch.float32
    drawn_lengths: bool = False
    """Whether the rows have lengths like those of MetaMathQA; else all have the largest length."""


CASES = {
    "tiny": Case("tiny", StepSize(2, max_length=17)),
    "letters": Case("letters", StepSize(16, max_length=13)),
    "135m": Case("smollm2-135m", StepSize(2, max_length=33), layers=8),
    "qwen": Case("qwen3-0.6b", StepSize(8, 8), dtype=torch.bfloat16, drawn_lengths=True),
    "qwen-short": Case("qwen3-0.6b", StepSize(8, max_length=65), dtype=torch.bfloat16),
}


def measure(
    variant: str, case_name: str, counts: list[int], device: torch.device, rounds: int
) -> list[dict[str, Any]]:
    """Return the throughput of each number of lanes as rows of the result.

    Args:
        variant: The variant.
        case_name: A key of `CASES`.
        counts: Numbers of lanes; 1 is added.
        device: The device.
        rounds: The rounds that count.
    """
    case = CASES[case_name]
    vocab_size, longest = SHAPES[case.shape].vocab_size, case.size.max_length - 1
    rows = (draw_rows if case.drawn_lengths else draw_equal_rows)(vocab_size, 512, longest)
    sides: dict[str, Callable[[], object]] = {}
    sizes: dict[str, int] = {}
    for count in sorted({1, *counts}):
        model = build_model(case.shape, device, case.dtype, case.layers)
        group, lanes = make_lanes(model, rows, variant, count, case.size)
        if len(lanes) == count:  # an exclusive variant has one lane only
            sides[str(count)] = partial(take_step, group, lanes)
            sizes[str(count)] = count
    seconds = time_in_turn(sides, rounds, device)
    found = []
    for name, lanes_here in sizes.items():
        one = [lanes_here * value for value in seconds["1"]]
        found.append(
            {
                "case": case_name,
                "variant": variant,
                "lanes": lanes_here,
                "step_ms": 1e3 * Summary.of(seconds[name]).median,
                "throughput": ratios(one, seconds[name]),
            }
        )
    return found


def format_table(rows: list[dict[str, Any]]) -> str:
    """Return the table of the throughputs, with a column for each number of lanes."""
    counts = sorted({row["lanes"] for row in rows})
    cells: dict[tuple[str, str], dict[int, Any]] = {}
    for row in rows:
        cells.setdefault((row["case"], row["variant"]), {})[row["lanes"]] = row
    header = ["case", "variant", "one lane, ms", *(f"{count} lanes" for count in counts if count > 1)]
    lines = []
    for (case, variant), by_count in cells.items():
        line = [case, variant, f"{by_count[1]['step_ms']:.1f}"]
        line += [str(by_count[n]["throughput"]) if n in by_count else "" for n in counts if n > 1]
        lines.append(line)
    return markdown_table(header, lines)


def read_options() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "--cases", nargs="+", choices=sorted(CASES), help="default: letters 135m, or qwen on a GPU"
    )
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS))
    parser.add_argument("--lanes", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    parser.add_argument("--rounds", type=int, default=15, help="rounds of all group sizes; default: 15")
    return parser.parse_args()


def run() -> None:
    """Measure every variant in every case, and print the table."""
    options = read_options()
    device = choose_device(options)
    rows: list[dict[str, Any]] = []
    for case in options.cases or (["qwen"] if device.type == "cuda" else ["letters", "135m"]):
        for variant in options.variants:
            rows += measure(variant, case, options.lanes, device, options.rounds)
            free_device_memory(device)
            write_results(options.out, device, rows)
    print(format_table(rows))


if __name__ == "__main__":
    main(run)
