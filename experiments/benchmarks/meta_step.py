"""Count the default study's training step at real sizes, on torch's meta device: nothing is computed.

    python experiments/benchmarks/meta_step.py                     Qwen3-0.6B, 4 lanes of each variant
    python experiments/benchmarks/meta_step.py --models llama-3.1-8b --lanes 1 2
    python experiments/benchmarks/meta_step.py --fused             norms, rotary, SwiGLU as one kernel each
    python experiments/benchmarks/meta_step.py --tree ../earlier   another checkout, e.g. a git worktree

A step of a lane is 64 rows in 8 micro-batches; the lengths of rows are drawn like MetaMathQA's (250 tokens on
average, 511 at most). Forward and backward pass of the real lane group run on the meta device, so launches
and bytes are exact for eager PyTorch with flash attention; the optimizer's own launches are not counted. The
peak is that of live tensors, with weights, AdamW's moments and gradients, and without the allocator's
fragmentation and CUDA's own memory (0.5 GiB). Times are a PREDICTION for an H100: for each kernel the longest
of operations / 620e12, bytes / 2.6e12 and 2.5 us; the host's time for launching the kernels is not in them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from fused_operators import flash_attention, fuse_model
from markdown_table import markdown_table
from model_shapes import SHAPES, build_model
from synthetic_task import StepSize, draw_rows, make_lanes
from tensor_counts import TensorCounter

from orchestrator.record.provenance import current_commit
from orchestrator.util.command import main

ROWS = 2048
META = torch.device("meta")


def count_step(model_name: str, variant: str, lanes: int, fused: bool, size: StepSize) -> dict[str, Any]:
    """Return the counts of one step of some lanes as a row of the result.

    Args:
        model_name: A key of `SHAPES`.
        variant: The variant.
        lanes: The number of lanes.
        fused: Whether norms, rotary embedding and SwiGLU are one kernel each.
        size: The size of a lane's step.
    """
    model = build_model(model_name, META, torch.bfloat16)
    rows = draw_rows(SHAPES[model_name].vocab_size, ROWS, size.max_length - 1)
    group, members = make_lanes(model, rows, variant, lanes, size)
    with fuse_model(model) if fused else flash_attention():
        resident = [*model.parameters(), *model.buffers()]
        resident += [t for lane in members for t in group.adapters.frozen(lane.fingerprint).values()]
        parameters = [p for lane in members for p in lane.parameters.values()]
        moments = [torch.empty_like(p) for p in parameters for _ in range(2)]
        counter = TensorCounter("meta", [*resident, *parameters, *moments])
        with counter:
            group.backward(members)
    counts = counter.counts
    real = size.rows * size.accumulation * len(members) * sum(len(row.ids) for row in rows) / len(rows)
    return {
        "model": model_name,
        "variant": variant,
        "lanes": len(members),
        "fused": fused,
        "launches": counts.launches,
        "transfers": counts.transfers,
        "host_waits": counts.host_waits,
        "gigabytes": counts.bytes / 1e9,
        "gemm_teraflops": counts.gemm_flops / 1e12,
        "device_seconds": counts.seconds,
        "tokens_per_second": real / counts.seconds,
        "peak_gib": counts.peak_bytes / 2**30,
        "commit": current_commit(),
        "slowest": {
            name: round(1e3 * seconds, 1) for name, seconds in counts.seconds_by_operator.most_common(8)
        },
        "peak_gib_by_operator": _largest(counts.peak_by_operator),
        "most_launched": dict(counts.by_operator.most_common(8)),
    }


def _largest(bytes_by_operator: dict[str, int]) -> dict[str, float]:
    """Return the eight operators whose results take the most memory, in GiB.

    The key "" stands for tensors that existed before.
    """
    ordered = sorted(bytes_by_operator.items(), key=lambda item: -item[1])[:8]
    return {name: round(size / 2**30, 2) for name, size in ordered}


def format_table(rows: list[dict[str, Any]]) -> str:
    """Return the table of the counts."""
    header = [
        "commit",
        "model",
        "variant",
        "lanes",
        "fused",
        "launches",
        "transfers",
        "host waits",
        "GB moved",
        "GEMM, TFLOP",
    ]
    header += ["predicted device time, ms", "of it for a lane, ms", "peak, GiB"]
    return markdown_table(
        header,
        [
            [
                row["commit"][:8],
                row["model"],
                row["variant"],
                row["lanes"],
                "yes" if row["fused"] else "no",
                row["launches"],
                row["transfers"],
                row["host_waits"],
                f"{row['gigabytes']:.0f}",
                f"{row['gemm_teraflops']:.1f}",
                f"{1e3 * row['device_seconds']:.0f}",
                f"{1e3 * row['device_seconds'] / row['lanes']:.0f}",
                f"{row['peak_gib']:.1f}",
            ]
            for row in rows
        ],
    )


def run_in_tree(tree: Path, arguments: list[str]) -> list[dict[str, Any]]:
    """Count with the program of another checkout, in a process of its own. Returns its rows.

    Args:
        tree: The folder of the checkout.
        arguments: The command line without `--tree`.
    """
    environment = {**os.environ, "PYTHONPATH": str(tree.resolve())}
    command = [sys.executable, __file__, *arguments, "--json"]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def read_options() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=sorted(SHAPES), default=["qwen3-0.6b"])
    parser.add_argument("--variants", nargs="+", default=["lora", "dora", "hira", "pissa"])
    parser.add_argument("--lanes", nargs="+", type=int, default=[4], help="lanes of the group; default: 4")
    parser.add_argument("--rows", type=int, default=8, help="rows of a micro-batch; default: 8")
    parser.add_argument("--accumulation", type=int, default=8, help="micro-batches of a step; default: 8")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a row; default: 512")
    parser.add_argument("--fused", action="store_true", help="count Liger's kernels, see above")
    parser.add_argument("--tree", type=Path, help="count with the program of this checkout")
    parser.add_argument("--out", type=Path, help="write the counts to this JSON file")
    parser.add_argument("--json", action="store_true", help="print the counts as JSON, not as a table")
    return parser.parse_args()


def run() -> None:
    """Count every combination of the options, and print the table."""
    options = read_options()
    if options.tree is not None:
        at = sys.argv.index("--tree")
        rows = run_in_tree(options.tree, [*sys.argv[1:at], *sys.argv[at + 2 :]])
    else:
        size = StepSize(options.rows, options.accumulation, options.max_length)
        rows = [
            count_step(model, variant, lanes, options.fused, size)
            for model in options.models
            for variant in options.variants
            for lanes in options.lanes
        ]
    if options.out is not None:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")
    print(json.dumps(rows) if options.json else format_table(rows))


if __name__ == "__main__":
    main(run)
