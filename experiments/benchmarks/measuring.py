"""Functions that the benchmarks share: paired timing, the conditions of a measurement, Markdown tables.

The sides of a comparison run in turn in one process, and ratios are computed per round. Only the functions
that need torch import it, because some benchmarks run without it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.record.schema import current_commit
from orchestrator.util.host_memory import keep_freed_memory

if TYPE_CHECKING:
    import torch

WARMUP_ROUNDS = 2
"""The number of rounds before those that count."""


@dataclass(frozen=True)
class Summary:
    """The median of some numbers with their quartiles."""

    median: float
    lower: float
    upper: float

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.lower:.3g}-{self.upper:.3g})"

    @classmethod
    def of(cls, numbers: Sequence[float]) -> Summary:
        """Return the summary of at least one number."""
        if len(numbers) == 1:
            return cls(numbers[0], numbers[0], numbers[0])
        lower, median, upper = statistics.quantiles(numbers, n=4, method="inclusive")
        return cls(median, lower, upper)


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished; a CPU always has."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def time_in_turn(
    sides: Mapping[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Run all sides once per round, in an order that rotates with the round.

    Args:
        sides: Name -> function to time.
        rounds: The number of rounds that count.
        device: The device that a side keeps busy; the clock stops when it has finished.

    Returns:
        Name -> seconds of each round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for number in range(-WARMUP_ROUNDS, rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            synchronize(device)
            started = time.perf_counter()
            sides[name]()
            synchronize(device)
            if number >= 0:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> Summary:
    """Return the median and the quartiles of the ratios of each round."""
    return Summary.of([a / b for a, b in zip(numerators, denominators, strict=True)])


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return the conditions of a measurement: commit, device, versions, threads, load."""
    import torch
    import transformers

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {
        "commit": current_commit(),
        "device": f"{device.type} {name}".strip(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def write_results(file: Path | None, device: torch.device, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the measurements and the machine as JSON, if a file is given."""
    if file is not None:
        result = {"machine": describe_machine(device), "rows": list(rows)}
        file.write_text(json.dumps(result, indent=1, default=vars) + "\n")


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that all benchmarks have.

    Args:
        description: The docstring of the script; `--help` prints it as it is.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="write the measurements to this JSON file")
    parser.add_argument("--device", help="cpu or cuda; default: cuda if there is one")
    parser.add_argument(
        "--threads", type=int, default=1, help="threads of torch on a CPU; default: 1, as in a trainer"
    )
    return parser


def choose_device(options: argparse.Namespace) -> torch.device:
    """Return the device of the command line, and prepare the process for it as a trainer does."""
    import torch

    torch.set_num_threads(options.threads)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cpu":
        keep_freed_memory()
    return device
