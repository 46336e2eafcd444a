"""Measure coverage, error rates and power of the analysis on synthetic studies with known truth.

    python experiments/benchmarks/coverage.py [--replicates 2000] [--rows intervals looks ...] [--json FILE]

Prints a Markdown table. Every row ends in ok or MISSED, depending on whether the percentage lies within its
limits; the exit code is 1 if a row has missed. docs/statistics.md has the table of the last complete run.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

# Each process computes on one core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from coverage_factors import claim_rows, order_rows
from coverage_rows import (
    Row,
    RowFunction,
    item_rows,
    look_rows,
    noise_rows,
    plan_rows,
    power_rows,
    tuning_rows,
    unusable_rows,
)
from factor_coverage import claim_cases
from markdown_table import markdown_table
from synthetic_studies import NOISES

CHEAP_FACTOR = 5
"""Rows that analyze many studies in one array operation simulate this many times as many studies."""
Task = tuple[str, RowFunction, tuple[Any, ...], int]
"""Group of rows, function that computes them, its first arguments, and the number of studies."""
SIZES = [(n, count) for n in (5, 10, 20) for count in (4, 9, 19)]
"""Numbers of replicates and of variants besides the baseline."""


def list_tasks(replicates: int) -> list[Task]:
    """Return the simulations, those that take longest first.

    Args:
        replicates: Number of synthetic studies of the expensive rows.
    """
    many = CHEAP_FACTOR * replicates
    tasks: list[Task] = [
        ("unusable", unusable_rows, (share, n, count), replicates)
        for share in (0.0, 0.03, 0.1)
        for n, count in ((20, 19), (10, 9), (5, 4))
    ]
    tasks += [("looks", look_rows, (step, count), replicates) for step, count in ((10, 9), (5, 9), (10, 1))]
    tasks += [("tuning", tuning_rows, (rate, n, 9), many) for rate in (4, 2) for n in (20, 10)]
    tasks += [("tuning", tuning_rows, (rate, 10, 19), many) for rate in (4, 2)]
    tasks += [("factors", order_rows, (10,), replicates)]
    tasks += [("factors", claim_rows, (i, 5), replicates) for i in range(len(claim_cases()))]
    tasks += [("intervals", noise_rows, (noise, *size), many) for size in SIZES[::-1] for noise in NOISES]
    tasks += [("items", item_rows, (items,), replicates) for items in (1, 2)]
    tasks += [("power", power_rows, (n, 9), many) for n in (20, 10, 5)]
    tasks += [("plan", plan_rows, (1.5, 9), replicates)]
    return tasks


def simulate(tasks: Sequence[Task], processes: int) -> list[Row]:
    """Run the simulations in parallel, and print progress to stderr.

    Args:
        tasks: The simulations.
        processes: Number of processes.

    Returns:
        The rows of all tasks, in the order of the tasks.
    """
    start, done = time.monotonic(), 0
    results: dict[int, list[Row]] = {}
    with ProcessPoolExecutor(processes) as pool:
        futures = {
            # The seed depends on the task alone, so that --rows changes no result.
            pool.submit(
                function,
                *arguments,
                studies,
                zlib.crc32(repr((group, function.__name__, arguments)).encode()),
            ): i
            for i, (group, function, arguments, studies) in enumerate(tasks)
        }
        for future in as_completed(futures):
            results[futures[future]] = future.result()
            done += 1
            row = results[futures[future]][0]
            elapsed = time.monotonic() - start
            print(
                f"{done}/{len(tasks)}, {elapsed:.0f} s: {row.group}, {row.case}", file=sys.stderr, flush=True
            )
    return [row for i in range(len(tasks)) for row in results[i]]


def row_cells(row: Row) -> list[str]:
    """Return a row as the cells of the printed table."""
    low, high = row.limits
    wanted = (
        f"at most {high:g}" if low == 0 else f"at least {low:g}" if high == 100 else f"{low:g} to {high:g}"
    )
    verdict = "ok" if row.passed else "MISSED"
    return [row.group, row.case, row.quantity, f"{row.percent:.1f}", wanted, f"{row.studies:,}", verdict]


def main() -> int:
    """Run the benchmark of the command line, and return the exit code."""
    groups = sorted({task[0] for task in list_tasks(1)})
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--replicates", type=int, default=2000, help="synthetic studies of an expensive row")
    parser.add_argument("--rows", nargs="+", choices=groups, default=groups, help="groups of rows")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    if options.replicates < 1:
        parser.error(f"--replicates {options.replicates}: at least 1, for example --replicates 2000")
    tasks = [task for task in list_tasks(options.replicates) if task[0] in options.rows]
    rows = sorted(simulate(tasks, options.processes), key=lambda row: (row.group, row.quantity))
    header = ["group", "case", "quantity", "percent", "wanted", "studies", ""]
    print(markdown_table(header, map(row_cells, rows)))
    if options.json:
        options.json.write_text(json.dumps([{**asdict(row), "passed": row.passed} for row in rows], indent=1))
    missed = sum(not row.passed for row in rows)
    print(f"\n{len(rows) - missed} of {len(rows)} rows ok")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
